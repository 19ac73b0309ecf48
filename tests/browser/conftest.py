"""The browser of the tests in this folder: Debian's Chromium and its driver.

Where these are not installed the tests skip, saying why; with STATIONMASTER_REQUIRE_BROWSER=1 they fail instead.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.browser.driver import Browser, UnavailableError, find_programs, open_browser

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    try:
        find_programs()
    except UnavailableError as error:
        if os.environ.get("STATIONMASTER_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(f"no browser here: {error}")
    async with open_browser() as opened:
        yield opened
