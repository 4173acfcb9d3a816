"""What is asked for: the fields of OpenAI's API that are known here. Others are refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TEXT = 1 << 20  # characters of a text
Text = Field(max_length=TEXT)


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of requests have. Fields of one value are those that clients send without meaning them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = Field(default=None, max_length=4096)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts before which an answer ends."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in listed if text)


class Completion(Body):
    """A text to go on with, or its tokens."""

    prompt: str | list[int] = Text
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None


class Chat(Body):
    """A conversation to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
