"""FastStream: a batch subscriber, all stations at once under one deadline, acknowledged after the upload."""

import asyncio
import logging

import work
from faststream import AckPolicy

if work.TOLD["client"] == "confluent":
    from faststream.confluent import KafkaBroker
else:
    from faststream.kafka import KafkaBroker

logging.disable(logging.CRITICAL)
tally = work.Tally()
broker = KafkaBroker(work.BOOTSTRAP)
complete = asyncio.Event()


@broker.subscriber(
    work.TOPIC,
    batch=True,
    group_id=work.GROUP,
    auto_offset_reset="earliest",
    max_records=work.POLL_RECORDS,
    ack_policy=AckPolicy.ACK,
)
async def on_batch(messages: list[dict]):
    tally.start()
    stations = [station["stationId"] for message in messages for station in message["stationData"]]
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*map(work.handler, stations), return_exceptions=True)
    tally.upload(sum(isinstance(answer, dict) for answer in answers))
    if tally.done:
        complete.set()


async def main():
    await broker.start()
    await complete.wait()
    tally.report()
    await broker.stop()


asyncio.run(main())
