"""A TCP relay that a test can cut, mend and slow down: a network between clients and a server.

It runs in a thread of its own, so that it serves tests on trio, tests with child processes and scripts alike, and so
that a test that blocks its loop does not block its network. Its methods may be called from any thread; each returns
when it is done.

    with run_relay(target_port) as relay:
        relay.port      # where clients connect; stays the same
        relay.cut("drop")
        relay.mend()
"""

from __future__ import annotations

import socket
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_CHUNK_BYTES: Final = 65_536
_ANSWER_S: Final = 10.0


@attrs.define(eq=False)
class Relay:
    """Forwards connections to 127.0.0.1:`port` to 127.0.0.1:`target_port`. Made and run by `run_relay`."""

    port: int
    target_port: int
    delay_s: float = attrs.field(default=0.0, init=False)
    bytes_per_s: float = attrs.field(default=float("inf"), init=False)
    _token: trio.lowlevel.TrioToken = attrs.field(init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _listening: trio.CancelScope | None = attrs.field(default=None, init=False)
    _listener: trio.SocketListener | None = attrs.field(default=None, init=False)
    _connections: set[trio.CancelScope] = attrs.field(factory=set, init=False)
    _flowing: trio.Event = attrs.field(factory=trio.Event, init=False)

    def cut(self, how: Literal["drop", "stall"] = "stall") -> None:
        """Part the clients from the server.

        "drop": connections are reset and new ones refused, as by a server that died. "stall": connections stay and
        carry nothing, new ones are taken and carry nothing, as by a network that lost its route; what is sent
        meanwhile arrives after `mend`.
        """
        self._call(self._drop if how == "drop" else self._stall)

    def mend(self) -> None:
        """End a cut."""
        self._call(self._mend)

    def slow(self, *, delay_s: float = 0.0, bytes_per_s: float = float("inf")) -> None:
        """From now on let every chunk (of at most 64 KiB, each way) wait `delay_s` and flow at this rate.

        Without arguments: as fast as can be, again.
        """
        self._call(self._slow, delay_s, bytes_per_s)

    @property
    def connections(self) -> int:
        """How many connections stand now."""
        return self._call(lambda: len(self._connections))

    # ------------------------------------------------------------------------------------------ in the relay's thread

    async def run(self, ready: Callable[[], object]) -> None:
        """Relay until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._mend()
            ready()
            await trio.sleep_forever()

    def stop(self) -> None:
        """End `run`."""
        self._call(self._nursery.cancel_scope.cancel)

    def _call(self, function: Callable[..., T], *args: object) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function(*args))
            except OSError as error:  # the port was taken meanwhile
                answer.set_exception(error)

        self._token.run_sync_soon(run)
        return answer.result(_ANSWER_S)

    def _drop(self) -> None:
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None
        for scope in self._connections:
            scope.cancel()

    def _stall(self) -> None:
        self._flowing = trio.Event()

    def _mend(self) -> None:
        if self._listener is None:
            # By hand, because trio's own way is async and a command must be done when it returns.
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("127.0.0.1", self.port))
                sock.listen(64)
                self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
            self._nursery.start_soon(self._serve, self._listener)
        self._flowing.set()

    def _slow(self, delay_s: float, bytes_per_s: float) -> None:
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s

    async def _serve(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                try:
                    client = await listener.accept()
                except trio.ClosedResourceError:
                    return  # cut
                self._nursery.start_soon(self._forward, client)

    async def _forward(self, client: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                await self._join(client)
            finally:
                self._connections.remove(scope)

    async def _join(self, client: trio.SocketStream) -> None:
        # Closing sends a reset rather than a proper end: a cut is no goodbye.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        async with client:
            await self._flowing.wait()
            try:
                server = await trio.open_tcp_stream("127.0.0.1", self.target_port)
            except OSError:
                return  # nobody there: the client sees its connection end
            async with server, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, client, server, nursery.cancel_scope)
                nursery.start_soon(self._copy_back, server, client, nursery.cancel_scope)

    async def _copy_back(
        self, server: trio.SocketStream, client: trio.SocketStream, both: trio.CancelScope
    ) -> None:
        """Carry the answers; a relay that changes them does it here."""
        await self._copy(server, client, both)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope
    ) -> None:
        try:
            while chunk := await source.receive_some(_CHUNK_BYTES):
                await self._pass_on(chunk, sink)
        except trio.BrokenResourceError:
            pass  # one side went: so does the other
        both.cancel()

    async def _pass_on(self, chunk: bytes | bytearray, sink: trio.SocketStream) -> None:
        wait_s = self.delay_s + len(chunk) / self.bytes_per_s
        if wait_s:
            await trio.sleep(wait_s)
        await self._flowing.wait()
        await sink.send_all(chunk)


@contextmanager
def run_relay(target_port: int, *, port: int) -> Iterator[Relay]:
    """Run a relay from `port` to `target_port`, both on 127.0.0.1, in a thread until the block ends."""
    relay = Relay(port, target_port)
    with running(relay):
        yield relay


@contextmanager
def running(relay: Relay) -> Iterator[None]:
    """Run this relay in a thread until the block ends."""
    began: Future[None] = Future()

    def run() -> None:
        try:
            trio.run(relay.run, lambda: began.set_result(None))
        except BaseException as error:
            if began.done():
                raise
            began.set_exception(error)  # for instance: the port is taken

    thread = threading.Thread(target=run, name=f"relay {relay.port}")
    thread.start()
    began.result(_ANSWER_S)
    try:
        yield
    finally:
        relay.stop()
        thread.join(_ANSWER_S)
