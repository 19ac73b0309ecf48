"""Who looks on: event streams that read everything, and scrapes at a fixed pace. Says `looking`, then what it saw."""

import json
import sys
import time

import trio

URL, STREAMS, SCRAPES, SECONDS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
HOST, _, PORT = URL.removeprefix("http://").partition(":")
CONNECTIONS = 10  # that scrape in turns


class Seen:
    bytes = events = scrapes = refused = 0

    def __init__(self):
        self.took_ms = []


async def follow(seen, following):
    async with await trio.open_tcp_stream(HOST, int(PORT)) as stream:
        await stream.send_all(b"GET /api/events HTTP/1.0\r\n\r\n")
        seen.refused += not (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        following()
        async for chunk in stream:
            seen.bytes += len(chunk)
            seen.events += chunk.count(b"event: ")


async def scrape(seen, number, began):
    pace_s = CONNECTIONS / SCRAPES
    async with await trio.open_tcp_stream(HOST, int(PORT)) as stream:
        due = began + number / SCRAPES
        while True:
            await trio.sleep_until(due)
            due += pace_s
            asked = time.perf_counter()
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive_some()
            head, _, body = answer.partition(b"\r\n\r\n")
            wanted = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            while len(body) < wanted:
                body += await stream.receive_some()
            seen.refused += not head.startswith(b"HTTP/1.1 200 ")
            seen.scrapes += 1
            seen.took_ms.append((time.perf_counter() - asked) * 1000)


async def main():
    seen, waiting, all_follow = Seen(), STREAMS, trio.Event()

    def following():
        nonlocal waiting
        waiting -= 1
        if not waiting:
            all_follow.set()

    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(follow, seen, following)
        await all_follow.wait()
        began = trio.current_time()
        for number in range(CONNECTIONS):
            nursery.start_soon(scrape, seen, number, began)
        print("looking", flush=True)
        await trio.sleep(SECONDS)
        nursery.cancel_scope.cancel()
    took = sorted(seen.took_ms)
    told = {
        "streams": STREAMS,
        "bytes": seen.bytes,
        "events": seen.events,
        "scrapes": seen.scrapes,
        "refused": seen.refused,
        "scrape_p99_ms": took[int(len(took) * 0.99)],
    }
    print(json.dumps(told), flush=True)


trio.run(main)
