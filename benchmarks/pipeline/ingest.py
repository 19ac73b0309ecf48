"""Ingest alone, nothing parsed: the project's pump, or a thread with the bare client.

Both read out of each message what a record consists of; the thread keeps and commits nothing of it.
"""

import threading

import trio
import work

tally = work.Tally(expected=work.MESSAGES)


async def through_the_pump():
    from stationmaster_pipeline import kafka_settings

    from stationmaster.batch import OffsetRange
    from stationmaster.kafka import open_kafka_source

    async with open_kafka_source(kafka_settings()) as source:
        while not tally.done:
            records = await source.poll()
            tally.start()
            for record in records:
                place = {"topic": record.topic, "partition": record.partition}
                offset = {"first": record.offset, "last": record.offset}
                source.account(OffsetRange(**place, **offset, generation=record.generation))
            tally.upload(len(records))
        tally.report()


def read(message):
    if message.error() is not None:
        raise SystemExit(str(message.error()))
    return (
        message.topic(),
        message.partition(),
        message.offset(),
        message.timestamp(),
        message.value(),
        message.headers(),
    )


def through_a_thread():
    from confluent_kafka import Consumer

    consumer = Consumer(
        {
            "bootstrap.servers": work.BOOTSTRAP,
            "group.id": work.GROUP,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": 6000,
            "heartbeat.interval.ms": 500,
            "fetch.wait.max.ms": 100,
        }
    )
    consumer.subscribe([work.TOPIC])
    while not tally.done:
        messages = consumer.consume(work.POLL_RECORDS, 1.0)
        if messages:
            tally.start()
            tally.upload(len([read(message) for message in messages]))
    tally.report()
    consumer.close()


if work.TOLD["pump"]:
    trio.run(through_the_pump)
else:
    thread = threading.Thread(target=through_a_thread)
    thread.start()
    thread.join()
