"""Walk the shipped units through a real systemd, in namespaces of its own. By hand, as root:

    python -m tests.systemd.walk [ROW ...]     boot and walk; prints a table
    python -m tests.systemd.walk --look        build the namespaces, ask the guard, boot nothing
    python -m tests.systemd.walk --try-guard   ask the guard where it must refuse

Needs: root, util-linux, systemd 250 or later, and a /usr/bin/python3 that can load this environment's packages.
The machine's own systemd, files, network and processes are neither used nor seen; see `guard`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.systemd.booting import namespace, try_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Walk:
    """A booted systemd, and what is asked of it."""

    def __init__(self, unshared: subprocess.Popen[str]) -> None:
        children = Path(f"/proc/{unshared.pid}/task/{unshared.pid}/children").read_text().split()
        (self._pid,) = children
        self.rows: list[tuple[str, str, str]] = []

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup",
                "--wdns=/", "env", "-i", "PATH=/usr/sbin:/usr/bin", "LANG=C.UTF-8",
                "PYTHONPATH=/opt/src:/opt/repository:/opt/site", *command]  # fmt: skip

    def run(self, *command: str, check: bool = True, text: str | None = None) -> str:
        done = subprocess.run(
            self.enter(*command),
            input=text,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def code(self, *command: str) -> int:
        return subprocess.run(
            self.enter(*command), capture_output=True, timeout=90, check=False
        ).returncode

    @contextmanager
    def part(self, *command: str) -> Iterator[str]:
        """Run a process of the project beside the service; gives its first line."""
        with subprocess.Popen(
            self.enter(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline()
            finally:
                process.terminate()

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && cat > "$0"', path, text=text)


UNIT = "stationmaster@air.service"
TOPIC = "readings"
MESSAGE = '{"stationData": [{"stationId": "S1", "x": 1}]}'
_CONFIG = """
[source]
kind = "kafka"
[kafka]
bootstrap_servers = "{broker}"
group_id = "walk"
topics = ["readings"]
group_protocol = "consumer"
[batch]
deadline_s = {deadline_s}
[stations]
handler = "tests.service.handlers:{handler}"
[upload]
url = "{receiver}/batches"
{more}
"""


class Service:
    """`stationmaster@air` between a broker and a receiver."""

    def __init__(self, w: Walk, broker: str, receiver: str) -> None:
        self.w, self.broker, self.receiver = w, broker, receiver

    def configure(
        self, *, handler: str = "brief", deadline_s: float = 5.0, more: str = "", unit: str = ""
    ) -> None:
        """Write configuration and drop-in of a service that does not run."""
        self.w.run("systemctl", "stop", UNIT, "stationmaster@air.socket", check=False)
        self.w.run("systemctl", "reset-failed", check=False)
        self.rewrite(handler=handler, deadline_s=deadline_s, more=more)
        self.w.write(f"/etc/systemd/system/{UNIT}.d/walk.conf", f"[Service]\n{unit}\n")
        self.w.run("systemctl", "daemon-reload")

    def rewrite(
        self, *, handler: str = "brief", deadline_s: float | str = 5.0, more: str = ""
    ) -> None:
        text = _CONFIG.format(
            broker=self.broker,
            receiver=self.receiver,
            handler=handler,
            deadline_s=deadline_s,
            more=more,
        )
        self.w.write("/etc/stationmaster/air.toml", text)

    def show(self, *names: str) -> dict[str, str]:
        said = self.w.run("systemctl", "show", UNIT, *(f"--property={name}" for name in names))
        return dict(line.split("=", 1) for line in said.splitlines())

    def wait(
        self, wanted: Callable[[dict[str, str]], bool], *names: str, seconds: float = 30.0
    ) -> dict[str, str]:
        end = time.monotonic() + seconds
        while not wanted(now := self.show(*names)):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds:g} s: {now}")
            time.sleep(0.1)
        return now

    def journal(self) -> str:
        self.w.run("journalctl", "--sync", check=False)
        return self.w.run("journalctl", "--no-pager", "--output=cat", "--unit", UNIT)

    def wait_journal(self, text: str, *, times: int = 1) -> None:
        end = time.monotonic() + 30
        while (said := self.journal()).count(text) < times:
            if time.monotonic() > end:
                raise AssertionError(f"{text!r} not in the journal: {said[-800:]}")
            time.sleep(0.1)

    def produce(self) -> None:
        self.w.run(
            "python3", "-c",
            f"from tests.processes import produce; produce({self.broker!r}, {TOPIC!r}, [{MESSAGE!r}.encode()])",
        )  # fmt: skip


def ready(s: Service) -> str:
    s.configure()
    s.w.run("systemctl", "start", UNIT)
    now = s.wait(lambda now: "4 partitions" in now["StatusText"], "ActiveState", "StatusText")
    assert now["ActiveState"] == "active", now
    return f"active; {now['StatusText']}"


def kept_alive(s: Service) -> str:
    s.configure(unit="WatchdogSec=2s")
    s.w.run("systemctl", "start", UNIT)
    time.sleep(7)
    now = s.show("ActiveState", "NRestarts")
    assert now == {"ActiveState": "active", "NRestarts": "0"}, now
    return "WatchdogSec=2: alive over 7 s, no restart"


def reload(s: Service) -> str:
    s.configure()
    s.w.run("systemctl", "start", UNIT)
    s.rewrite(deadline_s=2.0)
    s.w.run("systemctl", "reload", UNIT)
    s.wait_journal('"changed": ["batch.deadline_s"]')
    now = s.wait(lambda now: now["ActiveState"] == "active", "ActiveState", "MainPID", "NRestarts")
    s.rewrite(deadline_s="'soon'")
    assert s.w.code("systemctl", "reload", UNIT) != 0
    s.wait_journal("batch.deadline_s: ")
    after = s.wait(
        lambda now: now["ActiveState"] == "active", "ActiveState", "MainPID", "NRestarts"
    )
    assert after == now, (now, after)
    return "reloaded, the same process; a broken file: systemctl reload fails, the service goes on"


def watchdog(s: Service) -> str:
    s.configure(handler="blocking", unit="WatchdogSec=2s\nRestartSec=1s")
    s.w.run("systemctl", "start", UNIT)
    first = s.show("MainPID")["MainPID"]
    began = time.monotonic()
    s.produce()
    s.wait_journal("Watchdog timeout")
    took = time.monotonic() - began
    s.rewrite()  # else the same message blocks the next one
    now = s.wait(
        lambda now: now["ActiveState"] == "active" and now["NRestarts"] not in {"", "0"},
        "ActiveState", "NRestarts", "MainPID",
    )  # fmt: skip
    assert now["MainPID"] != first
    return f"blocked loop ended after {took:.1f} s (WatchdogSec=2), NRestarts={now['NRestarts']}, serving again"


def drain(s: Service) -> str:
    s.configure(handler="stuck", deadline_s=6.0, unit="TimeoutStopSec=2s")
    s.w.run("systemctl", "start", UNIT)
    opened = s.journal().count("batch created")
    s.produce()
    s.wait_journal("batch created", times=opened + 1)
    began = time.monotonic()
    s.w.run("systemctl", "stop", UNIT)
    took = time.monotonic() - began
    now = s.show("Result", "ExecMainStatus")
    assert now == {"Result": "success", "ExecMainStatus": "0"}, now
    assert took > 3, took
    return f"drained {took:.1f} s although TimeoutStopSec=2; Result=success"


def killed(s: Service) -> str:
    s.configure(unit="RestartSec=1s")
    s.w.run("systemctl", "start", UNIT)
    s.w.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", UNIT)
    now = s.wait(
        lambda now: now["NRestarts"] == "1" and now["ActiveState"] == "active",
        "ActiveState",
        "NRestarts",
    )
    return f"NRestarts={now['NRestarts']}, active again"


def configuration(s: Service) -> str:
    s.configure(unit="RestartSec=1s")
    s.rewrite(deadline_s=-1)
    assert s.w.code("systemctl", "start", UNIT) != 0
    time.sleep(4)
    now = s.show("ActiveState", "NRestarts", "ExecMainStatus")
    assert now == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": "78"}, now
    return "failed with 78, NRestarts=0 after 4 s (RestartSec=1)"


def socket_activation(s: Service) -> str:
    s.configure()
    s.w.run("systemctl", "start", "stationmaster@air.socket")
    assert s.show("ActiveState")["ActiveState"] == "inactive"
    said = s.w.run("curl", "-sS", "-m", "30", "-w", " %{http_code}", "http://127.0.0.1:8080/livez")
    assert said.endswith(" 200"), said
    s.w.run("systemctl", "start", UNIT)  # it starts already, and answers before it is ready: wait
    assert s.show("ActiveState")["ActiveState"] == "active"
    s.w.run("systemctl", "restart", UNIT)
    again = s.w.run("curl", "-sS", "-m", "30", "-w", " %{http_code}", "http://127.0.0.1:8080/livez")
    assert again.endswith(" 200"), again
    return "the first request starts it and is answered 200, also after a restart"


def credentials(s: Service) -> str:
    place = f"/run/credentials/{UNIT}/upload-token"
    s.w.write("/etc/stationmaster/air.upload-token", "geheim\n")
    s.w.run("chmod", "600", "/etc/stationmaster/air.upload-token")
    s.configure(
        more=f'token_file = "{place}"',  # [upload] is the last table of the file
        unit="LoadCredential=upload-token:/etc/stationmaster/%i.upload-token",
    )
    s.w.run("systemctl", "start", UNIT)
    now = s.show("ActiveState", "MainPID")
    user = s.w.run("stat", "-c", "%u", f"/proc/{now['MainPID']}").strip()
    assert now["ActiveState"] == "active", now
    assert int(user) > 60_000, user
    assert "token_file" in s.w.run("cat", "/etc/stationmaster/air.toml")
    return f"started with the token as user {user}; the file is root's, 0600"


def state(s: Service) -> str:
    s.configure()
    folder = "/var/lib/private/stationmaster/air"
    s.w.run("systemctl", "start", UNIT)
    s.w.run("systemctl", "restart", UNIT)
    return s.w.run("stat", "-c", "%a %n", folder, f"{folder}/stationmaster-state.db").replace(
        "\n", "; "
    )


ROWS = (
    ready,
    kept_alive,
    reload,
    watchdog,
    drain,
    killed,
    configuration,
    socket_activation,
    credentials,
    state,
)


def walk(unshared: subprocess.Popen[str]) -> int:
    w = Walk(unshared)
    w.run("sh", "-c", "until systemctl is-system-running --wait; do sleep 0.1; done", check=False)
    code = 0
    with w.part("python3", "-m", "stationmaster.service.broker", "--topic", TOPIC) as line:
        broker = json.loads(line)["bootstrapServers"]
        with w.part(
            "python3", "-m", "stationmaster", "receiver", "--db", "/tmp/receiver.db"
        ) as told:
            service = Service(w, broker, told.strip().rpartition(" ")[2])
            for row in ROWS:
                if len(sys.argv) > 1 and row.__name__ not in sys.argv[1:]:
                    continue
                try:
                    result = row(service)
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    result, code = f"FAILED: {error}", 1
                sys.stdout.write(f"| {row.__name__} | {result} |\n")
                sys.stdout.flush()
    return code


def main() -> int:
    if "--try-guard" in sys.argv:
        return try_guard()
    look = "--look" in sys.argv
    with namespace(boot=not look) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        sys.stdout.write(said)
        if look or said != "the guard lets pass\n":
            sys.stdout.write(process.stdout.read())
            return process.wait()
        return walk(process)


if __name__ == "__main__":
    sys.exit(main())
