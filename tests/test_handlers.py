"""The built-in handler: how readings become one text, and what it does when the batcher is full."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.batch import Outcome, StationInput
from stationmaster.errors import ConfigError, QueueFullError
from stationmaster.handlers import EmbedOptions, Resources, embed
from stationmaster.poller import draft_batch
from tests.telemetry import batch, message, run, stations_of

if TYPE_CHECKING:
    from collections.abc import Sequence

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
