"""From definitions to what `prometheus_client` counts with, and from there to the text that is scraped."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Final

import attrs
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest as classic_text
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics_text

from stationmaster.service.metrics.definitions import EVERY, TOPIC

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

    from stationmaster.service.metrics.definitions import Definition

CLASSIC: Final = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@attrs.frozen
class _Lean:
    """What a registry collects, without the `_created` samples, which are a third of it and of no use here."""

    _registry: CollectorRegistry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


class Instruments:
    """One for each definition that events move. All values that are known beforehand begin at 0.

    The three verbs cost a look into one table. Values of labels are judged (`Label.value`) when they are new.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._metrics: dict[Definition, Any] = {}
        self._known: dict[tuple[Definition | str, ...], Any] = {}
        for definition in EVERY:
            if not definition.asked:
                self._metrics[definition] = _make(definition, registry)
                self._begin(definition)

    def begin_topic(self, topic: str) -> None:
        """Begin at 0 whatever is counted by topic."""
        for definition in self._metrics:
            if TOPIC in definition.labels:
                self._begin(definition, topic)

    def _begin(self, definition: Definition, topic: str | None = None) -> None:
        lists = [
            (topic,) if label is TOPIC and topic is not None else label.values
            for label in definition.labels
        ]
        for values in product(*lists):  # none, if a label without a list is among them
            self._find(definition, values)

    def add(self, definition: Definition, *labels: str, by: float = 1.0) -> None:
        """Count on a counter, or up (or down) on a gauge."""
        self._find(definition, labels).inc(by)

    def put(self, definition: Definition, number: float, *labels: str) -> None:
        """Set a gauge."""
        self._find(definition, labels).set(number)

    def note(self, definition: Definition, number: float, *labels: str) -> None:
        """Count in a histogram."""
        self._find(definition, labels).observe(number)

    def _find(self, definition: Definition, values: tuple[str, ...]) -> Any:  # noqa: ANN401 - the three verbs know
        found = self._known.get((definition, *values))
        if found is None:
            labels = zip(definition.labels, values, strict=True)
            legal = tuple(label.value(value) for label, value in labels)
            metric = self._metrics[definition]
            found = metric.labels(*legal) if legal else metric
            if legal == values:  # what had to be changed may have no end
                self._known[definition, *values] = found
        return found


def _make(definition: Definition, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, text, labels = definition.name, definition.text, definition.label_names
    if definition.kind == "histogram":
        return Histogram(name, text, labels, buckets=definition.buckets, registry=registry)
    kind = Counter if definition.kind == "counter" else Gauge
    return kind(name, text, labels, registry=registry)


def wants_open_metrics(accept: str | None) -> bool:
    """Tell whether an `Accept` header names OpenMetrics, and does not refuse it."""
    for part in (accept or "").split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        if kind == "application/openmetrics-text":
            return not any(_is_zero(parameter) for parameter in parameters)
    return False


def _is_zero(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name == "q" and not value.strip("0.")


def expose(registry: CollectorRegistry, *, open_metrics: bool) -> bytes:
    """Return everything as text in one of the two forms."""
    lean = _Lean(registry)
    if open_metrics:
        text: bytes = open_metrics_text(lean)  # type: ignore[no-untyped-call]
        return text
    return classic_text(lean)
