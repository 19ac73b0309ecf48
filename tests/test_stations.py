"""The stations: one job at a time, in order, and whatever one of them does harms no other."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.batch import Outcome
from tests.telemetry import closed, opened, run, stations_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio.testing import MockClock

    from stationmaster.batch import StationInput


# --------------------------------------------------------------------------------------------------------------- order


async def test_a_station_works_on_one_job_at_a_time_in_the_order_of_the_batches(
    autojump_clock: MockClock,
) -> None:
    ran: list[tuple[str, float]] = []

    async def handle(station: StationInput) -> Mapping[str, Any]:
        began = trio.current_time()
        await trio.sleep(1)
        ran.append((station.batch_id, began))
        return {}

    async with stations_of(handle) as stations:
        collectors = [opened("A", offset=offset) for offset in range(4)]
        for collector in collectors:
            stations.submit(collector, "A")
        for collector in collectors:
            assert (await closed(collector))["A"].outcome is Outcome.SUCCEEDED
    assert ran == [("air_0_0_0", 0), ("air_0_1_0", 1), ("air_0_2_0", 2), ("air_0_3_0", 3)]


async def test_stations_work_beside_each_other(autojump_clock: MockClock) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(0.8)

    async with stations_of(handle) as stations:
        await run(stations, *(f"S{number}" for number in range(100)))
        assert trio.current_time() == pytest.approx(0.8)
        assert len(stations) == 100


async def test_a_handler_is_given_its_station_and_the_ambient_deadline_of_its_batch(
    autojump_clock: MockClock,
) -> None:
    seen: list[tuple[str, float, float]] = []

    async def handle(station: StationInput) -> None:
        seen.append((station.station_id, station.deadline, trio.current_effective_deadline()))

    async with stations_of(handle) as stations:
        for deadline_s in (5.0, 3.0, 4.0):
            await run(stations, "A", deadline_s=deadline_s)
            await trio.sleep(10)
    assert seen == [("A", 5.0, 5.0), ("A", 13.0, 13.0), ("A", 24.0, 24.0)]


# ------------------------------------------------------------------------------------------------------------ outcomes


class Unprintable:
    """Nothing that JSON knows."""


def unreadable(error: object) -> str:
    raise RuntimeError("no text")


UnreadableError = type("UnreadableError", (Exception,), {"__str__": unreadable})

OUTCOMES: dict[str, tuple[object, Outcome, str]] = {
    "a mapping": ({"x": 1}, Outcome.SUCCEEDED, ""),
    "another mapping": (types.MappingProxyType({"x": 1}), Outcome.SUCCEEDED, ""),
    "an empty mapping": ({}, Outcome.SUCCEEDED, ""),
    "none": (None, Outcome.NO_OUTPUT, "the handler returned None"),
    "a list": ([1], Outcome.FAILED, "the handler returned list, expected a mapping or None"),
    "a text": ("x", Outcome.FAILED, "the handler returned str, expected a mapping or None"),
    "no JSON": ({"x": Unprintable()}, Outcome.FAILED, "Type is not JSON serializable: Unprintable"),
    "keys that are no texts": ({1: 2}, Outcome.FAILED, "Dict key must be str"),
    "a huge integer": ({"x": 2**64}, Outcome.FAILED, "Integer exceeds 64-bit range"),
    "half a character": ({"x": "\ud800"}, Outcome.FAILED, "surrogates not allowed"),
    "too many bytes": ({"x": "y" * 10_000}, Outcome.FAILED, "limit 10000 (limits.result_bytes)"),
    "an error": (ValueError("bad sensor"), Outcome.FAILED, "ValueError: bad sensor"),
    "an error without words": (ValueError(), Outcome.FAILED, "ValueError"),
    "a long error": (ValueError("x" * 9_999), Outcome.FAILED, "ValueError: " + "x" * 500),
    "half a character in its text": (ValueError("a\ud800b"), Outcome.FAILED, "ValueError: a?b"),
    "an error without a readable text": (
        UnreadableError(),
        Outcome.FAILED,
        "UnreadableError: its text cannot be read (RuntimeError)",
    ),
    "a group of one": (ExceptionGroup("", [KeyError("x")]), Outcome.FAILED, "KeyError: 'x'"),
    "a group of two": (
        ExceptionGroup("two", [KeyError("x"), ValueError()]),
        Outcome.FAILED,
        "ExceptionGroup: two (2 sub-exceptions)",
    ),
    "its own too slow error": (trio.TooSlowError(), Outcome.FAILED, "TooSlowError"),
}


@pytest.mark.parametrize("kind", OUTCOMES)
async def test_what_a_handler_returns_or_raises_is_its_stations_outcome(kind: str) -> None:
    value, outcome, reason = OUTCOMES[kind]

    async def handle(station: StationInput) -> Any:
        if station.station_id == "good":
            return {"fine": True}
        if isinstance(value, Exception):
            raise value
        return value

    async with stations_of(handle) as stations:
        for _ in range(2):
            results = await run(stations, "A", "good")
            assert results["A"].outcome is outcome
            assert results["A"].reason.endswith(reason)
            assert len(results["A"].reason) < 600
            assert results["good"].outcome is Outcome.SUCCEEDED


async def test_a_result_is_encoded_with_its_station_first_and_cannot_change_the_id() -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        return {"x": [1.5, None], "stationId": "somebody else"}

    async with stations_of(handle) as stations:
        result = (await run(stations, "A"))["A"]
    assert result.encoded == b'{"stationId":"A","x":[1.5,null]}'


async def test_a_result_may_have_exactly_the_bytes_of_the_bound() -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        return {"x": station.station_id * 10}

    exact = len('{"stationId":"A","x":"AAAAAAAAAA"}')
    async with stations_of(handle, result_bytes=exact) as stations:
        results = await run(stations, "A", "BB")
    assert results["A"].outcome is Outcome.SUCCEEDED
    assert results["BB"].outcome is Outcome.FAILED


async def test_a_handler_that_is_no_coroutine_function_fails_its_station() -> None:
    def handle(station: StationInput) -> Any:
        return {"x": 1}

    async with stations_of(handle) as stations:
        assert (await run(stations, "A"))["A"].reason.startswith("TypeError: ")
