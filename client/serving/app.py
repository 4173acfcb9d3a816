"""The routes of OpenAI's API that are served: models, completions and chat, whole or as a stream."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from offsite.client.serving.bodies import Body, Chat, Completion
from offsite.client.serving.speech import Speech
from offsite.emulator.modality.causal_text.encoding import opening
from offsite.emulator.modality.causal_text.shapes import example
from offsite.emulator.serving import engine
from offsite.emulator.serving.engine import Busy, Engine, Piece
from offsite.emulator.serving.shelf import Shelf
from offsite.protos.documents import nearest
from offsite.protos.errors import NotFoundError

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)

BYTES = 4 << 20  # of a request
FEW = 16  # tokens of a completion that does not say how many, as OpenAI has it
STATUS = {NotFoundError: 404, Busy: 429, ValueError: 400}


@dataclass(frozen=True)
class Bearer:
    """Lets through what bears a token, which no other user of this machine and no page in a browser knows."""

    app: ASGIApp
    token: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            given = Request(scope).headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                refusal = _error("send the token that is printed at the start, as 'Authorization: Bearer ...'", 401)
                return await refusal(scope, receive, send)
        await self.app(scope, receive, send)


@dataclass
class Answer:
    """An answer on its way, and what came of it so far."""

    body: Body
    request: engine.Request
    speech: Speech
    pieces: asyncio.Queue[Piece | Exception]
    end: str = ""
    tokens: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: int = field(default_factory=lambda: int(time.time()))

    async def texts(self) -> AsyncIterator[str]:
        """Yield its text as it comes, until `end` says why there is no more; raises why there is none."""
        try:
            while not self.end:
                piece = await self.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                self.tokens, self.end = self.tokens + 1, piece.end
                text = self.speech.take(None if self.end == "stop" else piece.token)
                if self.end == "length":
                    text += self.speech.take(None)
                if self.speech.over:
                    self.end = "stop"
                yield text
        finally:
            self.request.over = True

    def document(self, text: str) -> dict[str, Any]:
        """Return a text of it as OpenAI has that."""
        if isinstance(self.body, Chat):
            kind, name = ("chat.completion.chunk", "delta") if self.body.stream else ("chat.completion", "message")
            said: dict[str, Any] = {name: {"role": "assistant", "content": text}}
        else:
            kind, said = "text_completion", {"text": text, "logprobs": None}
        choice = {"index": 0, "finish_reason": self.end or None} | said
        return {"id": self.id, "object": kind, "created": self.at, "model": self.body.model, "choices": [choice]}

    @property
    def usage(self) -> dict[str, int]:
        """What OpenAI would charge."""
        given = len(self.request.prompt)
        return {"prompt_tokens": given, "completion_tokens": self.tokens, "total_tokens": given + self.tokens}


class Service:
    """Has an engine answer with a base, named `base`, or what is on a shelf; `most` bounds the tokens of an answer."""

    def __init__(self, engine: Engine, shelf: Shelf | None, tokenizer: Any, *, base: str, most: int) -> None:
        self._engine, self._shelf, self._tokenizer = engine, shelf, tokenizer
        self._base, self._most, self._at = base, most, int(time.time())

    def app(self, token: str) -> Starlette:
        """Return the application, for those who have a token."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        faults = {kind: self.refusal for kind in (*STATUS, Exception)}
        return Starlette(routes=routes, middleware=[Middleware(Bearer, token=token)], exception_handlers=faults)

    async def models(self, request: Request) -> Response:
        """List the base and the adapters."""
        listed = [
            {"id": name, "object": "model", "created": self._at, "owned_by": "offsite"}
            | ({"parent": self._base} if name != self._base else {})
            for name in self.names()
        ]
        return JSONResponse({"object": "list", "data": listed})

    def names(self) -> list[str]:
        """Return what can be asked for as a model."""
        return [self._base, *(self._shelf.names() if self._shelf else ())]

    async def complete(self, request: Request) -> Response:
        """Go on with a text."""
        body = await _read(Completion, request)
        size = self._engine.vocabulary
        if isinstance(body.prompt, str):
            prompt = self._tokenizer(body.prompt).input_ids
        elif all(0 <= token < size for token in body.prompt):
            prompt = body.prompt
        else:
            raise ValueError(f"prompt: a token must be from 0 to {size - 1}")
        answer = self._ask(body, prompt, body.max_tokens or FEW)
        return await _send(request, answer)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, written as it is for training."""
        body = await _read(Chat, request)
        turns = example({"prompt": body.messages, "completion": "."}, "messages")
        prompt = opening(turns, self._tokenizer)
        answer = self._ask(body, prompt, body.max_completion_tokens or body.max_tokens)
        return await _send(request, answer)

    def _ask(self, body: Body, prompt: Sequence[int], most: int | None) -> Answer:
        """Hand a request to the engine; raises NotFoundError, Busy and ValueError."""
        folders = self._shelf.folders(body.model) if self._shelf and body.model != self._base else ()
        if body.model != self._base and not folders:
            raise NotFoundError(f"there is no model {body.model!r}; {nearest(body.model, self.names())}")
        if most and most > self._most:
            raise ValueError(f"max_tokens: {most} is more than {self._most}, which --max-tokens allows")
        room = self._engine.context - len(prompt)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()

        def tell(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        asked = engine.Request(
            prompt,
            folders,
            most or max(1, min(self._most, room)),
            tell,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            seed=body.seed,
        )
        self._engine.submit(asked)
        before = () if isinstance(body, Chat) else prompt  # a turn begins a text of its own
        return Answer(body, asked, Speech(self._tokenizer, before, body.stops), pieces)

    async def refusal(self, request: Request, error: Exception) -> Response:
        """Say why there is no answer, as OpenAI's clients read it."""
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
        return _error(str(error) or type(error).__name__, status)


async def _read(kind: type[B], request: Request) -> B:
    """Read a request; raises ValueError that names the field."""
    text = b""
    async for part in request.stream():
        text += part
        if len(text) > BYTES:
            raise ValueError(f"the request has more than {BYTES:,} bytes")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        why = "is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        raise ValueError(f"{where}: {why}") from None


async def _send(request: Request, answer: Answer) -> Response:
    """Send an answer whole, or as a stream of its parts."""
    if answer.body.stream:
        return EventSourceResponse(_parts(answer))
    said = ""
    async for text in answer.texts():
        said += text
        if await request.is_disconnected():
            break
    return JSONResponse(answer.document(said) | {"usage": answer.usage})


async def _parts(answer: Answer) -> AsyncIterator[str]:
    options = answer.body.stream_options
    try:
        async for text in answer.texts():
            if text or answer.end:
                yield json.dumps(answer.document(text))
        if options and options.include_usage:
            yield json.dumps(answer.document("") | {"choices": [], "usage": answer.usage})
    except Exception as error:  # the status has been sent
        yield json.dumps(_fault(str(error), 500))
    yield "[DONE]"


def _fault(message: str, status: int) -> dict[str, Any]:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    what = kind.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": what, "param": None, "code": None}}


def _error(message: str, status: int) -> JSONResponse:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse(_fault(message, status), status, headers=headers.get(status))
