"""The page, the rules, the alerts and the dashboard tell of metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_args

import pytest

from stationmaster import messages
from stationmaster.batch import Outcome
from stationmaster.batcher import policy
from stationmaster.kafka.troubles import Kind
from stationmaster.service.metrics import definitions as d
from stationmaster.service.metrics.page import page
from tests.service.metrics.conftest import ROOT
from tests.service.metrics.scrapes import Scraped, watch_everything
from tests.service.test_logs import TOLD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMETHEUS = ROOT / "config" / "prometheus"
DASHBOARD = ROOT / "config" / "grafana" / "stationmaster.json"
RULES = (PROMETHEUS / "rules.yml").read_text()
ALERTS = (PROMETHEUS / "alerts.yml").read_text()

LABELS = {name: set(one.label_names) for one in d.EVERY for name in one.sample_names}
"""Sample's name -> its labels."""
for _one in d.EVERY:
    if _one.kind == "histogram":
        LABELS[f"{_one.name}_bucket"].add("le")
FOREIGN = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
TARGET = {"job", "instance"}
RECORDED = set(re.findall(r"record: (\S+)", RULES))


def complaints(expression: str) -> Iterator[str]:
    """Yield the names and labels of an expression that no scrape has."""
    for name in re.findall(r"[a-z_]+:stationmaster_\w+:\w+", expression):
        if name not in RECORDED:
            yield name
    plain = re.sub(r"[a-z_]+:stationmaster_\w+:\w+", "", expression)
    names = re.findall(r"\bstationmaster_\w+", plain)
    yield from (name for name in names if name not in LABELS)
    known = {label for name in names for label in LABELS.get(name, ())} | TARGET
    for name, inside in re.findall(r"\b(stationmaster_\w+)\{([^}]*)\}", plain):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside):
            if label not in LABELS.get(name, set()) | TARGET:
                yield f"{name} has no label {label}"
    if names:
        for listed in re.findall(r"\bby \(([^)]*)\)", plain):
            for label in re.split(r"\s*,\s*", listed):
                if label not in known:
                    yield f"by ({label})"


def panels() -> Iterator[tuple[str, str]]:
    """Yield title and expression of each query of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_what_the_definitions_say() -> None:
    """If not: `python -m stationmaster.service.metrics > docs/metrics.md`."""
    assert (ROOT / "docs" / "metrics.md").read_text() == page()


def test_the_page_is_written_by_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stationmaster.service.metrics"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.decode() == page()


def test_every_definition_is_in_one_section_of_the_page() -> None:
    defined = {value for value in vars(d).values() if isinstance(value, d.Definition)}
    assert set(d.EVERY) == defined
    assert len(d.EVERY) == len(defined)


@pytest.mark.parametrize("one", d.EVERY, ids=lambda one: one.name)
def test_a_metric_is_named_as_prometheus_wants_it(one: d.Definition) -> None:
    assert re.fullmatch(r"stationmaster(_[a-z]+)+", one.name)
    assert one.name.endswith("_total") is (one.kind == "counter")
    assert bool(one.buckets) is (one.kind == "histogram")
    assert list(one.buckets) == sorted(set(one.buckets))
    assert one.text.endswith(".")
    assert all(label.values or label.bound for label in one.labels)


# ---------------------------------------------------------------------------------------- closed lists are what is said


def test_the_closed_lists_are_those_of_the_code() -> None:
    source = (ROOT / "src/stationmaster/messages.py").read_text()
    refusals = set(re.findall(r'reason="([a-z0-9-]+)"', source))
    assert refusals | {"rejected-upload", d.OTHER} == set(d.DEAD_LETTERS.labels[0].values)
    judges = source[source.index("def _why_bad") : source.index("def why_bad_id") + 1000]
    judges = judges[: judges.rindex("\n\n\n")]
    named = set(re.findall(r'(?:return|else) "([a-z-]+)"', judges))
    assert named | {d.OTHER} == set(d.ENTRIES_BAD.labels[1].values)
    assert {kind.value for kind in Kind} | {"close", d.OTHER} == set(
        d.SOURCE_TROUBLES.labels[0].values
    )
    assert {*get_args(policy.SendReason), "retry", "bisect", d.OTHER} == set(
        d.BATCHER_CALLS.labels[0].values
    )
    assert [outcome.name.lower() for outcome in Outcome] == list(
        d.STATION_OUTCOMES.labels[1].values
    )
    assert messages.__doc__ is not None
    assert all(reason in messages.__doc__ for reason in named | refusals)


# -------------------------------------------------------------------------------------------------- rules and dashboard


def test_a_name_that_does_not_exist_is_found_out() -> None:
    assert list(complaints("rate(stationmaster_batches_opened[5m])"))
    assert list(complaints("rate(stationmaster_batch_duration_seconds[5m])"))
    assert list(complaints('stationmaster_batches_opened_total{station="S1"}'))
    assert list(complaints("sum by (station) (stationmaster_outbox_rows)"))
    assert list(complaints("job:stationmaster_nothing:rate5m > 1"))
    assert not list(complaints("sum by (le) (stationmaster_batch_duration_seconds_bucket)"))


@pytest.mark.parametrize("text", [RULES, ALERTS], ids=["rules", "alerts"])
def test_rules_are_about_metrics_that_exist(text: str) -> None:
    expressions = re.findall(r"expr: (?:\|\n((?: {10,}.*\n)+)|(.*)\n)", text)
    assert len(expressions) == text.count("expr:")
    assert [found for pair in expressions for found in complaints("".join(pair))] == []


def test_there_is_a_rule_for_each_of_the_four_figures() -> None:
    assert {
        "job:stationmaster_batch_completion:ratio_rate5m",
        "job_topic:stationmaster_station_success:ratio_rate5m",
        "job_topic:stationmaster_batch_duration_seconds:mean_rate5m",
        "job_topic:stationmaster_batch_deadline:ratio_rate5m",
    } == RECORDED
    assert all(name in page() for name in RECORDED)


def test_every_alert_is_tested_says_what_to_do_and_how_urgent_it_is() -> None:
    names = re.findall(r"- alert: (\w+)", ALERTS)
    tests = (PROMETHEUS / "alerts.test.yml").read_text()
    fired = re.findall(r"alertname: (\w+)\n +exp_alerts:\n", tests)
    assert sorted(set(names)) == sorted(names)
    assert set(fired) == set(names)
    assert ALERTS.count("  action: ") == ALERTS.count("  summary: ") == len(names)
    assert len(re.findall(r"labels: \{severity: (?:page|ticket)\}", ALERTS)) == len(names)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    assert {title: found for title, query in panels() if (found := [*complaints(query)])} == {}


def test_no_two_panels_of_the_dashboard_lie_on_each_other() -> None:
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


def test_names_in_dashboard_and_rules_are_of_the_shape_that_was_looked_for() -> None:
    shapes = {
        name for _, query in panels() for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", query)
    }
    spoken = {
        "label_values",
        "histogram_quantile",
        *(label for one in LABELS.values() for label in one),
    }
    values = {value for one in d.EVERY for label in one.labels for value in label.values}
    strange = (
        shapes - spoken - values - FOREIGN - set(LABELS) - {"rate_interval", "__rate_interval"}
    )
    assert strange == set()


# ------------------------------------------------------------------------------------------------------------- promtool


def test_promtool_finds_nothing_wrong_with_a_scrape_full_of_everything(
    promtool: Callable[..., str],
) -> None:
    scraped = Scraped("air", 'quote"d', "new\nline", "back\\slash", "\x1b[31m\r", "мост")
    watch_everything(scraped.metrics)
    scraped.tell(*(event for event, _ in TOLD))
    assert promtool("check", "metrics", stdin=scraped.metrics.render()[0]) == ""


@pytest.mark.parametrize("name", ["rules", "alerts"])
def test_promtool_takes_the_rules_and_their_tests_pass(
    promtool: Callable[..., str], name: str
) -> None:
    assert "SUCCESS" in promtool("check", "rules", f"config/prometheus/{name}.yml")
    assert "SUCCESS" in promtool("test", "rules", f"config/prometheus/{name}.test.yml")


def test_promtool_understands_every_query_of_the_dashboard(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    rules: list[dict[str, Any]] = []
    for number, (_, query) in enumerate(panels()):
        if not query.startswith("label_values"):
            expression = query.replace("$__rate_interval", "5m")
            rules.append({"record": f"query:{number}", "expr": expression})
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", str(file))
