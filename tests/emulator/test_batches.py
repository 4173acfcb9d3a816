from itertools import chain
from typing import Any

import pytest
import torch

from offsite.emulator.batches import evaluation_batches, schedule, training_batches
from offsite.emulator.modality import collate, encode
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


def test_a_batch_is_padded_to_its_longest_and_counts_what_is_predicted() -> None:
    batch = collate([Tokens((5, 6, 7), (5, 6, 7)), Tokens((8,) * 5, (IGNORED,) * 3 + (8, 8))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8] * 5]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.labels.tolist() == [[5, 6, 7, IGNORED, IGNORED], [IGNORED] * 3 + [8, 8]]
    assert batch.targets == 2 + 2  # a first token is never predicted


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (2, 5), (8, 4)])
def test_rounds_continue_one_endless_sequence_of_permutations(count: int, batch_size: int) -> None:
    def steps(first: int, number: int) -> list[list[int]]:
        return schedule(count, batch_size=batch_size, steps=number, first_step=first, seed=3)

    whole = steps(0, 12)
    assert steps(0, 4) + steps(4, 4) + steps(8, 4) == whole
    flat = list(chain(*whole))
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    assert flat[:count] != flat[count : 2 * count] or count == 2
    assert schedule(count, batch_size=batch_size, steps=12, first_step=0, seed=4) != whole


def test_training_batches_follow_the_schedule() -> None:
    encoded = [Tokens((token, token), (token, token)) for token in range(10, 17)]
    batches = training_batches(encoded, batch_size=3, steps=2, first_step=5, seed=1)
    rows = schedule(7, batch_size=3, steps=2, first_step=5, seed=1)
    assert [batch.input_ids[:, 0].tolist() for batch in batches] == [[10 + row for row in step] for step in rows]


def test_evaluation_batches_hold_everything_in_order_of_length() -> None:
    encoded = [Tokens((length,) * length, (length,) * length) for length in (5, 2, 4, 2, 3)]
    batches = evaluation_batches(encoded, batch_size=2)
    assert [batch.input_ids.shape for batch in batches] == [(2, 2), (2, 4), (1, 5)]
    assert sum(batch.targets for batch in batches) == sum(length - 1 for length in (5, 2, 4, 2, 3))
    assert batches[0].input_ids.dtype == torch.int64
