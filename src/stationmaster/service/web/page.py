"""The page as it stands without scripts: the board's picture as HTML, every text of it escaped."""

from __future__ import annotations

from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any, Final

import attrs

from stationmaster.service.station_grid import OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stationmaster.service.status import StatusBoard

NAMED_STATIONS: Final = 200
"""Stations that are shown by name; more are a grid, which the script draws."""
_SIGNS: Final = {"s": "✓", "n": "–", "f": "×", "t": "◷", "m": "?", "r": "!"}
_WORDS: Final = {
    "succeeded": "succeeded",
    "noOutput": "no output",
    "failed": "failed",
    "timedOut": "timed out",
    "missing": "missing",
    "rejected": "rejected",
}


@attrs.frozen(kw_only=True)
class Page:
    """Makes the page."""

    versions: Mapping[str, str]
    """Asset -> what tells its content from that of other versions."""
    _template: Template = attrs.field(factory=lambda: Template(_read_template()), init=False)

    def render(self, board: StatusBoard) -> bytes:
        """Return the page with the board's picture of now."""
        now = view(board.picture())
        shown = {
            "version": escape(now["version"]),
            "since": f"{now['startedAt'][:16].replace('T', ' ')} UTC",
            "more": f"and {now['more']} more" if now["more"] > 0 else "",
            "state": escape(now["state"]),
            "tone": now["tone"],
            "tiles": "".join(_tile(*tile) for tile in now["tiles"]),
            "checks": "".join(map(_check, now["checks"])),
            "troubles": "".join(map(_trouble, now["troubles"])),
            "batches": "".join(map(_batch, now["batches"])),
            "filters": "".join(
                _filter(code, now["outcomes"][name]) for code, name in OUTCOMES.items()
            ),
            "stations": _stations(board),
            "reports": "".join(map(_report, board.reports())),
            **{f"version_{name.partition('.')[2]}": text for name, text in self.versions.items()},
        }
        return self._template.substitute(shown).encode()


