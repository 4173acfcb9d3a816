"""What the coordinator is told of an error: one reason of a list. What happened stays in the site's own log."""

from collections.abc import Iterator
from contextlib import contextmanager

from offsite.protos import fleet_pb2 as pb
from offsite.protos.errors import InputError, MismatchError, OffsiteError

BY_KIND: dict[type[OffsiteError], str] = {
    InputError: "FAULT_TASK",
    MismatchError: "FAULT_EMULATOR",
}


@contextmanager
def because(reason: str, *kinds: type[OffsiteError]) -> Iterator[None]:
    """Give the errors of a stretch of work, or those of some kinds, their reason, unless they have one."""
    try:
        yield
    except OffsiteError as error:
        if not kinds or isinstance(error, kinds):
            error.reason = error.reason or reason
        raise


@contextmanager
def faults(reason: str, kind: type[OffsiteError] = InputError) -> Iterator[None]:
    """Call what the emulator package calls a ValueError by its kind: a fault of the files that are read, or another."""
    with because(reason):
        try:
            yield
        except ValueError as error:
            raise kind(str(error)) from error


def reason(error: OffsiteError) -> str:
    """Return what is told of an error, by its name in `Reason` of fleet.proto."""
    by_kind = next((name for kind, name in BY_KIND.items() if isinstance(error, kind)), "FAULT_INTERNAL")
    return error.reason if error.reason in pb.Reason.keys() else by_kind
