"""Metrics for Prometheus and answers for probes, over plain HTTP on a port of their own.

/metrics   the metrics, as text
/healthz   200 while the process gets on with its work
/readyz    200 while it can do what it is there for; else 503, and in a line what is missing
"""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app

from offsite.protos.addresses import Address
from offsite.protos.errors import ResourceError

READ_S = 10.0  # for which one who asks may be silent
Why = Callable[[], str]  # why something does not hold, in a line without names and places; empty: it does


class Exposition:
    """A small HTTP server in threads of its own, for as long as the process lives or until it is closed."""

    def __init__(self, address: Address, registry: CollectorRegistry, *, alive: Why, ready: Why) -> None:
        """Listen; raises ResourceError where that cannot be done."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of each, which nobody asks for
        metrics: Any = make_wsgi_app(registry)
        probes = {"/healthz": alive, "/readyz": ready}

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/metrics":
                result: Iterable[bytes] = metrics(environ, start)
                return result
            probe = probes.get(environ["PATH_INFO"])
            why = probe() if probe else "there are /metrics, /healthz and /readyz"
            status = "404 Not Found" if not probe else "503 Service Unavailable" if why else "200 OK"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{why or 'ok'}\n".encode()]

        kind = _Server6 if ":" in address.host else _Server
        try:
            self._server = kind((address.host, address.port), _Handler)
        except OSError as error:
            raise ResourceError(f"--metrics: cannot listen on {address}: {error.strerror}; name another") from None
        self._server.set_app(answer)
        self.address = Address(address.host, int(self._server.server_address[1]))
        threading.Thread(target=self._server.serve_forever, daemon=True, name="metrics").start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, and ask no name server what this machine is called."""
        self.server_name, self.server_port = "offsite", 0
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    server_version, sys_version = "offsite", ""  # no versions for strangers
    timeout = READ_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: who asks does so every few seconds."""
