"""Relays that know what they carry: one that stays between a Kafka client and its broker, one that answers HTTP."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.relay import Relay, running

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES: Final = 65_536
_LAST_WORDS_S: Final = 1.0


@attrs.define(eq=False)
class KafkaRelay(Relay):
    """A relay to a mock broker, which tells clients its own address and cannot be told another one.

    So the address is exchanged in its answers: host and port stand side by side there, and both spellings of the port
    have four bytes. Answers are passed on whole, each with its length before it.
    """

    async def _copy_back(  # type: ignore[explicit-override] # Python 3.11 has no `override`
        self, server: trio.SocketStream, client: trio.SocketStream, both: trio.CancelScope
    ) -> None:
        host = b"127.0.0.1"
        theirs, ours = (host + each.to_bytes(4, "big") for each in (self.target_port, self.port))
        held = bytearray()
        try:
            while chunk := await server.receive_some(_CHUNK_BYTES):
                held += chunk
                whole = _whole(held)
                if whole:
                    await self._pass_on(held[:whole].replace(theirs, ours), client)
                    del held[:whole]
        except trio.BrokenResourceError:
            pass  # one side went: so does the other
        both.cancel()


def _whole(held: bytearray) -> int:
    """Return how many bytes at the beginning are whole answers."""
    end = 0
    while len(held) >= end + 4:
        after = end + 4 + int.from_bytes(held[end : end + 4], "big")
        if after > len(held):
            break
        end = after
    return end


@attrs.define(eq=False)
class HttpRelay(Relay):
    """A relay to an HTTP server that can answer in its place."""

    canned: bytes | None = attrs.field(default=None, init=False)

    def answer(self, canned: bytes | None) -> None:
        """Answer every request with this, from now on and on new connections; None: the server does it again."""
        self._call(self._change, canned)

    def _change(self, canned: bytes | None) -> None:
        self.canned = canned
        for scope in self._connections:
            scope.cancel()

    async def _join(self, client: trio.SocketStream) -> None:  # type: ignore[explicit-override]
        if self.canned is None:
            await super()._join(client)
            return
        async with client:
            try:
                await client.receive_some(_CHUNK_BYTES)
                await client.send_all(self.canned)
                await client.send_eof()
                with trio.move_on_after(
                    _LAST_WORDS_S
                ):  # unread bytes would make a reset of the end
                    while await client.receive_some(_CHUNK_BYTES):
                        pass
            except trio.BrokenResourceError:
                pass


def http_answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    """Return an HTTP answer after which the connection ends."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def open_kafka_relay(target_port: int) -> Iterator[KafkaRelay]:
    """Run a relay to a broker on a free port."""
    relay = KafkaRelay(_free_port(), target_port)
    with running(relay):
        yield relay


@contextmanager
def open_http_relay(target_port: int) -> Iterator[HttpRelay]:
    """Run a relay to an HTTP server on a free port."""
    relay = HttpRelay(_free_port(), target_port)
    with running(relay):
        yield relay


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
