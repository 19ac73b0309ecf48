"""Ports and certificates of loopback, for tests of what speaks HTTP; the server is `stationmaster.testing.server`."""

from __future__ import annotations

import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
from trio.testing import wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

    from stationmaster.testing.server import ScriptedServer


@asynccontextmanager
async def passing_time(server: ScriptedServer, clock: MockClock) -> AsyncIterator[None]:
    """Let time pass in the block, a second at once, when the next request has arrived and nothing moves any more.

    So a time-out strikes when all that may come before it has come, however busy the machine is. The clock must stand
    still otherwise.
    """
    known = server.requests.value

    async def pass_time() -> None:
        await server.requests.wait_value(lambda count: count > known)
        while True:
            await wait_all_tasks_blocked(0.01)
            clock.jump(1.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_time)
        yield
        nursery.cancel_scope.cancel()


def closed_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context with a certificate for 127.0.0.1, and that of a client that trusts it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_text(_CERTIFICATE)
    key.write_text(_KEY)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)


# Self-signed, for tests alone, good from 2020 to 2120.
_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBAjAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNTAIl9UBnxHbO7F
j1fTcCSw3kIz2xvSCyyE7BiZkYzzW4ZZtUNn27PViLzS35YopldhE+RnO5L2/EEW
gBuAvEyjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRuU99Sfw+CawEQKQbdCm80e+8UMDAOBgNVHQ8BAf8E
BAMCAoQwCgYIKoZIzj0EAwIDSAAwRQIhALU4OmCK0TSeP2bxgoOW/s4LAg4k4eWN
wdc+oKmMP/LoAiAO4+uSet1+KI4bYUgwS6b3DgD1SS2NVgm5TVhTSlzc5A==
-----END CERTIFICATE-----
"""
_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXe4ikXEecR0djsxF
A/3gt4vkMUdCRLMFwmGAL49UbtuhRANCAATUwCJfVAZ8R2zuxY9X03AksN5CM9sb
0gsshOwYmZGM81uGWbVDZ9uz1Yi80t+WKKZXYRPkZzuS9vxBFoAbgLxM
-----END PRIVATE KEY-----
"""
