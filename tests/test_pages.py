"""The pages say what is so: commands, options, keys and files exist, and the way of the quickstart can be gone."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from stationmaster.service.cli import command_line
from stationmaster.service.config_schema import TABLES
from stationmaster.service.metrics import definitions
from tests.processes import Receiver, open_part

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
QUICKSTART = PAGES["docs/quickstart.md"]
OTHERS = {"batch.id"}
"""Written like keys of the configuration, but attributes of spans."""

each_page = pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words after `stationmaster` of every command that is shown."""
    for block in blocks(text, "console"):
        for found in re.finditer(r"^[$#] .*\bstationmaster ((?!@)[^&>\n]+)", block, re.MULTILINE):
            yield shlex.split(found[1], comments=True)


def is_key(table: str, key: str) -> bool:
    return table in TABLES and key in TABLES[table].keys


@each_page
def test_a_command_that_is_shown_exists_with_its_options(text: str) -> None:
    for words in command_lines(text):
        command: click.Command = command_line
        while isinstance(command, click.Group):
            assert words, "a group alone does nothing"
            assert words[0] in command.commands, words
            command = command.commands[words.pop(0)]
        options = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("-")} <= options, words
        for table, key in re.findall(r"--set (\w+)\.(\w+)=", shlex.join(words)):
            assert is_key(table, key), words


@each_page
def test_a_key_of_the_configuration_that_is_named_exists(text: str) -> None:
    for name, table, key in re.findall(r"`((\w+)\.(\w+))(?: = [^`]*)?`", text):
        assert table not in TABLES or is_key(table, key) or name in OTHERS, name
    for table, key in re.findall(r"`\[(\w+)\] (\w+)", text):
        assert is_key(table, key), f"[{table}] {key}"
    for table, key in re.findall(r"\bSTATIONMASTER_([A-Z_]+)__([A-Z_]+)", text):
        assert is_key(table.lower(), key.lower()), f"{table}__{key}"


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"docs/testing.md"}))  # it shows a project's
def test_a_piece_of_configuration_has_keys_that_exist(page: str) -> None:
    for block in blocks(PAGES[page], "toml"):
        for table, keys in tomllib.loads(block).items():
            for each in keys if isinstance(keys, list) else [keys]:
                assert all(is_key(table, key) for key in each), each


@each_page
def test_a_file_that_is_named_exists(text: str) -> None:
    for name in re.findall(r"`((?:\.ci|benchmarks|config|docs|examples|src|tests)/[^`: ]*)", text):
        assert (ROOT / name).exists(), name


def test_the_reasons_of_dead_letters_are_those_that_are_counted() -> None:
    [table] = re.findall(r"^\| reason \|.*?\n\n", QUICKSTART, re.DOTALL | re.MULTILINE)
    told = [name for row in table.splitlines()[2:] for name in re.findall("`([a-z0-9-]+)`", row)]
    [reasons] = definitions.DEAD_LETTERS.labels
    assert sorted(told) == sorted(set(reasons.values) - {definitions.OTHER})


async def test_the_way_of_the_quickstart_can_be_gone(tmp_path: Path) -> None:
    """With other ports, and one process after the other instead of terminals."""
    [message] = re.findall(r'`(\{"timestamp".*?\})`', QUICKSTART)
    (tmp_path / "hours.jsonl").write_text(f"{message}\n" * 3)
    config = next(block for block in blocks(QUICKSTART, "toml") if 'kind = "file"' in block)
    model, receiver, replay = (words for words in command_lines(QUICKSTART) if words[0] != "demo")
    assert model[:3] == ["model-server", "--port", "8000"]
    assert receiver[:3] == ["receiver", "--port", "9000"]
    model[2] = receiver[2] = "0"
    receiver[-1] = str(tmp_path / receiver[-1])
    async with open_part(*model) as model_part, open_part(*receiver) as receiver_part:
        for port, part in ((8000, model_part), (9000, receiver_part)):
            address = (await part.wait_line("listening on ")).rpartition("//")[2]
            assert f"http://127.0.0.1:{port}/" in config
            config = config.replace(f"127.0.0.1:{port}", address)
        config = config.replace('"hours.jsonl"', f'"{tmp_path / "hours.jsonl"}"')
        config += f'[outbox]\npath = "{tmp_path / "state.db"}"\n'
        (tmp_path / "replay.toml").write_text(config)
        replay[1:] = [word if word[0] == "-" else str(tmp_path / word) for word in replay[1:]]
        async with open_part(*replay) as service:
            assert await service.ends(seconds=60) == 0, service.lines
        batches = Receiver(receiver_part, url="", database=tmp_path / "receiver.sqlite").batches()
    assert [each["counts"]["succeeded"] for each in batches.values()] == [1, 1, 1]
