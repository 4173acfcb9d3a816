"""What the documents name is there: links, headings, commands and their options, and the code in them parses."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from offsite import client
from offsite.client.cli import GROUPS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md") for path in ROOT.glob(pattern) if path.is_file()
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\boffsite(?! +offsite)((?: +[a-z][a-z-]*)+)((?:[^\n`|&;>]|\\\n)*)")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return FENCE.sub("", text(name))


def headings(path: Path) -> set[str]:
    """Return the anchors that a forge makes of a document's headings."""
    lines = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.replace("`", "").lower()).replace(" ", "-") for line in lines}


def blocks(name: str, *languages: str) -> Iterator[str]:
    for _, language, body in FENCE.findall(text(name)):
        if language in languages:
            yield body


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in LINK.findall(prose(name)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in headings(target), f"{link}: no such heading; there are {headings(target)}"


@pytest.mark.parametrize("name", NAMES)
def test_toml_and_python_in_a_document_parse(name: str) -> None:
    for body in blocks(name, "toml"):
        tomllib.loads(body)
    for body in blocks(name, "python"):
        ast.parse(body)


@pytest.fixture(scope="module")
def commands() -> dict[tuple[str, ...], set[str]]:
    """The options of every command, by the words that call it."""
    options: dict[tuple[str, ...], set[str]] = {}

    def add(words: tuple[str, ...], command: Any) -> None:
        if isinstance(command, TyperGroup):
            for name, own in command.commands.items():
                add((*words, name), own)
        options[words] = {one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)}

    for entry in entry_points(group="offsite.commands"):
        add((entry.name,), typer.main.get_command(entry.load()))
    return options


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_in_a_document_is_there(name: str, commands: dict[tuple[str, ...], set[str]]) -> None:
    firsts = {words[0] for words in commands}
    spans = [*re.findall(r"`([^`\n]*(?:\n[^`\n]+)?)`", prose(name)), *blocks(name, "", "sh", "bash")]
    for span in spans:
        for words, rest in COMMAND.findall(span.replace("\\\n", " ")):
            called = tuple(words.split())
            if called[0] not in firsts:
                assert called[0] in ("group", "command"), f"offsite {called[0]}: no such command"
                continue
            longest = max((called[:at] for at in range(1, len(called) + 1) if called[:at] in commands), key=len)
            group = any(own[: len(longest)] == longest and own != longest for own in commands)
            assert not group or len(called) == len(longest), f"offsite {' '.join(called)}: no such command"
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest):
                known = commands[longest] if not group else set().union(*commands.values())
                assert option in known | {"--help", "--version"}, (
                    f"offsite {' '.join(longest)} {option}: no such option"
                )


def leaves(words: tuple[str, ...], command: Any) -> Iterator[tuple[str, Any]]:
    """The commands that do something, and no second names of them."""
    if isinstance(command, TyperGroup):
        for name, own in command.commands.items():
            yield from leaves((*words, name), own)
    elif not command.hidden:
        yield " ".join(words), command


def test_every_command_speaks_to_programs_too_and_the_page_says_how() -> None:
    groups = [entry for entry in entry_points(group="offsite.commands") if entry.name in GROUPS]
    commands = dict(one for entry in groups for one in leaves((entry.name,), typer.main.get_command(entry.load())))
    formats = {
        words: one.default for words, command in commands.items() for one in command.params if "--format" in one.opts
    }
    assert formats == dict.fromkeys(commands, "text"), "each takes --format text | json"
    rows = re.findall(r"^\| ((?:`[a-z- ]+`(?:, )?)+) \|", text("docs/programs.md"), re.MULTILINE)
    named = [words for row in rows for words in re.findall("`(.+?)`", row)]
    assert sorted(named) == sorted(commands), "a row of docs/programs.md for each, with the keys that stay"


def test_every_name_of_the_sdk_is_on_its_page() -> None:
    page = text("docs/sdk.md")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == client.__all__
    assert not re.search(r"\|  \|$", page, re.MULTILINE), "each has a sentence"


@pytest.mark.slow
def test_the_documentation_is_a_site_in_which_every_link_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    program = [sys.executable, str(ROOT / ".ci" / "site"), str(tmp_path / "site")]
    told = subprocess.run(program, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    pages = {str(path.parent.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("index.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")} | {".", "notebook", "SECURITY"}


def test_every_page_is_in_the_sites_contents() -> None:
    named = set(re.findall(r'"([\w-]+\.md)"', text("docs/zensical.toml")))
    assert named - {"index.md", "notebook.md"} >= {path.name for path in (ROOT / "docs").glob("*.md")}
