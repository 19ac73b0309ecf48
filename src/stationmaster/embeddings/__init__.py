"""Embedders over HTTP: clients of single model servers, and several of them behind one door.

open_endpoints()          several servers as one embedder: breakers, pauses, another one after a failure
open_openai_embedder()    one server with an OpenAI-like `POST /embeddings`
open_tei_embedder()       one Text Embeddings Inference server: `POST /embed`, limits from `GET /info`
"""

from __future__ import annotations

from stationmaster.embeddings.endpoint import EndpointStatistics
from stationmaster.embeddings.endpoints import Endpoints
from stationmaster.embeddings.openai import OpenAIEmbedder, open_openai_embedder
from stationmaster.embeddings.opening import open_endpoints
from stationmaster.embeddings.tei import TeiBudget, TeiEmbedder, open_tei_embedder

__all__ = [
    "EndpointStatistics",
    "Endpoints",
    "OpenAIEmbedder",
    "TeiBudget",
    "TeiEmbedder",
    "open_endpoints",
    "open_openai_embedder",
    "open_tei_embedder",
]
