"""The service's metrics: one definition of each, an observer that counts, and a page of text to be scraped."""

from stationmaster.service.metrics.moments import Moments
from stationmaster.service.metrics.observer import Metrics, open_metrics

__all__ = ["Metrics", "Moments", "open_metrics"]
