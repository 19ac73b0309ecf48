"""What tests ask of the HTTP servers in other processes."""

from __future__ import annotations

import json
from typing import Any

import httpx

from stationmaster.http import open_http_client
from tests.processes import READY_S


def client_of(url: str, **headers: str) -> httpx.AsyncClient:
    """A client for a server in another process, which a busy machine may let wait: its limit is a guard, no measure."""
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=READY_S)


async def post_json(url: str, document: dict[str, Any]) -> int:
    """Post a JSON document, over the project's own client, and return the status."""
    async with open_http_client(url, headers={"Content-Type": "application/json"}) as client:
        answer = await client.request("POST", content=json.dumps(document).encode())
        return answer.status
