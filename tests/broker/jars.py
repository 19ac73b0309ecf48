"""Apache Kafka's jars: fetched once by Maven, kept in the repository's ignored cache."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

_POM = Path(__file__).with_name("pom.xml")
_CACHE = Path(__file__).parents[2] / ".cache" / "kafka"
_FETCH_S = 300.0


class UnavailableError(Exception):
    """This machine cannot run a Kafka broker; the message says what is missing."""


def fetch_jars() -> Path:
    """Return the folder of jars; fetch them when it is not there. Two runs at once share one download.

    Raises:
        UnavailableError: there is no Java, or no Maven or network to fetch with.
    """
    if shutil.which("java") is None:
        raise UnavailableError("no `java` on PATH (Kafka 4 needs 17 or newer)")
    jars = _CACHE / hashlib.sha256(_POM.read_bytes()).hexdigest()[:16]
    _CACHE.mkdir(parents=True, exist_ok=True)
    with jars.with_suffix(".lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # given back when the file is closed, however this run ends
        if not jars.is_dir():
            _fetch(jars)
    return jars


def _fetch(jars: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise UnavailableError("no `mvn` on PATH to fetch Kafka with")
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        command = [
            *(maven, "-q", "-B", "-f", str(_POM), "dependency:copy-dependencies"),
            *("-DincludeScope=runtime", f"-DoutputDirectory={folder}/jars"),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_S)
        except subprocess.CalledProcessError as error:
            raise UnavailableError(f"Maven cannot fetch Kafka: {error.stdout[-2000:]}") from error
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"Maven did not fetch Kafka within {_FETCH_S:g} s") from error
        Path(folder, "jars").rename(jars)
