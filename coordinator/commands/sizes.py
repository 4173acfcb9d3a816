"""Sizes as options take them."""


def size(text: str, option: str) -> int:
    """Return the bytes that a text such as 16GB or 8GiB stands for; raises InputError that names the option."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from offsite.protos.documents import quoted
    from offsite.protos.errors import InputError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise InputError(f"{option} {quoted(text)} is no size; expected one such as 16GB or 8GiB") from None
