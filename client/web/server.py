"""The page's server, and links that are printed where it runs."""

import socket
import sys
import threading
from collections.abc import Callable

import uvicorn

from offsite.client.listening import HOST
from offsite.client.session import Session
from offsite.client.web.access import Access
from offsite.client.web.app import Pages
from offsite.client.web.views import Views

END_S = 1  # that streams have to end when the server does


def serve(session: Session, bound: socket.socket, *, say: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `say` is given its login link, and another one for each Enter."""
    port, access = bound.getsockname()[1], Access()
    app = Pages(Views(session), access, f"offsite-{port}").app()

    def link() -> None:
        say(f"http://{HOST}:{port}/login?token={access.link()}")

    def listen() -> None:
        for _ in sys.stdin:
            link()

    link()
    if sys.stdin is not None and sys.stdin.isatty():
        threading.Thread(target=listen, daemon=True, name="links").start()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=END_S, lifespan="off"
    )
    with session.renewal:
        uvicorn.Server(config).run(sockets=[bound])
