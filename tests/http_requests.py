"""One-off requests of tests, over the project's own client."""

from __future__ import annotations

import json
from typing import Any

from stationmaster.http import open_http_client


async def post_json(url: str, document: dict[str, Any]) -> int:
    """Post a JSON document and return the status."""
    async with open_http_client(url, headers={"Content-Type": "application/json"}) as client:
        answer = await client.request("POST", content=json.dumps(document).encode())
        return answer.status
