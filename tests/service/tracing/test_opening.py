"""Tracing as the service has it: from a configuration to a collector, and what happens without one or the other."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stationmaster.errors import ConfigError
from stationmaster.service.config import TracingConfig
from stationmaster.service.tracing import Untraced, open_tracing
from stationmaster.testing.server import HANG, Reply, ScriptedServer, open_server
from tests.processes import kafka_config, open_part, wait_until
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def _spans_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


async def replay(
    folder: Path, *, target: str, tracing: str, ends_when: Callable[[list[str]], bool]
) -> list[str]:
    """Run the service over a file of two messages; return its lines.

    The last spans have only seconds to go, which may be too few for a busy machine. So the first message is the one
    that is looked at: the second is kept until all has come of it, as `ends_when` says of the lines so far.
    """
    file, gate = folder / "messages.jsonl", folder / "gate"
    file.write_bytes(message_bytes("S0", "S1") + b"\n" + message_bytes("LAST") + b"\n")
    options = f"[batch]\ndeadline_s = 60.0\n[stations.options]\nfile = '{gate}'\nonly = 'LAST'\n"
    config = kafka_config(
        folder,
        broker="127.0.0.1:1",
        topic="readings",
        receiver=target,
        handler="tests.service.handlers:open_gated",
        extra=options + tracing,
    )
    async with open_part("replay", str(file), "--config", str(config)) as service:
        await wait_until(lambda: ends_when(service.lines))
        gate.touch()
        code = await service.ends(seconds=25)  # an exporter by itself would try for longer
    assert code == 0, service.lines
    return service.lines


def spans_of(collector: ScriptedServer) -> dict[str, list[tuple[str, str, str]]]:
    """Return what a collector got: service -> (name, trace id, span id)."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for seen in collector.seen:
        assert seen.target == "/v1/traces"
        for part in ExportTraceServiceRequest.FromString(seen.body).resource_spans:
            names = {one.key: one.value.string_value for one in part.resource.attributes}
            spans = found.setdefault(names["service.name"], [])
            for scope in part.scope_spans:
                spans += [(s.name, s.trace_id.hex(), s.span_id.hex()) for s in scope.spans]
    return found


async def test_the_service_sends_its_spans_to_the_collector_and_the_trace_to_the_target(
    tmp_path: Path,
) -> None:
    async with open_server() as collector, open_server() as target:
        tracing = f'[tracing]\nendpoint = "{collector.url}/v1/traces"\nratio = 1\n'
        await replay(
            tmp_path,
            target=target.url,
            tracing=tracing,
            ends_when=lambda _: len(spans_of(collector).get("stationmaster", ())) >= 4,
        )

    told, _, flags = target.seen[0].headers["traceparent"].rpartition("-")
    trace = told.split("-")[1]
    spans = [span for span in spans_of(collector)["stationmaster"] if span[1] == trace]
    assert sorted(name for name, _, _ in spans) == ["batch", "station", "station", "upload"]
    (upload,) = [span for span in spans if span[0] == "upload"]
    assert told == f"00-{upload[1]}-{upload[2]}"
    assert int(flags, 16) & 1  # the newer SDKs also say that the id is random


async def test_the_environment_of_opentelemetry_counts_where_the_configuration_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server() as collector, open_server() as target:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "plants")
        tracing = "[tracing]\nratio = 1\nstation_spans = 0\n"
        await replay(
            tmp_path,
            target=target.url,
            tracing=tracing,
            ends_when=lambda _: len(spans_of(collector).get("plants", ())) >= 2,
        )
    trace = target.seen[0].headers["traceparent"].split("-")[1]
    spans = [span for span in spans_of(collector)["plants"] if span[1] == trace]
    assert sorted(name for name, _, _ in spans) == ["batch", "upload"]


async def test_a_collector_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with open_server(lambda _: HANG) as collector, open_server() as target:
        tracing = f'[tracing]\nendpoint = "{collector.url}/v1/traces"\nratio = 1\n'
        lines = await replay(
            tmp_path, target=target.url, tracing=tracing, ends_when=lambda _: bool(collector.seen)
        )
    assert any('"last spans given up"' in line for line in lines)


async def test_a_collector_that_refuses_is_told_in_the_log_and_harms_nothing(
    tmp_path: Path,
) -> None:
    async with open_server(lambda _: Reply(status=401)) as collector, open_server() as target:
        tracing = f'[tracing]\nendpoint = "{collector.url}/v1/traces"\nratio = 1\n'
        await replay(
            tmp_path,
            target=target.url,
            tracing=tracing,
            ends_when=lambda lines: any("401" in line for line in lines),
        )
    assert len(target.seen) == 2


async def test_without_the_extra_the_table_is_refused_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = "stationmaster.service.tracing"
    for module in ("exporting", "spans", "wrappers"):
        monkeypatch.delitem(sys.modules, f"{package}.{module}", raising=False)
    for module in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"tracing: .*pip install 'stationmaster\[otel\]'"):
        async with open_tracing(TracingConfig()):
            raise AssertionError


async def test_settings_that_opentelemetry_refuses_are_a_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(ConfigError, match=r"tracing: .*OTEL_"):
        async with open_tracing(TracingConfig()):
            raise AssertionError


async def test_without_the_table_nothing_is_wrapped() -> None:
    async with open_tracing(None) as tracing:
        part: Any = object()
        assert isinstance(tracing, Untraced)
        for wrap in (tracing.handler, tracing.batcher, tracing.embedder, tracing.sink):
            assert wrap(part) is part
        assert (tracing.observers, tracing.http_headers) == ((), None)


def test_the_service_does_not_import_opentelemetry_by_itself() -> None:
    look = (
        "import sys, stationmaster.service.cli; print([m for m in sys.modules if 'opentel' in m])"
    )
    said = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("others", [True, False])
def test_a_tracer_provider_that_somebody_set_before_stays_the_global_one(others: bool) -> None:
    program = f"""
import trio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from stationmaster.service.config import TracingConfig
from stationmaster.service.tracing import open_tracing

async def main():
    async with open_tracing(TracingConfig(endpoint="http://127.0.0.1:1")) as tracing:
        print(trace.get_tracer_provider() is before, bool(tracing.observers))

before = TracerProvider()
if {others}:
    trace.set_tracer_provider(before)
trio.run(main)
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(others), "True"]
