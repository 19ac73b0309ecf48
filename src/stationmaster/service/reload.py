"""Reading the configuration again: what can change does, all of it in one step, or nothing does and the log says why.

| what                                                             | from when on                     |
| ---------------------------------------------------------------- | -------------------------------- |
| `log.level`, `log.format`                                        | at once                          |
| `batch.deadline_s`, `.high_priority_deadline_s`, `.quorum`       | the next batch that is opened    |
| `[[topic]]` `deadline_s`, `quorum`, `priority`, `roster`         | likewise; tables may come and go |
| anything else                                                    | the next start: named in the log |

(At level `debug` single requests of the batcher are told after its next call, and single stations with the next batch.
`kafka.drain_timeout_s`, where it is not set, is computed from the deadlines: it waits for the next start too.)

Rules:
1. The file is read as at the start, with the same overrides and the same environment. One that is gone, broken, or
   wrong in any key changes nothing.
2. What cannot change stays as it is while the rest changes. Both together must make sense: a deadline that needs a
   longer `stations.idle_s` waits for the next start with it, and so does everything else in that file.
3. Reloads are done one after the other; signals that come meanwhile make one more. None is done before the pipeline
   has started, or once the service ends.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs
import structlog
import trio

from stationmaster.errors import ConfigError
from stationmaster.service.config_rules import Secret
from stationmaster.service.logs import configure_logs
from stationmaster.service.translation import check_settings, pipeline_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from attrs import AttrsInstance

    from stationmaster.service.config import BatchConfig, Config, LogConfig, TopicConfig
    from stationmaster.service.shutdown import Ending
    from stationmaster.service.systemd import Manager
    from stationmaster.settings import PipelineSettings

_T = TypeVar("_T", "BatchConfig", "LogConfig", "TopicConfig")

_READ_S: Final = 30.0
"""A disk that does not give the file within this time is left alone."""
_CHANGEABLE: Final = {
    "batch": ("deadline_s", "high_priority_deadline_s", "quorum"),
    "topic": ("deadline_s", "quorum", "priority", "roster"),
    "log": ("level", "format"),
}


@attrs.frozen(kw_only=True)
class Change:
    """What a new configuration means for a running service."""

    config: Config
    """The running one with everything that can change."""
    changed: tuple[str, ...]
    """The keys that it takes over."""
    waiting: tuple[str, ...]
    """The keys that differ and wait for the next start."""


def change_of(running: Config, read: Config) -> Change:
    """Sort what differs into what can change and what waits for the next start. Pure.

    Raises:
        ConfigError: what can change does not go with what cannot.
    """
    config = attrs.evolve(
        running,
        batch=_taken("batch", running.batch, read.batch),
        topic=tuple(_topics(running, read)),
        log=_taken("log", running.log, read.log),
    )
    pipeline_settings(config)  # whether all of it goes together
    return Change(
        config=config,
        changed=tuple(_differences(running, config)),
        waiting=tuple(_differences(config, read)),
    )


def _taken(table: str, running: _T, read: _T) -> _T:
    """Return the running table with the keys of the one that was read which can change."""
    return attrs.evolve(running, **{key: getattr(read, key) for key in _CHANGEABLE[table]})


def _topics(running: Config, read: Config) -> Iterator[TopicConfig]:
    """Yield the tables that were read, as far as they leave every topic cut the way it is."""
    by_timestamp = running.batch.by == "timestamp"
    here = {topic.name: topic for topic in running.topic}
    for topic in read.topic:
        old = here.pop(topic.name, None)
        if old is not None:
            yield _taken("topic", old, topic)
        elif (
            not by_timestamp
        ):  # else it is of a topic that is not read yet: those that are have one, with a roster
            yield attrs.evolve(topic, by=None)
    # One that is gone stays if its topic would be cut another way without it.
    yield from (
        old for old in here.values() if by_timestamp or old.by not in {None, running.batch.by}
    )


def _differences(one: Config, other: Config) -> Iterator[str]:
    """Yield the keys that differ."""
    for field in attrs.fields(type(one)):
        if field.name == "topic":
            continue
        yield from _differing_keys(field.name, getattr(one, field.name), getattr(other, field.name))
    ones, others = ({topic.name: topic for topic in each.topic} for each in (one, other))
    for name in {**ones, **others}:
        yield from _differing_keys(f"topic[{name}]", ones.get(name), others.get(name))


def _differing_keys(
    table: str, one: AttrsInstance | None, other: AttrsInstance | None
) -> Iterator[str]:
    if one is None or other is None:
        if one is not other:
            yield table
        return
    for field in attrs.fields(type(one)):
        if not _same(getattr(one, field.name), getattr(other, field.name)):
            yield f"{table}.{field.name}"


def _same(one: object, other: object) -> bool:
    if isinstance(one, Secret) and isinstance(other, Secret):
        return one.reveal() == other.reveal()
    return bool(one == other)


# ------------------------------------------------------------------------------------------------------------- signals


class Reconfigured(Protocol):
    """A pipeline."""

    def reconfigure(self, settings: PipelineSettings) -> None:
        """Go by these settings from now on."""
        ...


@attrs.define(eq=False, kw_only=True)
class Reloader:
    """Reloads at every SIGHUP."""

    config: Config
    """The one in effect."""
    _manager: Manager
    _ending: Ending
    _pipeline: Reconfigured | None = attrs.field(default=None, init=False)
    _started: trio.Event = attrs.field(factory=trio.Event, init=False)

    def watch(self, pipeline: Reconfigured) -> None:
        """Hand over the pipeline, when it has started: signals that came before are heeded now."""
        self._pipeline = pipeline
        self._started.set()

    async def listen(
        self, read: Callable[[], Config], *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Take SIGHUP until cancelled. `read` reads the configuration, in a thread."""
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            task_status.started()
            await self._started.wait()
            async for _ in signals:
                await self.reload(read)

    async def reload(self, read: Callable[[], Config]) -> None:
        """Read the configuration again, and take over what can change, or say why not."""
        log = structlog.stdlib.get_logger("stationmaster")
        await trio.lowlevel.checkpoint()
        if self._ending.begun.is_set():
            log.warning("not reloaded: the service ends")
            return
        self._manager.reloading()
        try:
            self._take_over(change_of(self.config, await _read_in_time(read)))
        except ConfigError as error:
            log.error(  # noqa: TRY400 - where it was raised is no news to an operator
                "not reloaded, everything stays as it was", faults=list(error.faults)
            )
        finally:
            self._manager.ready()

    def _take_over(self, change: Change) -> None:
        # No checkpoint in here, and nothing that can fail but the first step.
        assert self._pipeline is not None  # noqa: S101 - `listen` waits for it
        self._pipeline.reconfigure(pipeline_settings(change.config))
        configure_logs(change.config.log.level, change.config.log.format, sys.stderr)
        self.config = change.config
        log = structlog.stdlib.get_logger("stationmaster")
        log.info("configuration reloaded", changed=_listed(change.changed))
        if change.waiting:
            log.warning("changes that wait for the next start", keys=_listed(change.waiting))


async def _read_in_time(read: Callable[[], Config]) -> Config:
    with trio.move_on_after(_READ_S):
        config = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        check_settings(config)
        return config
    raise ConfigError([f"the file was not read within {_READ_S:g} s"])


def _listed(keys: Sequence[str]) -> list[str] | str:
    return list(keys) or "nothing"
