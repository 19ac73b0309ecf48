"""Quix Streams: synchronous handlers; a batching sink, flushed at each checkpoint, is the upload."""

import logging
import tempfile

import work
from quixstreams import Application
from quixstreams.sinks import BatchingSink

logging.disable(logging.CRITICAL)
tally = work.Tally()


class Upload(BatchingSink):
    def write(self, batch):
        tally.upload(sum(len(item.value) for item in batch))


def handle(message):
    tally.start()
    return [{"stationId": station["stationId"], "ok": 1} for station in message["stationData"]]


with tempfile.TemporaryDirectory() as folder:
    application = Application(
        broker_address=work.BOOTSTRAP,
        consumer_group=work.GROUP,
        auto_offset_reset="earliest",
        commit_every=work.POLL_RECORDS,
        commit_interval=60,
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel=None,
        state_dir=folder,
        consumer_extra_config={"session.timeout.ms": 6000, "heartbeat.interval.ms": 500},
    )
    topic = application.topic(work.TOPIC, value_deserializer="json")
    application.dataframe(topic).apply(handle).sink(Upload())
    application.run(count=work.MESSAGES, timeout=60)
    tally.report()
