"""What `[stations] handler` and `on_result` may name: every kind, bare or from a factory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stationmaster.errors import ConfigError
from stationmaster.handlers import Resources
from stationmaster.service.handler_loading import open_handler, open_hook
from stationmaster.workers import kind_of
from tests.service import factories, handlers

if TYPE_CHECKING:
    from pathlib import Path

HERE = "tests.service.handlers"


@pytest.mark.parametrize(
    ("name", "kind"), [("brief", "station"), ("plain", "blocking"), ("whole", "batch")]
)
async def test_a_function_of_any_kind_is_the_handler_itself(name: str, kind: str) -> None:
    async with open_handler(f"{HERE}:{name}", Resources()) as handler:
        assert handler is getattr(handlers, name)
        assert kind_of(handler) == kind


@pytest.mark.parametrize("name", ["open_whole", "OpenPlain"])
async def test_a_factory_may_give_any_kind(name: str) -> None:
    async with open_handler(f"{HERE}:{name}", Resources()) as handler:
        assert handler in {handlers.whole, handlers.plain}


@pytest.mark.parametrize("name", ["embed", "embed_batch"])
async def test_the_built_in_ones_need_a_model_server(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a model server"):
        async with open_handler(name, Resources()):
            pass


async def test_a_hook_may_come_from_a_factory_too(tmp_path: Path) -> None:
    file = tmp_path / "output"
    async with open_hook(f"{HERE}:open_hook", Resources(options={"file": str(file)})):
        assert file.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brief", "brief is no hook; expected `async def on_result(station, result)`"),
        ("make_number", "returned a int; expected an async context manager"),
        ("missing", "has no 'missing'"),
    ],
)
async def test_what_is_no_hook_is_a_fault_of_configuration(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with open_hook(f"{HERE}:{name}", Resources()):
            pass
    (fault,) = caught.value.faults
    assert fault.startswith(f"stations.on_result: '{HERE}:{name}' ")
    assert words in fault


async def test_a_built_in_function_is_no_factory() -> None:
    with pytest.raises(ConfigError, match="min has no signature"):
        async with open_handler("builtins:min", Resources()):
            pass


@pytest.mark.parametrize(
    "name",
    ["handle", "handle_of_shelf", "handle_of_unknown_shelf", "handle_unknown", "handle_with_ours"],
)
async def test_a_plain_function_whose_annotations_look_like_a_factory_s_is_the_handler(
    name: str,
) -> None:
    async with open_handler(f"tests.service.factories:{name}", Resources()) as handler:
        assert handler is getattr(factories, name)


@pytest.mark.parametrize(
    "name", ["open_plain", "open_optional", "open_quoted", "open_quoted_twice", "open_unknown"]
)
async def test_a_plain_function_that_takes_resources_is_a_factory(name: str) -> None:
    async with open_handler(f"tests.service.factories:{name}", Resources()) as handler:
        assert handler is factories.handle
