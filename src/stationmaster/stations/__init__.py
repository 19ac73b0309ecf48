"""The stations: one task, one nursery and one bounded channel each; a failed or stuck one never blocks another.

`registry` owns them and hands a batch's jobs to them, `station` is one of them at work, `health` is what its past says
of its next job.
"""

from stationmaster.stations.registry import Stations, open_stations

__all__ = ["Stations", "open_stations"]
