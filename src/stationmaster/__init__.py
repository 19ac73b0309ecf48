"""Every batch leaves on time: station telemetry, run concurrently under a deadline, uploaded as one list per batch.

The library has two doors, both async context managers: `open_pipeline()` runs batches from a source through a handler
to a sink, `open_batcher()` shares calls to a model server among many callers. Sources and sinks have modules of their
own: `stationmaster.kafka`, `stationmaster.files`, `stationmaster.sinks`, `stationmaster.embeddings`; fakes for tests
are in `stationmaster.testing`.
"""

__version__ = "0.1.0"

from stationmaster.batch import (
    Batch,
    BatchReport,
    ClosedBy,
    Outcome,
    StationInput,
    StationResult,
)
from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.handlers import Resources, embed, embed_batch
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.settings import PipelineSettings, TopicSettings

__all__ = [
    "Batch",
    "BatchPolicy",
    "BatchReport",
    "Batcher",
    "ClosedBy",
    "Outcome",
    "Pipeline",
    "PipelineSettings",
    "Resources",
    "StationInput",
    "StationResult",
    "TopicSettings",
    "embed",
    "embed_batch",
    "open_batcher",
    "open_pipeline",
]
