"""Reading the configuration again: what changes, what waits, and what a broken file does: nothing."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from stationmaster.errors import ConfigError
from stationmaster.service import reload as reload_module
from stationmaster.service.config_reading import load_config
from stationmaster.service.logs import configure_logs
from stationmaster.service.reload import Reloader, change_of
from stationmaster.service.shutdown import Ending
from stationmaster.service.systemd import Manager
from stationmaster.service.translation import pipeline_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stationmaster.service.config import Config
    from stationmaster.settings import PipelineSettings

BASE = """
[source]
kind = "kafka"
[kafka]
bootstrap_servers = "127.0.0.1:9092"
group_id = "g"
topics = ["air", "wind"]
drain_timeout_s = 7.0
[stations]
handler = "a.b:c"
[upload]
url = "http://127.0.0.1:1/batches"
"""
AIR = '[[topic]]\nname = "air"\n'


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Config]:
    def read_text(more: str = "", base: str = BASE, **environ: str) -> Config:
        file = tmp_path / "read.toml"
        file.write_text(base + more)
        return load_config(file, environ=environ)

    return read_text


# --------------------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        ("", "[batch]\ndeadline_s = 2.0", ["batch.deadline_s"]),
        ("", "[batch]\nquorum = 0.5", ["batch.quorum"]),
        ("", "[batch]\nhigh_priority_deadline_s = 1.0", ["batch.high_priority_deadline_s"]),
        ("", '[log]\nlevel = "debug"\nformat = "json"', ["log.level", "log.format"]),
        (AIR, f"{AIR}deadline_s = 2.0", ["topic[air].deadline_s"]),
        (AIR, f"{AIR}quorum = 0.5", ["topic[air].quorum"]),
        (AIR, f'{AIR}priority = "high"', ["topic[air].priority"]),
        (AIR, f'{AIR}roster = ["a", "b"]', ["topic[air].roster"]),
        ("", f"{AIR}deadline_s = 2.0", ["topic[air]"]),
        (f"{AIR}deadline_s = 2.0", "", ["topic[air]"]),
        ("", "", []),
    ],
)
def test_how_batches_are_timed_who_is_expected_and_the_log_can_change(
    read: Callable[..., Config], before: str, after: str, keys: list[str]
) -> None:
    wanted = read(after)
    change = change_of(read(before), wanted)
    assert (list(change.changed), change.waiting) == (keys, ())
    assert change.config == wanted


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        ("", "[batch]\nmax_in_flight = 8", ["batch.max_in_flight"]),
        ("", "[stations]\nthreads = 1", ["stations.threads"]),
        ("", "[shutdown]\ngrace_s = 1.0", ["shutdown.grace_s"]),
        (AIR, f'{AIR}by = "poll"', ["topic[air].by"]),
        ("", f'{AIR}by = "poll"', ["topic[air].by"]),
        (f'{AIR}by = "poll"', "", ["topic[air]"]),
        ("", '[embeddings]\nurls = ["http://m/v1"]\nmodel = "m"', ["embeddings"]),
    ],
)
def test_what_cannot_change_is_named_and_waits(
    read: Callable[..., Config], before: str, after: str, keys: list[str]
) -> None:
    base = BASE.replace('[stations]\nhandler = "a.b:c"\n', "")
    stations = '[stations]\nhandler = "a.b:c"\n'

    def read_all(more: str) -> Config:
        joined = more.replace("[stations]\n", stations)
        return read(joined if stations in joined else stations + joined, base)

    running = read_all(before)
    change = change_of(running, read_all(after))
    assert list(change.waiting) == keys
    assert change.config.topic == running.topic or keys == ["topic[air].by"]
    assert change_of(change.config, read_all(after)).changed == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [(("air", "wind"), ("air",)), (("air",), ("air", "wind")), (("air",), ("wind",))],
)
def test_topics_cut_by_timestamp_come_and_go_with_the_next_start(
    read: Callable[..., Config], before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    def read_topics(names: tuple[str, ...], quorum: float) -> Config:
        tables = "".join(f'[[topic]]\nname = "{name}"\nroster = ["a"]\n' for name in names)
        topics = ", ".join(f'"{name}"' for name in names)
        base = BASE.replace('topics = ["air", "wind"]', f"topics = [{topics}]")
        return read(f'[batch]\nby = "timestamp"\nquorum = {quorum}\n{tables}', base)

    running = read_topics(before, 1.0)
    change = change_of(running, read_topics(after, 0.5))
    changed = {f"topic[{name}]" for name in {*before} ^ {*after}}
    assert set(change.waiting) == {"kafka.topics", *changed}
    assert change.changed == ("batch.quorum",)
    settings = pipeline_settings(change.config)
    assert pipeline_settings(running).fixed_changes(settings) == ()


def test_what_can_change_does_beside_what_cannot(read: Callable[..., Config]) -> None:
    running = read(f"[batch]\n{AIR}")
    wanted = read(f'[batch]\nmax_in_flight = 8\ndeadline_s = 4.0\n{AIR}by = "poll"\nquorum = 0.5')
    change = change_of(running, wanted)
    assert change.changed == ("batch.deadline_s", "topic[air].quorum")
    assert change.waiting == ("batch.max_in_flight", "topic[air].by")
    assert (change.config.batch.max_in_flight, change.config.batch.deadline_s) == (64, 4.0)


def test_what_can_change_waits_as_well_if_it_needs_what_cannot(read: Callable[..., Config]) -> None:
    running = read()
    long = read(
        "[batch]\ndeadline_s = 800.0", BASE.replace("[stations]", "[stations]\nidle_s = 900.0")
    )
    with pytest.raises(ConfigError, match="idle_s") as caught:
        change_of(running, long)
    assert len(caught.value.faults) == 1


def test_a_drain_s_time_that_is_computed_waits_for_the_next_start(
    read: Callable[..., Config],
) -> None:
    base = BASE.replace("drain_timeout_s = 7.0\n", "")
    change = change_of(read("", base), read("[batch]\ndeadline_s = 4.0", base))
    assert (change.changed, change.waiting) == (("batch.deadline_s",), ("kafka.drain_timeout_s",))


def test_a_secret_that_is_the_same_is_no_change_and_another_is_never_shown(
    read: Callable[..., Config],
) -> None:
    token = "STATIONMASTER_UPLOAD__TOKEN"
    running = read(**{token: "geheim-1"})
    assert change_of(running, read(**{token: "geheim-1"})).waiting == ()
    change = change_of(running, read(**{token: "geheim-2"}))
    assert change.waiting == ("upload.token",)
    assert "geheim" not in repr(change)
    assert change_of(running, read()).waiting == ("upload.token",)


# -------------------------------------------------------------------------------------------------------- the signal


@attrs.define
class Parts:
    """What a reload works on."""

    file: Path
    reloader: Reloader
    capture: pytest.CaptureFixture[str]
    told: list[str]
    ending: Ending
    settings: list[PipelineSettings] = attrs.field(factory=list)
    reads: int = 0

    def reconfigure(self, settings: PipelineSettings) -> None:
        self.settings.append(settings)

    def said(self) -> str:
        """Return the log since the last call."""
        return self.capture.readouterr().err

    def read(self) -> Config:
        self.reads += 1
        return load_config(self.file, environ={})

    async def reload(self) -> None:
        await self.reloader.reload(self.read)

    def write(self, more: str) -> None:
        self.file.write_text(BASE + more)


@pytest.fixture
def parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Parts:
    file = tmp_path / "stationmaster.toml"
    told: list[str] = []
    file.write_text(BASE)
    configure_logs("info", "json", sys.stderr)

    class Listening(Manager):
        def ready(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
            told.append("READY")

        def reloading(self) -> None:  # type: ignore[explicit-override]  # typing.override: Python 3.12
            told.append("RELOADING")

    ending = Ending()
    config = load_config(file, environ={})
    reloader = Reloader(config=config, manager=Listening(), ending=ending)
    parts = Parts(file, reloader, capsys, told, ending)
    reloader.watch(parts)
    return parts


async def test_a_reload_takes_over_what_changed_and_says_what_waits(parts: Parts) -> None:
    parts.write('[batch]\ndeadline_s = 2.0\nmax_in_flight = 8\n[log]\nlevel = "debug"')
    await parts.reload()
    (settings,) = parts.settings
    assert (settings.deadline_s, settings.max_in_flight) == (2.0, 64)
    assert logging.getLogger().level == logging.DEBUG
    assert parts.told == ["RELOADING", "READY"]
    said = parts.said()
    assert '"changed": ["batch.deadline_s", "log.level"]' in said
    assert '"keys": ["batch.max_in_flight"]' in said


async def test_a_second_reload_begins_where_the_first_ended(parts: Parts) -> None:
    parts.write("[batch]\ndeadline_s = 2.0")
    await parts.reload()
    await parts.reload()
    parts.write("[batch]\nquorum = 0.5")
    await parts.reload()
    assert [(each.deadline_s, each.quorum) for each in parts.settings] == [
        (2.0, 1.0),
        (2.0, 1.0),
        (5.0, 0.5),
    ]
    assert '"changed": "nothing"' in parts.said()
    assert parts.told == ["RELOADING", "READY"] * 3


@pytest.mark.parametrize(
    ("more", "faults"),
    [
        ("[batch", ["line 15"]),
        ("[batch]\ndeadline_s = -1\nquorum = 7", ["batch.deadline_s", "batch.quorum"]),
        ("[log]\nlevle = 1", ["did you mean level?"]),
        ('[batch]\ndeadline_s = 1.0\n[kafka.options]\n"sasl.password" = "geheim"', ["is a secret"]),
    ],
)
async def test_a_file_with_faults_changes_nothing_and_each_is_said(
    parts: Parts, more: str, faults: list[str]
) -> None:
    before = parts.reloader.config
    parts.write(f'[log]\nlevel = "debug"\n{more}' if "log" not in more else more)
    await parts.reload()
    assert parts.settings == []
    assert parts.reloader.config is before
    assert logging.getLogger().level == logging.INFO
    said = parts.said()
    assert "not reloaded, everything stays as it was" in said
    assert all(fault in said for fault in faults)
    assert "geheim" not in said
    assert parts.told == ["RELOADING", "READY"]


async def test_a_file_that_vanished_changes_nothing_and_is_read_again_when_it_is_back(
    parts: Parts,
) -> None:
    parts.file.unlink()
    await parts.reload()
    assert "cannot be read (No such file or directory)" in parts.said()
    assert parts.settings == []
    parts.write("[batch]\ndeadline_s = 2.0")
    await parts.reload()
    assert len(parts.settings) == 1


async def test_what_only_the_parts_know_is_checked_before_anything_changes(parts: Parts) -> None:
    parts.write('[log]\nlevel = "debug"\n')
    options = 'handler = "embed"\n[stations.options]\nno_such_option = 1\n'
    embed = parts.file.read_text().replace('handler = "a.b:c"\n', options)
    parts.file.write_text(f'{embed}[embeddings]\nurls = ["http://m/v1"]\nmodel = "m"\n')
    await parts.reload()
    assert "no_such_option" in parts.said()
    assert logging.getLogger().level == logging.INFO


async def test_while_the_service_ends_nothing_is_reloaded(parts: Parts) -> None:
    parts.ending.begin(0.0)
    await parts.reload()
    assert (parts.reads, parts.told, parts.settings) == (0, [], [])
    assert "not reloaded: the service ends" in parts.said()


async def test_a_disk_that_hangs_is_left_alone(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "_READ_S", 0.05)
    go_on = threading.Event()

    def hanging() -> Config:
        go_on.wait()
        return parts.read()

    try:
        await parts.reloader.reload(hanging)
    finally:
        go_on.set()
    assert "was not read within 0.05 s" in parts.said()
    assert parts.told == ["RELOADING", "READY"]


async def test_a_signal_reloads_once_the_pipeline_has_started(
    parts: Parts, nursery: trio.Nursery
) -> None:
    reloader = Reloader(config=parts.reloader.config, manager=Manager(), ending=Ending())
    await nursery.start(reloader.listen, parts.read)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)  # two before it listens are one
    await trio.testing.wait_all_tasks_blocked()
    assert parts.reads == 0
    done = trio.Event()
    parts_settings: list[PipelineSettings] = []

    @attrs.define
    class Started:
        def reconfigure(self, settings: PipelineSettings) -> None:
            parts_settings.append(settings)
            done.set()

    reloader.watch(Started())
    await done.wait()
    done = trio.Event()
    os.kill(os.getpid(), signal.SIGHUP)
    await done.wait()
    assert len(parts_settings) == parts.reads == 2
