"""The built-in handler: how readings become one text, and what it does when the batcher is full."""

from __future__ import annotations

from array import array
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pytest
import trio

from stationmaster.abc import NullObserver
from stationmaster.batch import Outcome, StationInput
from stationmaster.batch_handlers import BatchLanes, open_batch_lanes
from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.collector import Collector
from stationmaster.drafts import draft_batch
from stationmaster.errors import BatcherClosedError, ConfigError, QueueFullError
from stationmaster.handlers import EmbedOptions, Resources, embed, embed_batch
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.telemetry import batch, closed, message, opened, run, stations_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector


def station(*readings: dict[str, Any]) -> StationInput:
    entries = [{"stationId": "S1", **reading} for reading in readings]
    draft = draft_batch([message(*entries)], by="message", group_id="")
    made = attrs.evolve(batch("S1"), entries=draft.entries, last_message=draft.last_message)
    return StationInput("S1", made.entries["S1"], made, made.last_message["S1"])


@attrs.define
class Model:
    """A batcher that is full for the first `full` requests."""

    full: int = 0
    retry_after_s: float = 0.25
    vector: Vector = (1.0, 0.5)
    asked: list[str] = attrs.field(factory=list)

    async def embed(self, text: str, /) -> Vector:
        self.asked.append(text)
        await trio.lowlevel.checkpoint()
        if len(self.asked) <= self.full:
            raise QueueFullError(capacity=1, retry_after_s=self.retry_after_s)
        return self.vector

    async def embed_many(
        self, texts: Sequence[str], /, *, return_errors: Literal[True]
    ) -> list[Vector | Exception]:
        return [await self.embed(text) for text in texts]

    def expect(self, rows: int, /) -> None: ...


# --------------------------------------------------------------------------------------------------------------- texts


def test_without_options_the_text_is_the_reading_as_canonical_json() -> None:
    text = EmbedOptions().text(station({"wind": 3.5, "air": {"o3": 1, "co": None}}))
    assert text == '{"air":{"co":null,"o3":1},"wind":3.5}'


def test_several_readings_are_an_array_in_their_order() -> None:
    assert EmbedOptions().text(station({"x": 2}, {"x": 1})) == '[{"x":2},{"x":1}]'


def test_chosen_fields_are_kept_and_missing_ones_left_out() -> None:
    options = EmbedOptions.read({"fields": ["pm25", "o3"]})
    assert options.text(station({"o3": 1, "wind": 2}, {"pm25": 3})) == '[{"o3":1},{"pm25":3}]'


def test_a_template_is_filled_from_the_last_reading_and_the_station_id() -> None:
    options = EmbedOptions.read({"template": "{station_id} at {site}: {pm25:.1f} {{ug/m3}}"})
    text = options.text(station({"site": "old", "pm25": 1}, {"site": "new", "pm25": 2}))
    assert text == "S1 at new: 2.0 {ug/m3}"


def test_a_template_that_names_an_absent_field_says_which() -> None:
    options = EmbedOptions.read({"template": "{pm25}"})
    with pytest.raises(LookupError, match="the template names 'pm25', the reading has no such"):
        options.text(station({"o3": 1}))


