"""A deterministic simulation: the real poller, stations, batches, uploader, outbox and batcher on virtual time.

What surrounds them is scripted by dice: the broker, the handlers, the model server, the target, the disk, the wall
clock, and the ends of the process. One seed makes one history, in every process.

    python -m tests.simulation --seeds 1000         many histories, and what they saw
    python -m tests.simulation --from 17            one of them again
    python -m tests.simulation --mutants            deliberate bugs: does it see them?

From the bottom: `dice` (which fault strikes when), `scheduling` (trio's order of tasks, steps, threads without a clock
of their own), `telemetry` (the log of records), `counterparts` (broker, disk, target, model server), `watch` (what must
hold for batches), `handlers` (what stations do, and what must hold for jobs), `life` (one process), `world` (one
history), `shrinking` (the smallest set of faults that still breaks it), `mutants`, `figures` (what a run saw),
`command`.
"""
