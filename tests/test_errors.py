"""The error tree, and how a lone error leaves a nursery."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import trio

from stationmaster import errors
from stationmaster.errors import (
    BatcherError,
    ConfigError,
    EmbedderBusyError,
    EmbedderError,
    QueueFullError,
    StationmasterError,
    UploadFailedError,
    plain_errors,
)


def test_every_error_is_in_the_tree_and_its_name_says_so() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    raised = [kind for kind in kinds if issubclass(kind, BaseException)]
    assert len(raised) > 10
    for kind in raised:
        assert issubclass(kind, StationmasterError)
        assert kind.__name__.endswith("Error")
        assert kind.__doc__
        assert kind.__name__ in str(errors.__doc__)
    assert issubclass(QueueFullError, BatcherError)
    assert issubclass(EmbedderBusyError, EmbedderError)


@pytest.mark.parametrize(
    ("error", "facts", "words"),
    [
        (ConfigError(["a: 1", "b: 2"]), {"faults": ("a: 1", "b: 2")}, "a: 1\nb: 2"),
        (
            UploadFailedError(batch_id="air_0_1_2", attempts=3, limit_s=60.0, last_answer="503"),
            {"batch_id": "air_0_1_2", "attempts": 3, "limit_s": 60.0, "last_answer": "503"},
            "batch air_0_1_2 was not accepted within 60 s (3 attempts, last: 503)",
        ),
        (
            QueueFullError(capacity=8, retry_after_s=0.25),
            {"capacity": 8, "retry_after_s": 0.25},
            "the queue of 8 rows is full; try again in 0.25 s",
        ),
        (EmbedderBusyError("busy", retry_after_s=2.0), {"retry_after_s": 2.0}, "busy"),
        (EmbedderBusyError("busy"), {"retry_after_s": None}, "busy"),
    ],
)
def test_the_facts_of_an_error_are_attributes_and_its_words_name_them(
    error: StationmasterError, facts: dict[str, Any], words: str
) -> None:
    assert {name: getattr(error, name) for name in facts} == facts
    assert str(error).startswith(words)


# -------------------------------------------------------------------------------------------------------- plain_errors


def test_without_a_group_everything_passes_as_it_is() -> None:
    with plain_errors():
        pass
    with pytest.raises(KeyError, match="x"), plain_errors():
        raise KeyError("x")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_lone_error_leaves_its_groups_however_many_there_are(
    kind: type[BaseException], depth: int
) -> None:
    lone = kind("lone")
    group: BaseException = lone
    for _ in range(depth):
        group = BaseExceptionGroup("nursery", [group])
    with pytest.raises(kind) as caught, plain_errors():
        raise group
    assert caught.value is lone


def through_plain_errors(error: Exception, left: type[Exception]) -> Exception:
    with pytest.raises(left) as caught, plain_errors():
        raise error
    return caught.value


def test_several_errors_stay_a_group_as_it_was() -> None:
    group = ExceptionGroup("two", [ValueError(), ExceptionGroup("one", [KeyError()])])
    assert through_plain_errors(group, ExceptionGroup) is group


def test_a_group_around_several_errors_loses_its_empty_shells() -> None:
    inner = ExceptionGroup("two", [ValueError(), KeyError()])
    assert through_plain_errors(ExceptionGroup("outer", [inner]), ExceptionGroup) is inner


def test_a_lone_error_keeps_its_cause_its_context_and_shows_no_group() -> None:
    lone = ValueError("cannot go on")
    lone.__cause__ = OSError("no route")
    lone.__context__ = context = KeyError("before")
    left = through_plain_errors(ExceptionGroup("nursery", [lone]), ValueError)
    assert left is lone
    assert isinstance(left.__cause__, OSError)
    assert left.__context__ is context
    text = "".join(traceback.format_exception(left))
    assert "no route" in text
    assert "nursery" not in text


async def test_a_lone_error_leaves_a_nursery_as_itself() -> None:
    async def fail() -> None:
        raise LookupError("gone")

    async def run() -> None:
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(fail)

    with pytest.raises(LookupError, match="gone"):
        await run()


async def test_a_cancel_is_no_error() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught
