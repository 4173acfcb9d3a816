"""What a late update is called, and how much it still counts."""


def called(site: str, age: int = 0) -> str:
    """Return what a site's update is called among those of a round, of which it may have two."""
    return f"{site}, {age} rounds late" if age else site


def discount(age: int) -> float:
    """Return how much of its weight an update has that is so many rounds late.

    It is the polynomial of FedAsync (arXiv 1903.03934) with the power of a half that FedBuff (arXiv 2106.06639) takes.
    """
    return float((1 + age) ** -0.5)
