"""The page's routes. Each page is a template whose blocks named live_NAME fill the element NAME, and are sent again
over one stream of server-sent events whenever they have changed."""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from offsite.client.figures import short
from offsite.client.progress import clock
from offsite.client.web.access import Access, Guard
from offsite.client.web.views import LISTED, Views
from offsite.protos.errors import NotFoundError, OffsiteError
from offsite.protos.figures import FIGURES

LOOK_S = 0.5  # between two looks whether a page has changed
LIVE = "live_"
STATUS = {
    "INVALID_ARGUMENT": 422,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "UNAVAILABLE": 503,
}
Look = Callable[..., dict[str, Any]]


class Pages:
    """Answers for the page; what the coordinator says against something is shown in its own words."""

    def __init__(self, views: Views, access: Access, cookie: str) -> None:
        self._views, self._access, self._cookie = views, access, cookie
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("offsite.client.web"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters |= {"short": short, "clock": clock, "ago": ago, "size": size}
        self._templates.globals |= {"heads": FIGURES}
        for name in self._templates.list_templates():
            self._templates.get_template(name)  # now, so that nobody waits for it
        self._closed = self._templates.get_template("closed.html.j2").render()

    def app(self) -> Starlette:
        """Return the application, behind its guard."""
        routes = [
            Route("/login", self.login),
            Route("/", self.overview),
            Route("/live", self.overview),
            Route("/versions", self.versions),
            Route("/versions/live", self.versions),
            Route("/submit", self.draft),
            Route("/runs", self.submit, methods=["POST"]),
            Route("/runs/{id}", self.run),
            Route("/runs/{id}/live", self.run),
            Route("/runs/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/runs/{id}/rollback", self.roll_back, methods=["POST"]),
            Route("/runs/{id}/files/{name:path}", self.file),
            Mount("/static", StaticFiles(packages=[("offsite.client.web", "static")])),
        ]
        guard = Middleware(Guard, access=self._access, cookie=self._cookie, closed=self._closed)
        return Starlette(routes=routes, middleware=[guard], exception_handlers={OffsiteError: self.refusal})

    async def login(self, request: Request) -> Response:
        """Let a browser in that came by the link, and send it on from here, so that its cookie goes with it."""
        cookie = self._access.admit(request.query_params.get("token", ""))
        if not cookie:
            return HTMLResponse(self._closed, 401)
        response = self._html("login.html.j2", request)
        response.set_cookie(self._cookie, cookie, httponly=True, samesite="strict")
        return response

    async def overview(self, request: Request) -> Response:
        """Runs and sites."""
        text = request.query_params.get("limit", "")
        limit = int(text) if text.isdecimal() and 0 < len(text) < 6 else LISTED
        return await self._live("overview.html.j2", request, partial(self._views.overview, max(1, limit)))

    async def run(self, request: Request) -> Response:
        """All of one run."""
        return await self._live("run.html.j2", request, partial(self._views.run, request.path_params["id"]))

    async def versions(self, request: Request) -> Response:
        """The lineage of the newest runs."""
        return await self._live("versions.html.j2", request, self._views.lineage)

    async def draft(self, request: Request) -> Response:
        """A run file to change and submit."""
        asked = {name: request.query_params.get(name, "") for name in ("like", "start")}
        text = await run_in_threadpool(partial(self._views.draft, **asked))
        return self._html("submit.html.j2", request, text=text, token=secrets.token_hex(16), reader=self._views.reader)

    async def submit(self, request: Request) -> Response:
        """Submit what the form holds, and go on to the run."""
        async with request.form(max_part_size=1 << 20) as form:
            text, token = str(form.get("spec", "")), str(form.get("token", ""))
        run = await run_in_threadpool(self._views.submit, text, token)
        return Response(status_code=204, headers={"HX-Location": f'{{"path": "/runs/{run.id}", "target": "body"}}'})

    async def cancel(self, request: Request) -> Response:
        """End a run; the page learns of it as of all else."""
        await run_in_threadpool(lambda: self._views.session.run(request.path_params["id"]).cancel())
        return Response(status_code=204)

    async def roll_back(self, request: Request) -> Response:
        """Take back what came after a version."""
        async with request.form() as form:
            version, reason = (str(form.get(name, "")) for name in ("version", "reason"))
        await run_in_threadpool(self._views.roll_back, version, reason)
        return Response(status_code=204)

    async def file(self, request: Request) -> Response:
        """Hand on a published file, by way of a folder that is gone when it has been sent."""
        run = await run_in_threadpool(self._views.session.run, request.path_params["id"])
        name = request.path_params["name"]
        digest = next((file.digest for file in run.status.artifacts if file.name == name), "")
        if not digest:
            raise NotFoundError(f"run {run.id} has published no file {name}")
        folder = tempfile.TemporaryDirectory(prefix="offsite-web-")
        path = Path(folder.name) / "file"
        await run_in_threadpool(self._views.session.download, digest, path)
        after = BackgroundTask(folder.cleanup)
        return FileResponse(path, filename=Path(name).name, media_type="application/octet-stream", background=after)

    async def refusal(self, request: Request, error: Exception) -> Response:
        """Show what the coordinator says; a form's answer goes into the page that has it."""
        assert isinstance(error, OffsiteError)
        if request.method == "POST":  # 200, as other answers are among the errors of a browser's console
            return self._html("refusal.html.j2", request, text=str(error))
        status = STATUS.get(error.status, 500)
        return self._html("error.html.j2", request, status=status, text=str(error), reader=self._views.reader)

    async def _live(self, template: str, request: Request, look: Look) -> Response:
        """Return a page, or the stream of what changes in it."""
        if request.url.path.endswith("/live"):
            return EventSourceResponse(self._changes(template, look))
        query = f"?{request.url.query}" if request.url.query else ""
        stream = f"{request.url.path.rstrip('/')}/live{query}"

        def page() -> Response:
            context = look(whole=False)
            with context["lock"]:
                return self._html(template, request, stream=stream, **context)

        return await run_in_threadpool(page)

    async def _changes(self, template: str, look: Look) -> AsyncIterator[dict[str, str]]:
        """Yield the parts of a page that are others than they were; first all of them."""
        shown: dict[str, str] = {}
        while True:
            parts = await run_in_threadpool(self._parts, template, look)
            news = [_swap(name, part) for name, part in parts.items() if shown.get(name) != part]
            shown |= parts
            if news:
                yield {"data": "\n".join(news)}
            await asyncio.sleep(LOOK_S)

    def _parts(self, template: str, look: Look) -> dict[str, str]:
        """Render the live blocks of a template; what hinders that is itself one."""
        made = self._templates.get_template(template)
        try:
            values = look()
        except OffsiteError as error:
            return {"trouble": self._templates.get_template("refusal.html.j2").render(text=str(error))}
        with values["lock"]:
            context = made.new_context(values)
            live = {name: block for name, block in made.blocks.items() if name.startswith(LIVE)}
            parts = {name.removeprefix(LIVE): "".join(block(context)) for name, block in live.items()}
        return parts | {"trouble": ""}

    def _html(self, template: str, request: Request, *, status: int = 200, **context: Any) -> HTMLResponse:
        context |= {"forms": request.scope.get("form_token", ""), "here": request.url.path}
        return HTMLResponse(self._templates.get_template(template).render(context), status)


def _swap(name: str, part: str) -> str:
    return f'<hx-partial hx-target="#{name}" hx-swap="innerMorph">{part}</hx-partial>'


def ago(at: float | None, now: float) -> str:
    """Say how long ago something was, in one unit, and no finer than a page should change."""
    if not at:
        return "never"
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if now - at >= 2 * seconds:
            return f"{(now - at) // seconds:.0f} {unit} ago"
    return f"{(now - at) // 10:.0f}0 s ago" if now - at >= 10 else "just now"


def size(count: float) -> str:
    """Write bytes in the unit that suits them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count:.0f} B"
