"""A socket on loopback, for what is served to this machine alone."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from offsite.protos.errors import ResourceError

HOST = "127.0.0.1"


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on loopback; port 0 is any free one. Raises ResourceError."""
    try:
        bound = socket.create_server((HOST, port))
    except OSError as error:
        what = f"cannot listen on {HOST}:{port}: {error.strerror}; give another port (--port), or 0 for any free one"
        raise ResourceError(what) from None
    with bound:
        yield bound
