"""A real Apache Kafka broker (KRaft, one node) for tests: start it, kill it, cut it off, look into it.

    with run_broker(folder) as broker:
        topic = broker.create_topic()
        Producer({"bootstrap.servers": broker.bootstrap}) ...

Everything blocks: some ms a question, some seconds a start. A test on trio asks directly (the Kafka client under test
has a thread of its own) and leaves `start`, `stop` and `kill` to `trio.to_thread.run_sync`.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.broker.certificates import Certificates, make_certificates
from tests.broker.jars import fetch_jars
from tests.broker.operating import ANSWER_S, Operator
from tests.relay import Relay, run_relay

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).parent

NODE_ID: Final = 1
USER: Final = "station"
PASSWORD: Final = "not-a-secret"
"""Known to the SASL listeners, by SCRAM-SHA-512 and by PLAIN."""

START_S: Final = 60.0
"""A start that takes longer has failed; it takes well under 10 s on an idle machine."""
STOP_S: Final = 10.0

_CLUSTER_ID: Final = "stationmaster-tests-00"
_PROBE: Final = "probe"

_JVM = ("-Xms256m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_JVM_SHORT = ("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")

# Ends the broker when its standard input ends: that is when whoever holds the other end is gone, in whatever way.
# A pidfd means the very process, even when its number was given to another one.
_GUARD = """
import os, signal, sys
broker = os.pidfd_open(int(sys.argv[1]))
print(flush=True)
sys.stdin.read()
try:
    signal.pidfd_send_signal(broker, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


@attrs.frozen(kw_only=True)
class Ports:
    """One for each listener of the broker, and the relay's."""

    controller: int
    plain: int
    relayed: int
    """The listener behind the relay."""
    relay: int
    """Where the clients of that listener connect."""
    tls: int
    sasl: int
    sasl_tls: int

    @classmethod
    def choose(cls) -> Ports:
        """Find free ports that stay free of passing clients, so that a restarted broker gets its own again."""
        names = [field.name for field in attrs.fields(cls)]
        with ExitStack() as stack:
            found: list[int] = []
            while len(found) < len(names):
                sock = stack.enter_context(socket.socket())
                # Below what the kernel gives to outgoing connections.
                port = random.randrange(20_000, 32_000)
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue
                found.append(port)
        return cls(**dict(zip(names, found, strict=True)))


class BrokerError(Exception):
    """The broker did not do what a test needs; the message ends with its log's tail."""


@attrs.define(eq=False)
class Broker(Operator):
    """One broker on ports and data of its own, which it keeps over restarts. Made by `run_broker`.

    `bootstrap` is its plaintext listener, where no questions are asked.
    """

    folder: Path
    jars: Path
    ports: Ports
    certificates: Certificates
    relay: Relay
    _process: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)
    _guard: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)

    # -------------------------------------------------------------------------------------------------- its addresses

    @property
    def relayed(self) -> str:
        """Plaintext through `relay`, with no way around it."""
        return f"127.0.0.1:{self.ports.relay}"

    @property
    def tls(self) -> str:
        """TLS; a client's certificate is looked at when it sends one."""
        return f"127.0.0.1:{self.ports.tls}"

    @property
    def sasl(self) -> str:
        """SASL (SCRAM-SHA-512 or PLAIN) in plaintext."""
        return f"127.0.0.1:{self.ports.sasl}"

    @property
    def sasl_tls(self) -> str:
        """SASL under TLS."""
        return f"127.0.0.1:{self.ports.sasl_tls}"

    # ------------------------------------------------------------------------------------------------------- its life

    def start(self) -> None:
        """Start it (again: with the same data) and wait until it really serves."""
        assert self._process is None, "it runs"
        with self._log_file.open("ab") as log:
            self._process = process = subprocess.Popen(
                [
                    *("java", *_JVM, f"-Dlog4j2.configurationFile={_HERE / 'log4j2.yaml'}"),
                    *("-cp", f"{self.jars}/*", "kafka.Kafka", str(self._properties)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the tests, and they end the broker
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        self._guard.stdout.readline()  # from here on it cannot be orphaned
        self._wait_ready()

    def stop(self) -> None:
        """End it properly (SIGTERM), by force after 10 s."""
        process = self._running
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        self._bury()

    def kill(self) -> None:
        """End it by SIGKILL: connections break, nothing is said."""
        self._running.kill()
        self._bury()

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let it hang (SIGSTOP): connections stay and nobody answers."""
        self._running.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End the hanging."""
        self._running.send_signal(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        """Whether it was started and neither stopped nor killed."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The Java process."""
        return self._running.pid

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of its log."""
        return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-lines:])

    # ---------------------------------------------------------------------------------------------------------- steps

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it does not run"
        return self._process

    @property
    def _log_file(self) -> Path:
        return self.folder / "broker.log"

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _bury(self) -> None:
        self._running.wait()
        self._process = None
        self.forget()
        if self._guard is not None:
            self._guard.communicate(timeout=STOP_S)  # ends its standard input, which ends it
            self._guard = None

    def format(self) -> None:
        """Write the configuration and an empty data folder; once, before the first start."""
        text = (_HERE / "server.properties").read_text()
        values = {
            **attrs.asdict(self.ports),
            "data": self.folder / "data",
            "keystore": self.certificates.server,
            "truststore": self.certificates.authority,
            "user": USER,
            "password": PASSWORD,
        }
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", str(value))
        self._properties.write_text(text)
        secret = f"SCRAM-SHA-512=[name={USER},iterations=4096,password={PASSWORD}]"
        formatting = [
            *("java", *_JVM_SHORT, "-cp", f"{self.jars}/*", "kafka.tools.StorageTool", "format"),
            *(
                "--config",
                str(self._properties),
                "--cluster-id",
                _CLUSTER_ID,
                "--add-scram",
                secret,
            ),
        ]
        done = subprocess.run(
            formatting, check=False, capture_output=True, text=True, timeout=START_S
        )
        if done.returncode:
            raise BrokerError(f"cannot format the storage: {done.stdout}{done.stderr}")

    def _wait_ready(self) -> None:
        """Go through everything that a test needs: the first use of some of it costs seconds."""
        deadline = time.monotonic() + START_S
        steps = (self._shows_itself, self._keeps_records, self._keeps_groups, self._shakes_hands)
        for step in steps:
            while not step():
                code = self._running.poll()
                if code is not None or time.monotonic() > deadline:
                    self.kill()
                    what = f"it is not ready, at {step.__name__}, exit code {code}"
                    raise BrokerError(f"{what}; its log ends:\n{self.log_tail()}")
                time.sleep(0.05)  # another process: there is nothing to wait on

    def _shows_itself(self) -> bool:
        try:
            return list(self.admin.list_topics(timeout=1).brokers) == [NODE_ID]
        except KafkaException:
            return False

    def _keeps_records(self) -> bool:
        try:
            if _PROBE not in self.admin.list_topics(timeout=ANSWER_S).topics:
                self.create_topic(_PROBE, 1)
            self.produce(_PROBE, [b"ready?"])
        except KafkaException:
            return False
        return True

    def _keeps_groups(self) -> bool:
        try:
            self.commit(_PROBE, _PROBE, 1)
        except KafkaException:
            return False
        return True

    def _shakes_hands(self) -> bool:
        own = self.certificates
        tls = {"ssl.ca.location": str(own.authority)}
        certificate = {
            "ssl.certificate.location": str(own.client),
            "ssl.key.location": str(own.client_key),
        }
        user = {"sasl.username": USER, "sasl.password": PASSWORD}
        scram = {"sasl.mechanism": "SCRAM-SHA-512", **user}
        plain = {"sasl.mechanism": "PLAIN", **user}
        ways = (
            (self.tls, {"security.protocol": "ssl", **tls, **certificate}),
            (self.sasl, {"security.protocol": "sasl_plaintext", **scram}),
            (self.sasl_tls, {"security.protocol": "sasl_ssl", **tls, **scram}),
            (self.sasl_tls, {"security.protocol": "sasl_ssl", **tls, **plain}),
        )
        try:
            for address, way in ways:
                client = AdminClient({"bootstrap.servers": address, "log_level": 0, **way})
                client.list_topics(timeout=ANSWER_S)
        except KafkaException:
            return False
        return True


@contextmanager
def run_broker(folder: Path) -> Iterator[Broker]:
    """Run a broker in a folder until the block ends. The folder keeps its data, its configuration and its log.

    Raises:
        UnavailableError: this machine cannot run one.
        BrokerError: it does not become ready.
    """
    jars = fetch_jars()
    folder.mkdir(parents=True, exist_ok=True)
    ports = Ports.choose()
    with run_relay(ports.relayed, port=ports.relay) as relay:
        broker = Broker(
            f"127.0.0.1:{ports.plain}",
            folder=folder,
            jars=jars,
            ports=ports,
            certificates=make_certificates(folder / "certificates"),
            relay=relay,
        )
        broker.format()
        try:
            broker.start()
            yield broker
        finally:
            if broker.is_running:
                broker.stop()