def test_options_that_are_not_given_are_the_defaults() -> None:
    assert EmbedOptions.read({}) == EmbedOptions()


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ({"field": []}, ["stations.options.field: unknown key; expected fields or template"]),
        ({"fields": "pm25"}, ["stations.options.fields: expected a list of texts"]),
        ({"fields": [1]}, ["stations.options.fields: expected a list of texts"]),
        ({"template": 1}, ["stations.options.template: expected a text"]),
        (
            {"fields": ["a"], "template": "{a}"},
            ["stations.options.template: stands beside fields; expected one of them"],
        ),
        (
            {"template": "{a"},
            [
                "stations.options.template: expected '}' before end of string; expected a format string"
            ],
        ),
        (
            {"template": "{}"},
            [
                "stations.options.template: has a field without a name; expected names of readings in braces"
            ],
        ),
        (
            {"template": "{0}"},
            [
                "stations.options.template: has a field without a name; expected names of readings in braces"
            ],
        ),
        (
            {"x": 1, "fields": 2, "template": 3},
            [
                "stations.options.x: unknown key; expected fields or template",
                "stations.options.fields: expected a list of texts",
                "stations.options.template: expected a text",
            ],
        ),
    ],
)
def test_wrong_options_are_refused_all_at_once(options: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EmbedOptions.read(options)
    assert list(caught.value.faults) == faults


# ------------------------------------------------------------------------------------------------------------- handler


@pytest.mark.parametrize("vector", [(1.0, 0.5), [1.0, 0.5], memoryview(array("f", [1.0, 0.5]))])
async def test_the_result_has_the_vector_the_model_and_the_dimensions(
    vector: Sequence[float],
) -> None:
    model = Model(vector=vector)
    async with embed(Resources(embedder=model, model="readings-128")) as handle:
        result = await handle(station({"x": 1}))
    assert result == {"embedding": [1.0, 0.5], "model": "readings-128", "dimensions": 2}
    assert model.asked == ['{"x":1}']


async def test_a_full_batcher_is_asked_again_when_it_expects_room(
    autojump_clock: MockClock,
) -> None:
    model = Model(full=3)
    async with embed(Resources(embedder=model)) as handle:
        await handle(station({"x": 1}))
    assert len(model.asked) == 4
    assert trio.current_time() == 0.75


async def test_waiting_for_room_ends_with_the_batch(autojump_clock: MockClock) -> None:
    model = Model(full=10**9)
    async with embed(Resources(embedder=model)) as handle, stations_of(handle) as stations:
        results = await run(stations, "S1")
    assert results["S1"].outcome is Outcome.TIMED_OUT
    assert trio.current_time() == 5.0
    assert len(model.asked) == 20


async def test_a_full_batcher_that_names_no_time_is_not_asked_in_a_tight_loop(
    autojump_clock: MockClock,
) -> None:
    model = Model(full=5, retry_after_s=0.0)
    async with embed(Resources(embedder=model)) as handle:
        await handle(station({"x": 1}))
    assert trio.current_time() == pytest.approx(0.005)


async def test_without_a_model_server_or_with_wrong_options_there_is_no_handler() -> None:
    with pytest.raises(ConfigError, match="the handler `embed` needs a model server"):
        async with embed(Resources()):
            pass
    with pytest.raises(ConfigError, match=r"stations\.options\.x"):
        async with embed(Resources(embedder=Model(), options={"x": 1})):
            pass


# ------------------------------------------------------------------------------------------------- the batch handler


@asynccontextmanager
async def embedding_lanes(
    embedder: ScriptedEmbedder,
    *,
    observer: RecordingObserver | None = None,
    options: dict[str, Any] | None = None,
    **policy: Any,
) -> AsyncIterator[BatchLanes]:
    observer = observer or RecordingObserver()
    async with (
        open_batcher(embedder, policy=BatchPolicy(**policy)) as batcher,
        embed_batch(
            Resources(embedder=batcher, model="readings-128", options=options or {})
        ) as handler,
        open_batch_lanes(
            handler,
            ordered=True,
            queue_capacity=64,
            result_bytes=10_000,
            on_eased=lambda: None,
            on_crash=lambda: None,
            observer=observer,
        ) as lanes,
    ):
        yield lanes


async def embedded(lanes: BatchLanes, *stations: object, deadline_s: float = 5) -> Any:
    """Hand over one batch of these stations and return its results."""
    draft = draft_batch([message(*stations)], by="message", group_id="")
    collector = opened("S1", deadline_s=deadline_s)
    made = attrs.evolve(collector.batch, entries=draft.entries, last_message=draft.last_message)
    collector = Collector(
        made, opened=collector.opened, quorum=1.0, report_bytes=10**9, observer=NullObserver()
    )
    await lanes.hand_over(collector)
    return await closed(collector)


async def test_the_batch_handler_gives_each_station_its_own_vector() -> None:
    embedder = ScriptedEmbedder()
    async with embedding_lanes(embedder) as lanes:
        results = await embedded(lanes, {"stationId": "S1", "x": 1}, {"stationId": "S2", "x": 2})
    assert {name: result.value for name, result in results.items()} == {
        name: {"embedding": embedder.vector(text), "model": "readings-128", "dimensions": 4}
        for name, text in (("S1", '{"x":1}'), ("S2", '{"x":2}'))
    }


@pytest.mark.parametrize(
    ("stations", "most", "calls"), [(10, 32, 1), (100, 32, 4), (100, 128, 1), (1_000, 128, 8)]
)
async def test_a_batch_makes_as_few_calls_as_it_can_and_waits_for_no_company(
    autojump_clock: MockClock, stations: int, most: int, calls: int
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=0.02)
    entries = [{"stationId": f"S{number}", "x": number} for number in range(stations)]
    async with embedding_lanes(embedder, max_batch_rows=most, max_in_flight=8) as lanes:
        await embedded(lanes, *entries)
    assert len(embedder.calls) == calls
    if stations <= 100:
        assert trio.current_time() == pytest.approx(
            0.02
        )  # announced: the last row waits for nobody


async def test_the_stations_of_a_batch_that_ask_one_by_one_need_more_calls(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=0.02)
    async with (
        open_batcher(embedder, policy=BatchPolicy(max_batch_rows=128)) as batcher,
        embed(Resources(embedder=batcher)) as handle,
        stations_of(handle) as stations,
    ):
        collector = opened(*(f"S{number}" for number in range(100)))
        await stations.hand_over(collector)
        results = await closed(collector)
    assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}
    assert 2 <= len(embedder.calls) <= 4  # of 32 stations each, as they are handed out


