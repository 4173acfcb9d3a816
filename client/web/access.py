"""Who may open the page: a browser that came by a link printed here, which holds once and not for long.

The page listens on loopback, where other users and other sites' scripts also reach it. So what comes must name this
machine as its host (else a name that was rebound to it would do), bear the cookie of its login, and, to change
anything, come from the page itself (Origin) with a token that only the page can read.
"""

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINK_S = 300.0
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
OPEN = ("/login", "/static/")  # to those who have no cookie
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Access:
    """The link that holds, and the browsers that came by one."""

    def __init__(self) -> None:
        self._link, self._until = b"", 0.0
        self._forms: dict[str, str] = {}  # by a browser's cookie, the token of its forms

    def link(self) -> str:
        """Return the token of a new link; the one before holds no longer."""
        token = secrets.token_urlsafe(32)
        self._link, self._until = _digest(token), time.monotonic() + LINK_S
        return token

    def admit(self, token: str) -> str:
        """Return a new browser's cookie for the token of the link, which then holds no longer; empty for another."""
        if not hmac.compare_digest(_digest(token), self._link) or time.monotonic() > self._until:
            return ""
        cookie = secrets.token_urlsafe(32)
        self._link, self._forms[cookie] = b"", secrets.token_urlsafe(32)
        return cookie

    def forms(self, cookie: str) -> str:
        """Return what a browser's forms are sent with; empty if it has not come by a link."""
        return self._forms.get(cookie, "")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


@dataclass(frozen=True)
class Guard:
    """Lets through what `access` allows, with headers that have a browser load and run nothing but the page's own."""

    app: ASGIApp
    access: Access
    cookie: str  # its name
    closed: str  # what those see who have none, in HTML

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        await (self._refusal(Request(scope)) or self.app)(scope, receive, guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not HOST.fullmatch(host):
            return PlainTextResponse("Open this page as 127.0.0.1 or localhost.\n", 421)
        if request.url.path.startswith(OPEN):
            return None
        token = self.access.forms(request.cookies.get(self.cookie, ""))
        if not token:
            return HTMLResponse(self.closed, 401)
        if request.method not in ("GET", "HEAD"):
            own = request.headers.get("origin") == f"http://{host}"
            if not (own and hmac.compare_digest(request.headers.get("x-form-token", "").encode(), token.encode())):
                return PlainTextResponse("This did not come from the page itself. Reload it, and try again.\n", 403)
        request.scope["form_token"] = token
        return None
