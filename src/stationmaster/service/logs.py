"""The service's log: JSON lines or a console, for our events and everybody else's `logging` alike.

One event is one line, whatever its texts hold: JSON leaves as ASCII, and on a console everything is escaped that could
break the line or steer a terminal. Ids come from messages: nobody may forge a line with one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Final, Literal

import attrs
import structlog
from structlog.stdlib import ProcessorFormatter

from stationmaster.service.config_rules import printable, toml_text
from stationmaster.service.log_lines import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

    from stationmaster.events import Event

_WINDOW_S: Final = 60.0
_MOST_KINDS: Final = 64
_OTHER_KINDS: Final = ("other", "")
_BARE: Final = re.compile(r'[^\s"=\\]+')
_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_JOURNAL_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
# They tell every request at info and every byte at debug; what goes wrong in them reaches us as an error.
_CHATTY: Final = ("httpx", "httpcore")


def configure_logs(
    level: str,
    format: Literal["auto", "json", "console"],
    stream: TextIO,
    *,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Send the log of this process, structlog's and the standard library's, to one stream.

    Call it again to change the level.

    Args:
        level: the least level that is told, by its lower-case name.
        format: `auto` is a console on a terminal, JSON elsewhere.
        stream: where lines go. If it is systemd's journal, each JSON line begins with its priority, which the journal
            takes off again.
        environ: for `NO_COLOR` and `JOURNAL_STREAM`.
    """
    on_terminal = stream.isatty()
    render: Callable[..., str]
    if format == "console" or (format == "auto" and on_terminal):
        render = _Console(in_colour=on_terminal and not environ.get("NO_COLOR"))
    else:
        render = _Json(for_journal=_is_journal(stream, environ))
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=shared, processors=[ProcessorFormatter.remove_processors_meta, render]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Tell whether systemd connected this very stream to its journal: its variable is inherited by every child."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it, or a closed one
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


@attrs.frozen
class _Json:
    for_journal: bool

    def __call__(self, _logger: object, _method: str, event: structlog.typing.EventDict) -> str:
        first = {name: event.pop(name) for name in ("timestamp", "level", "event")}
        fields = {**first, **event}
        try:
            line = json.dumps(fields, default=str, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            # A line is better than none: NaN, a circle, a key that is no text.
            line = json.dumps({str(name): repr(value) for name, value in fields.items()})
        if not self.for_journal:
            return line
        return f"<{_JOURNAL_PRIORITIES.get(first['level'], 6)}>{line}"


@attrs.frozen
class _Console:
    in_colour: bool

    def __call__(self, _logger: object, _method: str, event: structlog.typing.EventDict) -> str:
        timestamp, level, name, exception = (
            event.pop(key, "") for key in ("timestamp", "level", "event", "exception")
        )
        paint = self._paint
        fields = (
            f"{paint(printable(key), '36')}={_console_value(value)}" for key, value in event.items()
        )
        line = " ".join(
            (
                paint(timestamp, "2"),
                paint(f"{level:<8}", _COLOURS.get(level, "0")),
                paint(printable(str(name)), "1"),
                *fields,
            )
        )
        return "\n".join((line, *map(printable, exception.splitlines())))

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.in_colour else text


def _console_value(value: object) -> str:
    bare = isinstance(value, str) and _BARE.fullmatch(value)
    return printable(str(value) if bare else toml_text(value))


# ---------------------------------------------------------------------------------------------------------- observer


class LogObserver:
    """Tells events as log lines; errors that repeat once per kind and minute, with the number left out since."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: `clock`: seconds, for the minute."""
        self._log = structlog.stdlib.get_logger("stationmaster")
        self._level = logging.getLogger("stationmaster")
        self._repeats = _Repeats(clock)

    @property
    def detailed(self) -> bool:
        """True at level debug only."""
        return self._level.isEnabledFor(logging.DEBUG)

    def observe(self, event: Event, /) -> None:
        """Log one event."""
        line = line_of(event)
        fields = line.fields
        if line.kind is not None:
            left_out = self._repeats.left_out((line.text, line.kind))
            if left_out is None:
                return
            if left_out:
                fields = {**fields, "repeated": left_out}
        getattr(self._log, line.level)(line.text, **fields)


@attrs.define(eq=False)
class _Told:
    at: float
    left_out: int = 0


@attrs.define(eq=False)
class _Repeats:
    """Counts what is told at most once a minute, for a bounded number of kinds."""

    _clock: Callable[[], float]
    _told: dict[tuple[str, str], _Told] = attrs.field(factory=dict, init=False)

    def left_out(self, kind: tuple[str, str]) -> int | None:
        """Return how many of this kind were left out since it was last told; None to leave out this one too."""
        now = self._clock()
        if kind not in self._told and len(self._told) >= _MOST_KINDS:
            self._forget(before=now - _WINDOW_S)
            if len(self._told) >= _MOST_KINDS:
                kind = _OTHER_KINDS
        told = self._told.get(kind)
        if told is not None and now - told.at < _WINDOW_S:
            told.left_out += 1
            return None
        self._told[kind] = _Told(now)
        return told.left_out if told is not None else 0

    # What a forgotten kind left out is not told any more: its minute is long over.
    def _forget(self, *, before: float) -> None:
        self._told = {kind: told for kind, told in self._told.items() if told.at > before}
