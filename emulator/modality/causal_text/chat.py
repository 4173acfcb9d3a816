"""Conversations as a tokenizer's chat template writes them, cut into what a model is given and what it answers."""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from os.path import commonprefix
from typing import Any

from offsite.emulator.examples import Fault
from offsite.emulator.modality.causal_text.shapes import TextExample, Turn, learned

DAY = date(2024, 7, 26)  # which the templates of Llama write where they have no clock

REFUSED = "rows that the chat template refuses"
LOST = "rows of which the chat template leaves out text"
MIXED = "rows whose answer cannot be told from the rest"

Pieces = list[tuple[str, bool]]  # stretches of text, each with whether it is to be learned


def pieces(example: TextExample, tokenizer: Any) -> list[Pieces]:
    """Write a prompt with its completion, or a conversation, as one sequence or, if need be, one an answer.

    What is learned of an answer is what the template writes after the prompt that it would give to the model. The
    template is given the turns as they are, with contents in parts, and with a system turn and neighbours of the user
    as one turn, whatever it takes first without losing text. Raises Fault if it takes none.
    """
    turns = list(example.messages) or [
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.completion},
    ]
    faults = []
    for form, in_parts in _forms(turns):
        try:
            return _Rendered(form, example.tools, tokenizer, in_parts=in_parts).pieces()
        except Fault as fault:
            faults.append(fault)
    raise faults[0]


def untemplated(turns: Sequence[Turn]) -> Pieces:
    """Write a conversation for a tokenizer without a chat template: each turn on lines of its own, with its speaker."""
    written: Pieces = []
    for turn in turns:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
        text = "\n".join(part for part in (turn["content"], *calls) if part)
        written += [(f"{turn['role']}: ", False), (f"{text}\n", learned(turn))]
    return written


def _forms(turns: list[Turn]) -> Iterator[tuple[list[Turn], bool]]:
    yield turns, False
    yield turns, True
    joined: list[Turn] = []
    for turn in turns:
        if turn["role"] == "user" and joined and joined[-1]["role"] in ("system", "user"):
            joined[-1] = turn | {"content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    if len(joined) < len(turns):
        yield joined, False
        yield joined, True


class _Rendered:
    """One form of a conversation under one template."""

    def __init__(self, turns: list[Turn], tools: Sequence[Turn], tokenizer: Any, *, in_parts: bool) -> None:
        self._turns, self._tools, self._tokenizer = turns, list(tools) or None, tokenizer
        self._in_parts = in_parts
        self._given = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        if in_parts:
            for turn in self._given:
                turn["content"] = [{"type": "text", "text": turn["content"]}]

    def pieces(self) -> list[Pieces]:
        """Find the answers; raises Fault if text is lost, or if they cannot be told from the rest."""
        whole = self._write(len(self._turns))
        self._check(whole)
        if self._in_parts and any(part in _squashed(whole) for part in ("'type':'text'", '"type":"text"')):
            raise Fault(REFUSED, "the tokenizer's chat template does not read contents in parts")
        # An opening turn of the assistant answers nobody: it is given, not learned.
        answers = [self._answer(index) for index, turn in enumerate(self._turns) if index and learned(turn)]
        if not answers:
            raise Fault(MIXED, "the only turn of the assistant comes before any question")
        if not all(whole.startswith(prompt + answer) for prompt, answer in answers):
            # The template writes earlier answers differently, as those that drop their reasoning do. Each answer is
            # learned after the very prompt that the model would be given for it.
            return [[(prompt, False), (answer, True)] for prompt, answer in answers]
        one: Pieces = []
        done = 0
        for prompt, answer in answers:
            one += [(prompt[done:], False), (answer, True)]
            done = len(prompt) + len(answer)
        return [[*one, (whole[done:], False)] if done < len(whole) else one]

    def _write(self, count: int, *, prompt: bool = False) -> str:
        try:
            template = _on_one_day(self._tokenizer.get_chat_template(tools=self._tools))
            return str(
                self._tokenizer.apply_chat_template(
                    self._given[:count],
                    tools=self._tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:  # a template is a program of whoever made the model, and fails in any way
            roles = ", ".join(turn["role"] for turn in self._turns[:count])
            why = f"{type(error).__name__}: {error}"[:200]
            raise Fault(REFUSED, f"the tokenizer's chat template refuses turns of {roles[:200]} ({why})") from None

    def _answer(self, index: int) -> tuple[str, str]:
        """Return what the model would be given for a turn, and what the template writes after it."""
        turn = self._turns[index]
        content = turn["content"].strip()
        prompt, before, answered = self._write(index, prompt=True), self._write(index), self._write(index + 1)
        parts = _parted(prompt, before, answered, content)
        if parts is None:
            raise Fault(
                MIXED, f"the chat template writes turn {index + 1} so that nothing tells its answer from the rest"
            )
        texts = [content, turn.get("reasoning_content", turn.get("thinking", ""))]
        texts += [call["function"]["name"] for call in turn.get("tool_calls", ())]
        if all(_squashed(text) in _squashed(parts[1]) for text in texts):
            return parts
        opened = prompt[len(commonprefix([prompt, answered])) :].strip()
        if opened and content.startswith(opened):  # a reasoning block, which the template would leave out
            return prompt, content.removeprefix(opened).lstrip()
        raise Fault(LOST, f"the chat template leaves out text of turn {index + 1} ({turn['role']})")

    def _check(self, whole: str) -> None:
        """Raise Fault if what is said to the model does not stand in the text, in its order."""
        text, place = _squashed(whole), 0
        for index, turn in enumerate(self._turns):
            words = _squashed(turn["content"])
            if turn["role"] == "assistant":
                continue  # earlier reasoning may be left out; what is learned is looked at by itself
            start = 0 if turn["role"] == "system" else place  # which some templates write into a later turn
            at = text.find(words, start)
            if at < 0:  # as JSON, in which some templates write what a tool gave
                words = _squashed(json.dumps(turn["content"], ensure_ascii=False)[1:-1])
                at = text.find(words, start)
            if at < 0:
                raise Fault(LOST, f"the chat template leaves out text of turn {index + 1} ({turn['role']})")
            place = at + len(words) if turn["role"] != "system" else place


def _parted(prompt: str, before: str, answered: str, content: str) -> tuple[str, str] | None:
    """Part a conversation that ends with an answer into what precedes the answer and the answer.

    `prompt` is the conversation without the answer but with the header of one, `before` without either.
    """
    if answered.startswith(prompt):
        return prompt, answered[len(prompt) :]
    history = len(commonprefix([prompt, before]))
    header = prompt[history:]
    place = answered.rfind(content) if content else -1
    place = place if place > history else len(answered)
    shared = len(commonprefix([prompt, answered]))
    if shared >= history:  # the header opens something, as for reasoning, that an answer does not have
        return answered[: min(shared, place)], answered[min(shared, place) :]
    start = answered.rfind(header, 0, place) if header else -1  # the history is written differently by now
    return (prompt, answered[start + len(header) :]) if start >= 0 else None


def _on_one_day(template: str) -> str:
    """Have a template that writes the date write the same one always, so that the same rows give the same tokens."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(DAY.strftime(call[2])), template)


def _squashed(text: str) -> str:
    return "".join(text.split())
