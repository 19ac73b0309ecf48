"""What the benchmarks share: contenders that take turns, ratios within a round, goals, environments of peers, plots.

A contender is a script: it gets its order as one argument (JSON) and tells its figures as its last line (JSON). Every
run is a process of its own, so that no contender inherits the garbage or the warm caches of another.
"""
