from typing import Any

import pytest

from offsite.emulator.modality import encode
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens
from offsite.emulator.modality.causal_text.shapes import TextExample

TURNS = (
    {"role": "system", "content": "w3"},
    {"role": "user", "content": "w4 w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w8 w9"},
)


def words(tokenizer: Any, one: Tokens) -> tuple[str, str]:
    """The whole sequence, and of it what is learned."""
    learned = [label for label in one.labels if label != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(one.input_ids, one.labels, strict=True))
    return tokenizer.decode(list(one.input_ids)), tokenizer.decode(learned)


def test_a_text_is_learned_whole(tokenizer: Any) -> None:
    (one,) = encode([TextExample("", "w4 w5")], tokenizer, max_length=10)
    assert words(tokenizer, one) == ("<s> w4 w5 </s>", "w4 w5 </s>")


def test_of_a_prompt_and_its_completion_only_the_completion_is_learned(tokenizer: Any) -> None:
    (one,) = encode([TextExample("w4 w5", "w6")], tokenizer, max_length=10)
    assert words(tokenizer, one) == ("<s> w4 w5 w6 </s>", "w6 </s>")


def test_a_conversation_without_a_template_names_its_speakers(tokenizer: Any) -> None:
    (one,) = encode([TextExample("", "", TURNS[1:3])], tokenizer, max_length=20)
    assert words(tokenizer, one) == ("<s> user : w4 w5 assistant : w6 </s>", "w6 </s>")


def test_the_chat_template_is_used_and_every_turn_of_the_assistant_is_learned(chat: Any) -> None:
    (one,) = encode([TextExample("", "", TURNS)], chat, max_length=50)
    whole, learned = words(chat, one)
    assert whole == ("<s> system : w3 </s> user : w4 w5 </s> assistant : w6 </s> user : w7 </s> assistant : w8 w9 </s>")
    assert learned == "w6 </s> w8 w9 </s>"


def test_with_a_template_a_prompt_is_a_user_turn_and_a_text_stays_a_text(chat: Any) -> None:
    asked, plain = encode([TextExample("w4", "w5"), TextExample("", "w5")], chat, max_length=20)
    assert words(chat, asked) == ("<s> user : w4 </s> assistant : w5 </s>", "w5 </s>")
    assert words(chat, plain) == ("<s> w5 </s>", "w5 </s>")


def test_what_a_template_writes_differently_later_is_learned_after_the_prompt_of_its_time(chat: Any) -> None:
    last = "turn['content'] if loop.last or turn.role != 'assistant' else 'w80'"
    chat.chat_template = chat.chat_template.replace("turn['content']", last)
    first, last = encode([TextExample("", "", TURNS)], chat, max_length=50)
    assert words(chat, first) == ("<s> system : w3 </s> user : w4 w5 </s> assistant : w6 </s>", "w6 </s>")
    whole, learned = words(chat, last)
    assert whole == "<s> system : w3 </s> user : w4 w5 </s> assistant : w80 </s> user : w7 </s> assistant : w8 w9 </s>"
    assert learned == "w8 w9 </s>"


def test_turns_the_template_refuses_are_named(chat: Any) -> None:
    chat.chat_template = "{{ raise_exception('no turns') }}"
    odd = TextExample("", "", TURNS, place="a.jsonl, line 3")
    with pytest.raises(ValueError, match="line 3: .* refuses turns of system, user, assistant, .*: no turns"):
        encode([odd], chat, max_length=50)


def test_what_has_no_target_left_after_cutting_is_dropped(tokenizer: Any) -> None:
    examples = [TextExample("w4 w5 w6 w7", "w8"), TextExample("w4", "w5 w6")]
    (one,) = encode(examples, tokenizer, max_length=4)
    assert words(tokenizer, one) == ("<s> w4 w5 w6", "w5 w6")
    with pytest.raises(ValueError, match="none of the 2 examples has a token to learn within its first 2 tokens"):
        encode(examples, tokenizer, max_length=2)
