"""TLS certificates for one run of the tests, made by openssl: an authority, a server and a client."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@attrs.frozen
class Certificates:
    """PEM files in a folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority that signed the others."""
        return self.folder / "ca.pem"

    @property
    def other_authority(self) -> Path:
        """One that signed none of them."""
        return self.folder / "other-ca.pem"

    @property
    def server(self) -> Path:
        """Key and certificate of 127.0.0.1 and localhost in one file, as Kafka wants them."""
        return self.folder / "server.pem"

    @property
    def client(self) -> Path:
        """A client's certificate (CN=station)."""
        return self.folder / "client.pem"

    @property
    def client_key(self) -> Path:
        """Its key."""
        return self.folder / "client.key"


def make_certificates(folder: Path) -> Certificates:
    """Make everything anew; takes some 50 ms."""
    folder.mkdir()
    made = Certificates(folder)

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other-ca"):
        openssl(
            "req",
            "-x509",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            *_KEY,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    for name, subject in (("server", "localhost"), ("client", "station")):
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key")
        names = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        openssl(
            "req",
            "-x509",
            "-days",
            "2",
            "-subj",
            f"/CN={subject}",
            *names,
            *signer,
            *_KEY,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    key = (folder / "server.key").read_text()
    made.server.write_text(key + made.server.read_text())
    return made