def view(now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a picture, in its words: the script gets the same by `/api/events`."""
    good = now["ready"] and now["state"] == "running"
    return {
        "version": now["version"],
        "startedAt": now["startedAt"],
        "state": now["state"] + ("" if now["ready"] else ", not ready"),
        "tone": "good" if good else "bad",
        "tiles": list(_tiles(now)),
        "checks": now["checks"],
        "troubles": now["troubles"],
        "batches": now["batches"]["nearest"],
        "more": now["batches"]["open"] - len(now["batches"]["nearest"]),
        "outcomes": now["stations"]["outcomes"],
    }


def _read_template() -> str:
    folder = resources.files("stationmaster.service.web")
    return folder.joinpath("assets", "page.html").read_text("utf-8")


def _tiles(now: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (heading, figure, what belongs to it)."""
    batches, count = now["batches"], now["counters"]
    slots = f"of {batches['slots']} slots" if batches["slots"] else "open now"
    yield "Open batches", str(batches["open"]), slots
    yield "Uploaded", str(count["uploaded"]), f"of {count['opened']} opened"
    success = count["stationSuccessRate"]
    yield "Stations fine", _percent(success), f"{now['stations']['shown']} known"
    mean = count["meanSeconds"]
    lateness = f"late by {count['worstLatenessSeconds'] * 1000:.1f} ms"
    yield "Mean batch", "–" if mean is None else f"{mean:.2f} s", lateness
    yield (
        "By deadline",
        _percent(count["deadlineRate"]),
        f"{count['closedBy']['deadline']} batches",
    )
    if (kafka := now["kafka"]) is not None:
        lag = "–" if kafka["lag"] is None else str(kafka["lag"])
        note = f"{kafka['assigned']} partitions" + (", paused" if kafka["paused"] else "")
        yield "Kafka lag", lag, note
    if (batcher := now["batcher"]) is not None:
        fill = "–" if batcher["meanRows"] is None else f"{batcher['meanRows']:.1f}"
        of = f" of {batcher['maxRows']}" if batcher["maxRows"] else ""
        yield (
            "Texts a call",
            f"{fill}{of}",
            f"{batcher['queuedRows']} queued, {batcher['callsInFlight']} calls",
        )
    if (outbox := now["outbox"]) is not None:
        size = f"{outbox['bytes'] / 1e6:.1f} MB"
        note = f"{size}, oldest {outbox['oldestSeconds']:.0f} s" if outbox["rows"] else "empty"
        yield "Outbox", str(outbox["rows"]), note
        letters = now["deadLetters"]["rows"]
        yield "Dead letters", str(letters), "kept" if letters else "none"


def _tile(heading: str, figure: str, note: str) -> str:
    return (
        f'<div class="tile"><dt>{escape(heading)}</dt>'
        f"<dd><strong>{escape(figure)}</strong><span>{escape(note)}</span></dd></div>"
    )


def _check(check: Mapping[str, Any]) -> str:
    tone, word = ("good", "fine") if check["ok"] else ("bad", "not fine")
    return (
        f'<li class="{tone}"><b>{escape(check["name"])}</b> <span class="word">{word}</span> '
        f"<span>{escape(check['detail'])}</span></li>"
    )


def _trouble(trouble: Mapping[str, Any]) -> str:
    return f"<li><b>{escape(trouble['name'])}</b> <span>{escape(trouble['detail'])}</span></li>"


def _batch(batch: Mapping[str, Any]) -> str:
    seconds, limit = batch["seconds"], batch["deadlineSeconds"]
    answers = f"{batch['answered']}/{batch['expected']}"
    return (
        f'<li><span class="id">{escape(batch["batchId"])}</span>'
        f'<span class="figures">{answers} stations, {min(seconds, limit):.1f} of {limit:g} s</span>'
        f'<progress class="answers" max="{max(batch["expected"], 1)}" value="{batch["answered"]}" '
        f'aria-label="stations that answered"></progress>'
        f'<progress class="time" max="{limit}" value="{min(seconds, limit)}" '
        f'aria-label="time to the deadline"></progress></li>'
    )


def _filter(code: str, count: int) -> str:
    return (
        f'<button type="button" class="o-{code}" data-code="{code}" aria-pressed="false">'
        f'<i aria-hidden="true">{_SIGNS[code]}</i> {_WORDS[OUTCOMES[code]]} <b>{count}</b></button>'
    )


def _stations(board: StatusBoard) -> str:
    rows = list(board.stations.rows())
    shown = rows
    rest = ""
    if len(rows) > NAMED_STATIONS:
        shown = [row for row in rows if row[1] != "s"][:NAMED_STATIONS]
        rest = _nothing(f"{len(rows) - len(shown)} more stations.")
    return "".join(_station(*row) for row in shown) + rest


def _station(station_id: str, code: str) -> str:
    return (
        f'<li class="o-{code}"><i aria-hidden="true">{_SIGNS[code]}</i>'
        f'<bdi>{escape(station_id)}</bdi> <span class="out">{_WORDS[OUTCOMES[code]]}</span></li>'
    )


def _report(report: Mapping[str, Any]) -> str:
    named = ", ".join(
        f"{one['stationId']} {_WORDS[one['outcome']]}" for one in report["unsuccessful"]
    )
    more = f" and {report['unsuccessfulMore']} more" if report["unsuccessfulMore"] else ""
    why = f"<small>{escape(named + more)}</small>" if named else ""
    cells = (
        report["closedAt"][11:19],
        report["closedBy"],
        f"{report['seconds']:.2f} s",
        f"{report['succeeded']}/{report['expected']}",
        report["upload"],
    )
    closed_at, *others = (f"<td>{escape(cell)}</td>" for cell in cells)
    batch = f"<td>{escape(report['batchId'])}{why}</td>"
    return f'<tr class="by-{report["closedBy"]}">{closed_at}{batch}{"".join(others)}</tr>'


def _nothing(text: str) -> str:
    return f'<li class="nothing">{text}</li>'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"
