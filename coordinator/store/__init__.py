"""What survives: the journal (every state change) and the blobs (every file)."""

from offsite.protos.errors import ResourceError


class Unusable(ResourceError):
    """A store cannot be read or written now: nothing is wrong with the runs, which go on once it can."""
