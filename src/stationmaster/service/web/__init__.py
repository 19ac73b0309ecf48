"""The service's web ring: probes, metrics, status as JSON and as events, and the page."""

from stationmaster.service.web.opening import open_web

__all__ = ["open_web"]
