"""The project itself: its Kafka source and its pipeline with all checks and limits on, one batch per poll.

The handlers answer as the classic designs' does: one result per reading, so that the same number of results arrives.
"""

import trio
import work

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.abc import Accepted
from stationmaster.kafka import KafkaSettings, open_kafka_source

tally = work.Tally()


async def handle(station):
    tally.start()
    return {"readings": [await work.handler(station.station_id) for _ in station.readings]}


async def handle_batch(batch, report):
    tally.start()
    await trio.lowlevel.checkpoint()
    for station_id, readings in batch.entries.items():
        report(station_id, {"readings": [await work.handler(station_id) for _ in readings]})


HANDLERS = {"station": handle, "batch": handle_batch}


class CountingSink:
    def __init__(self):
        self.complete = trio.Event()

    async def upload(self, report):
        await trio.lowlevel.checkpoint()
        tally.upload(sum(len(result.value["readings"]) for result in report.results))
        if tally.done:
            self.complete.set()
        return Accepted()


def kafka_settings():
    return KafkaSettings(
        bootstrap_servers=work.BOOTSTRAP,
        group_id=work.GROUP,
        topics=(work.TOPIC,),
        max_poll_messages=work.POLL_RECORDS,
        drain_timeout_s=10.0,
        assignor="range",
        session_timeout_s=6.0,
        options={"heartbeat.interval.ms": 500, "fetch.wait.max.ms": 100},
    )


async def main():
    sink = CountingSink()
    batches = PipelineSettings(by="poll", group_id=work.GROUP, report_bytes=2**30)
    handler = HANDLERS[work.TOLD["handler"]]
    async with open_kafka_source(kafka_settings()) as source:
        async with open_pipeline(source, handler=handler, sink=sink, settings=batches):
            await sink.complete.wait()
            tally.report()


if __name__ == "__main__":
    trio.run(main)
