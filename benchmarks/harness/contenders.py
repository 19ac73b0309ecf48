"""Contenders, each run in a process of its own, in an order that is shuffled each round."""

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version

from harness.figures import Rounds


@dataclass(frozen=True)
class Contender:
    """A script, its interpreter, and its order."""

    name: str
    script: pathlib.Path
    order: dict = field(default_factory=dict)
    python: str = sys.executable
    limit_s: float = 120.0

    def run(self, **more):
        """Return its figures, or `{"error": ...}`: a broken peer is no reason to end the others."""
        environment = dict(os.environ)
        if str(self.python) != sys.executable:
            environment.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            [str(self.python), str(self.script), json.dumps(self.order | more)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # so that what a peer starts can be ended with it
        )
        try:
            told, words = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not ready after {self.limit_s:g} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            return {"error": (words.strip().splitlines() or ["no words"])[-1][:300]}
        try:
            return json.loads(told.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return {"error": f"told no figures: {told[-200:]!r}"}


def take_turns(contenders, *, rounds, shuffler, title):
    """Run all contenders `rounds` times; one that fails is run no more."""
    contenders = list(contenders)
    told = []
    broken = set()
    for number in range(rounds):
        shuffler.shuffle(contenders)
        told.append({})
        for each in contenders:
            if each.name not in broken:
                figures = told[-1][each.name] = each.run()
                if "error" in figures:
                    broken.add(each.name)
        say(f"{title}: round {number + 1} of {rounds}")
    return Rounds(told)


def say(words):
    """Tell how far it is, beside the tables."""
    print(words, file=sys.stderr, flush=True)


def machine(*packages):
    """Return what the figures belong to."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("stationmaster", *packages))
    load = os.getloadavg()[0]
    return (
        f"Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} processors, load average {load:.1f} at the start"
    )
