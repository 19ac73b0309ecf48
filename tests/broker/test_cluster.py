"""The broker and the network of these tests do what the other tests rely on."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from tests.broker.cluster import START_S, STOP_S, Ports
from tests.broker.groups import eventually
from tests.relay import Relay, run_relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.broker.cluster import Broker

HOLD_A_BROKER = """
import sys, time
from pathlib import Path
from tests.broker.cluster import run_broker
with run_broker(Path(sys.argv[1])) as broker:
    print(broker.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_broker_comes_back_with_its_records_and_offsets(own_broker: Broker) -> None:
    topic = own_broker.create_topic(partitions=2)
    own_broker.produce(topic, [b"one", b"two"], partition=1)
    own_broker.commit("group", topic, 1, partition=1)

    own_broker.kill()
    own_broker.start()

    assert own_broker.end_offsets(topic) == {0: 0, 1: 2}
    assert own_broker.committed("group", topic) == {1: 1}
    assert own_broker.members("group") == {}


async def test_a_broker_does_not_outlive_a_test_run_that_was_killed(
    broker: Broker, tmp_path: Path
) -> None:
    del broker  # asked for because without Java this test skips like the others
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", HOLD_A_BROKER, str(tmp_path / "held")]
        start = functools.partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        run: trio.Process = await nursery.start(start)
        assert run.stdout is not None
        with trio.fail_after(START_S):
            number = await run.stdout.receive_some()
        orphan = os.pidfd_open(int(number))
        run.kill()
        with trio.fail_after(STOP_S):
            await trio.lowlevel.wait_readable(orphan)  # that is: it has ended
        os.close(orphan)


# ---------------------------------------------------------------------------------------------------------- the relay


@pytest.fixture
def echo() -> Iterator[int]:
    """Give the port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                while chunk := connection.recv(65_536):
                    connection.sendall(chunk)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,)).start()

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def relay(echo: int) -> Iterator[Relay]:
    with run_relay(echo, port=Ports.choose().relay) as relay:
        yield relay


async def connect(relay: Relay) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", relay.port)


async def ask(stream: trio.SocketStream, said: bytes) -> bytes:
    await stream.send_all(said)
    return bytes(await stream.receive_some())


async def test_a_dropped_network_resets_what_stands_and_refuses_what_comes(relay: Relay) -> None:
    async with await connect(relay) as stream:
        assert await ask(stream, b"one") == b"one"
        relay.cut("drop")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
    with pytest.raises(OSError, match="all attempts to connect"):
        await connect(relay)
    relay.mend()
    async with await connect(relay) as stream:
        assert await ask(stream, b"two") == b"two"


async def test_a_stalled_network_carries_nothing_until_it_is_mended_and_loses_nothing(
    relay: Relay,
) -> None:
    async with await connect(relay) as before:
        assert await ask(before, b"one") == b"one"
        relay.cut("stall")
        async with await connect(relay) as during:
            await during.send_all(b"three")
            with trio.move_on_after(0.2) as waiting:
                await ask(before, b"two")
            assert waiting.cancelled_caught
            relay.mend()
            assert await before.receive_some() == b"two"
            assert await during.receive_some() == b"three"


async def test_a_slow_network_lets_every_chunk_wait(relay: Relay) -> None:
    relay.slow(delay_s=0.1, bytes_per_s=10_000)
    began = trio.current_time()
    async with await connect(relay) as stream:
        assert await ask(stream, bytes(500)) == bytes(500)
        # At least: how much longer is the machine's affair.
        assert trio.current_time() - began >= 2 * (0.1 + 500 / 10_000)
        relay.slow()
        assert await ask(stream, b"quick") == b"quick"


async def test_a_relay_whose_server_is_away_ends_the_connection(relay: Relay) -> None:
    relay.target_port = Ports.choose().plain
    with pytest.raises((OSError, trio.BrokenResourceError)):  # while it connects, or after
        async with await connect(relay) as stream:
            await stream.receive_some()
    await eventually(lambda: relay.connections == 0)
