"""From a row to an example: which columns hold what is to be learned, in the shapes that people have."""

import json
from dataclasses import dataclass, field
from typing import Any

from offsite.emulator.examples.fault import NO_SHAPE, Fault, quoted, strange_columns

Turn = dict[str, Any]

SHAPES = (
    '{"text"}, {"prompt", "completion"}, {"instruction", "input", "output"}, or {"messages" or "conversations": '
    '[{"role", "content"} or {"from", "value"}, ...]}'
)
COLUMNS = (
    *("text", "prompt", "completion", "instruction", "input", "output"),
    *("messages", "conversations", "system", "tools"),
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
EXTRAS = ("reasoning_content", "thinking", "name", "tool_call_id")  # what templates read of a turn beside its content

NO_TEXT = "rows with something else than text"
EMPTY = "rows with nothing to learn"
HALF = "rows with half a character, or bytes that are not UTF-8"
ROLE = "rows with an unknown role"


@dataclass(frozen=True)
class TextExample:
    """One example: a completion to learn after a prompt, or a conversation. A plain text is a completion alone.

    A turn is {"role", "content"}, with "weight": 0 where an answer is not to be learned, and "tool_calls" and the like
    where it has them.
    """

    prompt: str
    completion: str
    messages: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    place: str = field(default="", compare=False, repr=False)  # file and line

    @property
    def row(self) -> dict[str, Any]:
        """The example as a row that is read as the same."""
        if self.messages:
            return {"messages": list(self.messages)} | ({"tools": list(self.tools)} if self.tools else {})
        if self.prompt:
            return {"prompt": self.prompt, "completion": self.completion}
        return {"text": self.completion}

    @property
    def asked(self) -> str:
        """The prompt, or the turns before the last answer to learn."""
        if not self.messages:
            return self.prompt
        last = max(at for at, turn in enumerate(self.messages) if learned(turn))
        return "\n".join(turn["content"] for turn in self.messages[:last])

    @property
    def characters(self) -> int:
        """How long it is."""
        return len(self.prompt) + len(self.completion) + sum(len(turn["content"]) for turn in self.messages)


def example(row: dict[str, Any], place: str) -> TextExample:
    """Tell the shape of a row by its columns that are not null; raises Fault."""
    cells = {column: value for column, value in row.items() if value is not None and value == value}  # NaN is not
    for column in ("messages", "conversations"):
        if column in cells:
            return TextExample("", "", _conversation(_turns(cells[column], column), cells), _tools(cells), place)
    if "prompt" in cells and "completion" in cells:
        prompt, completion = cells["prompt"], cells["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            turns = [
                turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in _as_turns(prompt, "user")
            ]
            turns += _as_turns(completion, "assistant")
            return TextExample("", "", _conversation(turns, cells), _tools(cells), place)
        return TextExample(_text(prompt, "prompt"), _text(completion, "completion", filled=True), place=place)
    if "instruction" in cells and "output" in cells:
        parts = [_text(cells.get(column, ""), column) for column in ("instruction", "input")]
        answer = _text(cells["output"], "output", filled=True)
        return TextExample("\n\n".join(part for part in parts if part.strip()), answer, place=place)
    if "text" in cells:
        return TextExample("", _text(cells["text"], "text", filled=True), place=place)
    raise strange_columns(row, SHAPES)


def _text(value: Any, column: str, *, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise Fault(NO_TEXT, f"{column!r} must be a text, found {type(value).__name__}")
    if filled and not value.strip():
        raise Fault(EMPTY, f"{column!r} is empty; there is nothing to learn from it")
    return _whole(value, column)


def _whole(value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        shown = quoted(value[max(0, error.start - 20) : error.start + 20])
        raise Fault(HALF, f"{column!r} holds half a character, or bytes that are not UTF-8, at {shown}") from None
    return value


def _as_turns(value: Any, role: str) -> list[Turn]:
    return [{"role": role, "content": _text(value, role)}] if isinstance(value, str) else _turns(value, role)


def _turns(value: Any, column: str) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Fault(NO_SHAPE, f"{column!r} must be a list of {{'role', 'content'}}")
    return [_turn({key: part for key, part in turn.items() if part is not None}) for turn in value]


def _turn(turn: Turn) -> Turn:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise Fault(ROLE, f"a message's role must be one of {', '.join(ROLES)}; found {quoted(role)}")
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if content is None and calls:
        content = ""  # not null, which templates write as a word
    plain: Turn = {"role": ROLES[role], "content": _text(content, "content")}
    for key in EXTRAS:
        if key in turn:
            plain[key] = _text(turn[key], key)
    if calls:
        plain["tool_calls"] = _calls(calls)
    if turn.get("weight") == 0:
        plain["weight"] = 0
    return plain


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise Fault(NO_TEXT, f"a content part must be {{'type': 'text', 'text'}}, found {quoted(kind)}")
    return str(part["text"])


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as templates want them, with arguments that are an object, not JSON in a text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Fault(NO_SHAPE, "'tool_calls' must be a list of {'function': {'name', 'arguments'}}")
    plain = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault(NO_SHAPE, "a tool call must be {'function': {'name', 'arguments'}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise Fault(NO_TEXT, f"a tool call's arguments are not JSON: {quoted(arguments)}") from None
        _whole(json.dumps([function["name"], arguments], ensure_ascii=False), "tool_calls")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        plain.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | named)
    return plain


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):  # a list in a text, as columns of one type need it
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError):
            raise Fault(NO_TEXT, "'tools' is a text, but not JSON") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault(NO_SHAPE, "'tools' must be a list of objects that describe functions")
    _whole(json.dumps(tools, ensure_ascii=False), "tools")
    return tuple(tools)


def _conversation(turns: list[Turn], row: dict[str, Any]) -> tuple[Turn, ...]:
    if isinstance(row.get("system"), str) and row["system"].strip() and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": _text(row["system"], "system")}, *turns]
    if not any(turn["role"] == "assistant" and learned(turn) for turn in turns):
        raise Fault(EMPTY, "the conversation needs a turn of the assistant to learn from")
    return tuple(turns)


def learned(turn: Turn) -> bool:
    """Tell whether a turn is an answer to learn from."""
    content = turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content")
    return turn["role"] == "assistant" and turn.get("weight") != 0 and bool(content)
