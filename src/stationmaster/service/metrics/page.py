"""The page `docs/metrics.md`, out of the definitions. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stationmaster.service.metrics.definitions import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stationmaster.service.metrics.definitions import Definition, Label

_HEAD: Final = """\
# Metrics

<!-- Made by `python -m stationmaster.service.metrics > docs/metrics.md`: change the definitions, not this page. -->

With a `[web]` table the service answers `GET /metrics` in the classic text of Prometheus, or in OpenMetrics where the
request's `Accept` header names it. A page is at most half a second old: scraping more often costs nothing, and shows
nothing more.

Times are seconds, sizes bytes. No label has a value that a message decides: no station, no batch, no words of an error.
A part that the configuration leaves out (a batcher, Kafka) has no numbers here. Beside these there are the `process_*`
and `python_gc_*` metrics of `prometheus_client`.

## The four figures

`config/prometheus/rules.yml` records them over five minutes, `config/prometheus/alerts.yml` watches them, and
`config/grafana/stationmaster.json` shows them. Each alert says what to do; each has a test in the file beside it.

| figure | recorded as | out of |
| --- | --- | --- |
| batch completion rate | `job:stationmaster_batch_completion:ratio_rate5m` | accepted by the target / opened |
| station success rate | `job_topic:stationmaster_station_success:ratio_rate5m` | succeeded / expected |
| mean batch duration | `job_topic:stationmaster_batch_duration_seconds:mean_rate5m` | opened until accepted |
| deadline rate | `job_topic:stationmaster_batch_deadline:ratio_rate5m` | closed by the deadline / opened |

What is accepted out of the outbox counts too: the completion rate dips while the target is down, and rises above 1 when
the outbox empties.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *_tables()])


def _tables() -> Iterator[str]:
    for title, definitions in SECTIONS:
        yield f"## {title}\n"
        yield "| metric | kind | labels | meaning |"
        yield "| --- | --- | --- | --- |"
        for one in definitions:
            labels = "; ".join(map(_label, one.labels))
            yield f"| `{one.name}` | {one.kind} | {labels} | {_meaning(one)} |"
        yield ""


def _label(label: Label) -> str:
    values = ", ".join(f"`{value}`" for value in label.values)
    return f"`{label.name}`: {values or label.bound}"


def _meaning(definition: Definition) -> str:
    if not definition.buckets:
        return definition.text
    return f"{definition.text} Buckets: {', '.join(f'{bound:g}' for bound in definition.buckets)}."