async def test_a_station_without_a_text_or_with_a_refused_one_fails_alone() -> None:
    embedder = ScriptedEmbedder(refuses=lambda text: text == "bad")
    options = {"template": "{x}"}
    async with embedding_lanes(embedder, options=options) as lanes:
        results = await embedded(
            lanes,
            {"stationId": "good", "x": "fine"},
            {"stationId": "absent"},
            {"stationId": "refused", "x": "bad"},
            {"stationId": "empty", "x": ""},
        )
    outcomes = {name: result.outcome for name, result in results.items()}
    assert outcomes == {
        "good": Outcome.SUCCEEDED,
        "absent": Outcome.FAILED,
        "refused": Outcome.FAILED,
        "empty": Outcome.FAILED,
    }
    assert "the template names 'x'" in results["absent"].reason
    assert results["refused"].reason.startswith("RowRejectedError: ")


async def test_a_text_that_can_never_fit_harms_no_other(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder()
    async with embedding_lanes(
        embedder, options={"template": "{x}"}, max_queue_bytes=100, max_batch_bytes=100
    ) as lanes:
        results = await embedded(
            lanes, {"stationId": "S1", "x": "y" * 101}, {"stationId": "S2", "x": "fine"}
        )
    assert results["S1"].reason.startswith("RequestTooLargeError: ")
    assert results["S2"].outcome is Outcome.SUCCEEDED


async def test_a_batch_larger_than_the_queue_waits_its_turn(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=0.02)
    entries = [{"stationId": f"S{number}", "x": number} for number in range(500)]
    async with embedding_lanes(embedder, max_queue_rows=64) as lanes:
        results = await embedded(lanes, *entries)
    assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}


async def test_what_was_answered_before_the_deadline_is_not_lost(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(script=[None, hang], seconds_per_call=0.02)
    entries = [{"stationId": f"S{number}", "x": number} for number in range(64)]
    async with embedding_lanes(embedder, max_in_flight=1) as lanes:
        results = await embedded(lanes, *entries, deadline_s=1)
    outcomes = [result.outcome for result in results.values()]
    assert outcomes.count(Outcome.SUCCEEDED) == 32
    assert outcomes.count(Outcome.TIMED_OUT) == 32


async def test_a_closed_batcher_fails_the_stations_and_not_the_lane() -> None:
    embedder = ScriptedEmbedder()
    async with open_batcher(embedder) as batcher:
        pass
    async with embed_batch(Resources(embedder=batcher)) as handle:
        reported: dict[str, object] = {}
        await handle(batch("S1", "S2"), reported.__setitem__)
    assert {type(answer) for answer in reported.values()} == {BatcherClosedError}
    assert set(reported) == {"S1", "S2"}


async def test_the_batch_handler_needs_a_model_server_too() -> None:
    with pytest.raises(ConfigError, match="needs a model server"):
        async with embed_batch(Resources()):
            pass


async def test_lack_of_memory_while_a_text_is_made_ends_the_pipeline() -> None:
    class Huge:
        def __getattr__(self, name: str) -> str:
            raise MemoryError

    made = batch("S1")
    made = attrs.evolve(made, entries={"S1": ({"x": Huge()},)})
    async with embed_batch(Resources(embedder=Model(), options={"template": "{x.size}"})) as handle:
        with pytest.RaisesGroup(MemoryError):
            await handle(made, lambda *_: None)
