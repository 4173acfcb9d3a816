"""What is installed only by those who need it: `pip install 'offsite[EXTRA]'`."""

from collections.abc import Iterator
from contextlib import contextmanager

from offsite.protos.errors import ResourceError


@contextmanager
def extra(name: str, *, option: str) -> Iterator[None]:
    """Import in the body what an extra installs; raises ResourceError, which names the option that asks for it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"{option}: {error.name} is not installed; it needs: pip install 'offsite[{name}]'"
        ) from None
