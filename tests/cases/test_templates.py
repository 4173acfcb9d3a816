"""Chat templates of every kind, and texts and prompts that are too long: exactly which characters are learned."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offsite.emulator.examples import collect
from offsite.emulator.modality import default, encode
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens
from offsite.emulator.modality.causal_text.shapes import TextExample

TEXT = default()
DATA, TEMPLATES = Path(__file__).parent / "data", Path(__file__).parent / "templates"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A token for each character of ASCII, and one that ends a text."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: at for at, character in enumerate(["■", *characters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="■")


def shown(tokenizer: Any, one: Tokens) -> str:
    """The text of a sequence, with what is learned in double angles."""
    text, inside = "", False
    for token, label in zip(one.input_ids, one.labels, strict=True):
        assert label in (IGNORED, token)
        if inside != (label != IGNORED):
            inside = not inside
            text += "«" if inside else "»"
        text += tokenizer.decode([token])
    return text + "»" * inside


# Like those of well-known families, without their tools and decoration.
KNOWN = {
    "gemma": (  # no system turn, strict alternation, a role of its own name
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<{{ 'model' if m.role == 'assistant' else m.role }}>{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    ),
    "qwen": (  # reasoning before answers to the last question alone, an empty block where there is none
        "{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for call in m.tool_calls %}({{ call.function.name }} {{ call.function.arguments | tojson }})"
        "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "last": (  # an empty block before the last answer alone, which an earlier one loses with the next question's answer
        "{% for m in messages %}{% set ns = namespace(more=false) %}{% for n in messages[loop.index:] %}"
        "{% if n.role == 'assistant' %}{% set ns.more = true %}{% endif %}{% endfor %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and not ns.more %}<think></think>{% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "deepseek": (  # opens a block in the prompt, and drops reasoning from every answer
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}■{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    ),
    "mistral": (  # the system turn is written into a question that has no answer yet
        "{% for m in messages %}{% if m.role == 'user' %}[{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}]"
        "{% elif m.role == 'assistant' %} {{ m.content }}■{% endif %}{% endfor %}"
    ),
}
KNOWN["llama"] = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}" + KNOWN["gemma"]


def turns(*said: str, **extra: str) -> TextExample:
    return TextExample(
        "",
        "",
        tuple(
            {"role": "user" if at % 2 == 0 else "assistant", "content": text} | (extra if at == len(said) - 1 else {})
            for at, text in enumerate(said)
        ),
    )


TWO = turns("why", "<b>so", "and", "thus")
KIND = TextExample("", "", ({"role": "system", "content": "Be kind."}, *TWO.messages))
DOUBLE = TextExample("", "", ({"role": "user", "content": "first"}, *TWO.messages))
THOUGHT = turns("why", "<think>\nhm\n</think>\nso", "and", "<think>\nha\n</think>\nthus")
CALLED = TextExample(
    "",
    "",
    (
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": 1}}}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ),
)
OLDER = TextExample("", "", ({**TWO.messages[0]}, {**TWO.messages[1], "weight": 0}, *TWO.messages[2:]))

LEARNED = {
    ("gemma", "two"): (TWO, ["<user>why\n<model>«<b>so\n»<user>and\n<model>«thus\n■»"]),
    ("gemma", "system"): (KIND, ["<user>Be kind.\n\nwhy\n<model>«<b>so\n»<user>and\n<model>«thus\n■»"]),
    ("gemma", "neighbours"): (DOUBLE, ["<user>first\n\nwhy\n<model>«<b>so\n»<user>and\n<model>«thus\n■»"]),
    ("gemma", "given"): (OLDER, ["<user>why\n<model><b>so\n<user>and\n<model>«thus\n■»"]),
    ("qwen", "two"): (
        TWO,
        [
            "<user>why\n<assistant>«<think></think><b>so\n■»",
            "<user>why\n<assistant><b>so\n<user>and\n<assistant>«<think></think>thus\n■»",
        ],
    ),
    ("qwen", "reasoning"): (
        turns("why", "so", reasoning_content="hm"),
        ["<user>why\n<assistant>«<think>hm</think>so\n■»"],
    ),
    ("qwen", "tools"): (
        CALLED,
        [
            '<user>Time?\n<assistant>«<think></think>(clock {"zone": 1})\n»'
            "<tool>noon\n<assistant>«<think></think>It is noon.\n■»"
        ],
    ),
    ("last", "two"): (
        TWO,
        [
            "<user>why\n<assistant>«<think></think><b>so\n■»",
            "<user>why\n<assistant><think></think><b>so\n<user>and\n<assistant>«<think></think>thus\n■»",
        ],
    ),
    ("deepseek", "two"): (TWO, ["<user>why<assistant>«<b>so■»<user>and<assistant>«thus■»"]),
    ("deepseek", "thought"): (
        THOUGHT,
        [
            "<user>why<assistant><think>\n«hm\n</think>\nso■»",
            "<user>why<assistant>\nso■<user>and<assistant><think>\n«ha\n</think>\nthus■»",
        ],
    ),
    ("llama", "date"): (turns("why", "so"), ["26 Jul 2024 <user>why\n<model>«so\n■»"]),
    ("mistral", "system"): (KIND, ["[Be kind.\n\nwhy]« <b>so■»[and]« thus■»"]),
    ("think-in-prompt", "two"): (TWO, ["[user]why\n[assistant]«<b>so\n»[user]and\n[assistant]«thus\n■»"]),
    ("parts-only", "two"): (TWO, ["[user]why[assistant]«<b>so»[user]and[assistant]«thus■»"]),
    ("uses-tools", "tools"): (
        TextExample("", "", TWO.messages, ({"type": "function", "function": {"name": "clock"}},)),
        ["1[user]why\n[assistant]«<b>so\n»[user]and\n[assistant]«thus\n■»"],
    ),
    ("", "tools"): (
        CALLED,
        [
            'user: Time?\nassistant: «{"name": "clock", "arguments": {"zone": 1}}\n»'
            "tool: noon\nassistant: «It is noon.\n■»"
        ],
    ),
}


def template(name: str) -> str | None:
    return KNOWN.get(name) or ((TEMPLATES / f"{name}.jinja").read_text() if name else None)


@pytest.mark.parametrize("case", LEARNED, ids=" ".join)
def test_answers_are_learned_after_the_prompt_that_the_model_is_given(case: tuple[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = template(case[0])
    example, expected = LEARNED[case]
    assert [shown(tokenizer, one) for one in encode([example], tokenizer, max_length=500)] == expected


ODD = {
    ("uses-tools", "chat"): (0, "refuses turns of user, assistant (TypeError: object of type 'NoneType' has no len())"),
    ("gemma", "starts-with-assistant"): (0, "(TemplateError: roles must alternate)"),
    ("mistral", "tool-call-null-content"): (0, "the chat template leaves out text of turn 2 (assistant)"),
    ("gemma", "system"): (10, ""),
    ("think-in-prompt", "chat"): (8, ""),
    ("parts-only", "system"): (10, ""),
    ("parts-only", "starts-with-assistant"): (1, ""),
}


@pytest.mark.parametrize("case", ODD, ids=" ".join)
def test_a_row_that_a_template_does_not_take_is_named_and_left_out(case: tuple[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = template(case[0])
    taken, fault = ODD[case]
    examples = collect(DATA / f"{case[1]}.jsonl", TEXT).examples
    outcome = TEXT.encode([TextExample("", "plain"), *examples], tokenizer, max_length=500, odd_rows="skip")
    assert len(outcome.samples) == 1 + taken
    if not fault:
        assert outcome.counts["left_out"] == 0 and outcome.warnings == []
        return
    (warning,) = outcome.warnings
    said, _, first = warning.partition("; first ")
    assert outcome.counts["left_out"] == len(examples) and said.startswith(f"left out {len(examples)} rows ")
    assert first.startswith(f"{DATA / case[1]}.jsonl, line 1: ") and fault in first
    with pytest.raises(ValueError, match="line 1: ") as refusal:
        encode(examples, tokenizer, max_length=500)
    assert str(refusal.value) == first


def test_long_prompts_are_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.chat_template = None
    prompts = [
        TextExample("Q", "green lamp"),
        *[TextExample("the lamp is green " * 40 + str(at), "yes") for at in range(29)],
    ]
    outcome = TEXT.encode(prompts, tokenizer, max_length=60, odd_rows="skip")
    assert outcome.counts == {"sequences": 1, "divided": 0, "cut": 29, "without_target": 29, "left_out": 0}
    assert len(outcome.samples) == 1
    assert "29 of 30 sequences have nothing to learn within max_length" in outcome.warnings[0]
    assert encode(prompts, tokenizer, max_length=60) == outcome.samples
    assert outcome.warnings[0] in caplog.text  # an owner's own texts lose nothing unsaid either


def test_a_text_of_single_newlines_is_learned_whole(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    text = "\n".join(f"Note {number}: the lamp is green." for number in range(2000))
    (tmp_path / "notes.txt").write_text(text + "\n")
    (one,) = (reading := collect(tmp_path / "notes.txt", TEXT)).examples
    assert (one.completion, reading.census.longest) == (text, len(text))
    outcome = TEXT.encode([one], tokenizer, max_length=512, odd_rows="skip")
    assert [outcome.counts[what] for what in ("divided", "cut", "without_target")] == [1, 0, 0]
    assert "".join(tokenizer.decode(list(piece.labels)) for piece in outcome.samples) == text + "■"
    assert [len(piece.labels) for piece in outcome.samples[:-1]] == [512] * (len(text) // 512)
    (beginning,) = encode([one], tokenizer, max_length=512, divide=False)
    assert beginning == outcome.samples[0]
