"""Errors that cross a process boundary, each with a stable exit code and gRPC status.

    OffsiteError           1  INTERNAL             a fault of ours
    +-- InputError         3  INVALID_ARGUMENT     an argument, a file or a document is not usable
    +-- IdentityError      4  UNAUTHENTICATED      a certificate is wrong, expired, revoked or unknown
    +-- RefusedError       5  PERMISSION_DENIED    a policy or a role says no
    +-- NotFoundError      6  NOT_FOUND            no such run, site, blob or model
    +-- MismatchError      7  DATA_LOSS            a digest, signature, shape or value is not what was agreed
    +-- ResourceError      8  RESOURCE_EXHAUSTED   a port, disk space or memory is missing
    +-- UnreachableError   9  UNAVAILABLE          the other end does not answer
    +-- RunError          10  ABORTED              a run failed or was cancelled
    +-- ConflictError     11  ALREADY_EXISTS       it exists already, and differs

Exit code 2 is the command line's own (unknown option), 130 an interrupt. The message is written for the person who
reads it: what happened, where, what was expected, what to do. A mistaken
argument inside one process stays `ValueError`.
"""

import errno


class OffsiteError(Exception):
    """Base of all errors a caller may meet at a process boundary.

    Args:
        message: for the person on this machine.
        reason: what a site may tell of it, by its name in `Reason` of fleet.proto; by the kind of error if empty.
    """

    exit_code = 1
    status = "INTERNAL"

    def __init__(self, message: str = "", *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class InputError(OffsiteError):
    """An argument, a file or a document is not usable."""

    exit_code = 3
    status = "INVALID_ARGUMENT"


class IdentityError(OffsiteError):
    """A certificate is wrong, expired, revoked or unknown."""

    exit_code = 4
    status = "UNAUTHENTICATED"


class RefusedError(OffsiteError):
    """A policy or a role says no."""

    exit_code = 5
    status = "PERMISSION_DENIED"


class NotFoundError(OffsiteError):
    """No such run, site, blob or model."""

    exit_code = 6
    status = "NOT_FOUND"


class MismatchError(OffsiteError):
    """A digest, signature, shape or value is not what was agreed."""

    exit_code = 7
    status = "DATA_LOSS"


class ResourceError(OffsiteError):
    """A port, disk space or memory is missing."""

    exit_code = 8
    status = "RESOURCE_EXHAUSTED"


class UnreachableError(OffsiteError):
    """The other end does not answer."""

    exit_code = 9
    status = "UNAVAILABLE"


class RunError(OffsiteError):
    """A run failed or was cancelled."""

    exit_code = 10
    status = "ABORTED"


class ConflictError(OffsiteError):
    """It exists already, and differs."""

    exit_code = 11
    status = "ALREADY_EXISTS"


KINDS: tuple[type[OffsiteError], ...] = (
    InputError,
    IdentityError,
    RefusedError,
    NotFoundError,
    MismatchError,
    ResourceError,
    UnreachableError,
    RunError,
    ConflictError,
)


def from_system(error: OSError) -> OffsiteError:
    """Turn what the operating system says into an error for a person: a full disk, or a path that cannot be used."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{where}the disk is full; free some space and try again", reason="FAULT_DISK")
    if error.errno in (errno.EIO, errno.EROFS):
        what = f"the disk fails or may only be read ({error.strerror}); look at it"
        return ResourceError(f"{where}{what}", reason="FAULT_DISK")
    return InputError(f"{where}{error.strerror or error}")


def from_status(status: str, message: str, *, reason: str = "") -> OffsiteError:
    """Turn a gRPC status name and its message back into the error that was raised at the other end."""
    kind = next((kind for kind in KINDS if kind.status == status), OffsiteError)
    return kind(message, reason=reason)
