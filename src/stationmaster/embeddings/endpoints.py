"""Several embedders as one: the least busy is asked, one in trouble is left alone, and a failed call goes elsewhere.

| an endpoint's answer                    | this call                           | later calls                       |
| --------------------------------------- | ----------------------------------- | --------------------------------- |
| vectors                                 | is answered                         |                                   |
| RowRejectedError                        | fails: its texts are at fault       |                                   |
| EmbedderBusyError                       | goes elsewhere                      | wait as long as it asks (30 s)    |
| EmbedderUnavailableError                | goes elsewhere                      | its breaker counts                |
| EmbedderRefusedError                    | goes elsewhere                      | its breaker opens at once         |
| ProtocolError, wrong count or dimension | goes elsewhere once                 | its breaker counts                |
| none, and the caller leaves             | is cancelled                        | its breaker counts, if it hangs   |
| anything else                           | fails: that is a bug                |                                   |

Rules:
1. A call asks each endpoint once at most: to ask again is the caller's business (the batcher does so once).
2. It goes elsewhere only if that endpoint usually answers before the caller's deadline.
3. An endpoint has `max_in_flight` slots. A call takes its slot last, and waits for one if all that may be asked are
   busy. A cancelled call keeps its slot for as long as a call usually takes: servers go on computing.
4. A half-open endpoint is asked first, else nobody would find out that it works. While another could answer, the probe
   has little time: it must not hold up its texts.
5. A call that finds or leaves every endpoint shut fails with EmbedderBusyError and the time until the first may be
   asked again: whoever queues goes on queueing. If all of them refuse us, it fails with EmbedderRefusedError.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import inf
from random import Random
from typing import TYPE_CHECKING, Final

import trio

from stationmaster.abc import NullObserver
from stationmaster.breaker import Breaker
from stationmaster.embeddings.endpoint import Endpoint
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import CallRerouted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stationmaster.abc import Embedder, Observer, Vector
    from stationmaster.embeddings.endpoint import EndpointStatistics
    from stationmaster.events import Event

# Of several errors a caller gets the one that gives most hope that trying again helps.
_HOPEFUL: Final = (EmbedderUnavailableError, EmbedderBusyError, ProtocolError)


class Endpoints:
    """An Embedder that spreads calls over several. Many tasks may use it at once; it has none of its own."""

    def __init__(
        self,
        embedders: Mapping[str, Embedder],
        *,
        max_in_flight: int = 4,
        failures: int = 3,
        probe_s: float = 1.0,
        dimensions: int | None = None,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        observer: Observer | None = None,
        jitter: Random | None = None,
    ) -> None:
        """Join embedders.

        Args:
            embedders: by the names that errors, events and statistics use (URLs, say: no secrets); at least one.
            max_in_flight: calls to one endpoint at the same time.
            failures: failed calls in a row after which an endpoint is left alone.
            probe_s: seconds for which it is left alone before one call tries it again.
            dimensions: what every vector must have; if None, the first answer of any endpoint fixes it for all.
            max_rows: texts of one call that each of them takes, if known; only kept for whoever makes calls.
            max_tokens: tokens that each of them computes together, if known; only kept as well.
            observer: hears of endpoints that open, close or pause, and of calls that go elsewhere.
            jitter: spreads pauses of unknown length.

        Raises:
            ValueError: an argument is wrong.
        """
        if not embedders:
            raise ValueError("endpoints need at least one embedder")
        if max_in_flight < 1 or failures < 1:
            raise ValueError(
                f"max_in_flight and failures must be at least 1, not {max_in_flight} and {failures}"
            )
        if not 0 < probe_s < inf:
            raise ValueError(f"probe_s must be a positive number of seconds, not {probe_s}")
        self.dimensions: int | None = dimensions
        """Numbers in every vector; None before the first answer."""
        self.max_rows: int | None = max_rows
        """Texts of one call that each of them takes; None if that is not known."""
        self.max_tokens: int | None = max_tokens
        """Tokens that each of them computes together; None if that is not known."""
        self._endpoints = [
            Endpoint(name, embedder, Breaker(failures=failures, probe_s=probe_s))
            for name, embedder in embedders.items()
        ]
        self._max_in_flight = max_in_flight
        self._observer = observer or NullObserver()
        self._jitter = jitter or Random()  # noqa: S311 - nothing secret about a pause
        self._waiting = trio.lowlevel.ParkingLot()
        """Calls that may go as soon as there is a free slot, or a probe is back."""

    def statistics(self) -> tuple[EndpointStatistics, ...]:
        """Return a look at each endpoint."""
        now = trio.current_time()
        return tuple(endpoint.statistics(now) for endpoint in self._endpoints)

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        """Embed the texts in one call to one of the endpoints (see `stationmaster.abc.Embedder`, and the rules)."""
        asked: dict[Endpoint, EmbedderError] = {}
        while (endpoint := await self._choose(asked)) is not None:
            if asked:
                last, error = next(reversed(asked.items()))
                self._tell(
                    CallRerouted(rows=len(texts), endpoint=last.name, to=endpoint.name, error=error)
                )
            try:
                return await self._ask(endpoint, texts)
            except RowRejectedError:
                raise
            except EmbedderError as error:
                asked[endpoint] = error
                if sum(isinstance(one, ProtocolError) for one in asked.values()) > 1:
                    raise
        raise self._verdict(list(asked.values()))

    def _tell(self, event: Event | None) -> None:
        if event is not None:
            self._observer.observe(event)

    # -------------------------------------------------------------------------------------------------------- choosing

    async def _choose(self, asked: Mapping[Endpoint, EmbedderError]) -> Endpoint | None:
        """Wait for an endpoint that was not asked yet; return None if there is none that is worth waiting for."""
        while True:
            now = trio.current_time()
            deadline = trio.current_effective_deadline() if asked else inf
            candidates = [
                endpoint
                for endpoint in self._endpoints
                if endpoint not in asked
                and endpoint.shut_until(now) is None
                and now + endpoint.believed_s(now) <= deadline
            ]
            if not candidates:
                await trio.lowlevel.checkpoint()
                return None
            free = [
                endpoint
                for endpoint in candidates
                if endpoint.ready_at() <= now and endpoint.load(now) < self._max_in_flight
            ]
            if free:
                return min(free, key=lambda one: self._rank(one, now))  # noqa: ASYNC910 - it is asked next
            with trio.move_on_at(self._next_change(now)):
                await self._waiting.park()

    def _rank(self, endpoint: Endpoint, now: float) -> tuple[bool, int, float]:
        """Return what to sort by: half-open, then least in flight, then fastest."""
        is_closed = endpoint.breaker.state(now) == "closed"
        return is_closed, endpoint.load(now), endpoint.believed_s(now)

    def _next_change(self, now: float) -> float:
        """Return when the passing of time alone may let a waiting call go."""
        return min(
            (
                instant
                for endpoint in self._endpoints
                for instant in (endpoint.ready_at(), endpoint.frees_at())
                if now < instant
            ),
            default=inf,
        )

    def _verdict(self, errors: Sequence[EmbedderError]) -> EmbedderError:
        """Return what a call fails with that no endpoint answered; `errors` are of those that were asked."""
        now = trio.current_time()
        cause = errors[-1] if errors else None
        passing = [endpoint for endpoint in self._endpoints if not endpoint.breaker.refused]
        if not passing:
            return cause or EmbedderRefusedError(self._troubles(now))
        instants = [endpoint.shut_until(now) for endpoint in passing]
        shut_until = [instant for instant in instants if instant is not None]
        broken = bool(errors) and all(isinstance(error, ProtocolError) for error in errors)
        # Whoever asked nobody finds a way open now and then: time passed since it chose.
        if not errors or (len(shut_until) == len(passing) and not broken):
            wait_s = min(shut_until, default=now) - now
            busy = EmbedderBusyError(self._troubles(now), retry_after_s=wait_s)
            busy.__cause__ = cause
            return busy
        return min(errors, key=_rank_of_hope)

    def _troubles(self, now: float) -> str:
        """Say why nobody may be asked."""
        told = [f"{one.name} ({one.state(now)}: {one.last_trouble})" for one in self._endpoints]
        return f"no model server may be asked now: {', '.join(told)}"

    # ---------------------------------------------------------------------------------------------------------- asking

    async def _ask(self, endpoint: Endpoint, texts: Sequence[str]) -> Sequence[Vector]:
        began = trio.current_time()
        others = any(one is not endpoint and one.ready_at() <= began for one in self._endpoints)
        vectors: Sequence[Vector] = ()
        with self._judged(endpoint, began) as is_probe:
            limit = began + endpoint.patience_s() if is_probe and others else inf
            with trio.CancelScope(deadline=limit) as patience:
                vectors = await endpoint.embedder.embed(texts)
            if patience.cancelled_caught and not vectors:
                raise EmbedderUnavailableError(
                    f"{endpoint.name} was tried again and did not answer within {limit - began:.3g} s"
                )
            self._check(endpoint, vectors, rows=len(texts))
        self._tell(endpoint.answered(trio.current_time(), began=began))
        return vectors  # noqa: ASYNC910 - an embedder is a checkpoint

    @contextmanager
    def _judged(self, endpoint: Endpoint, began: float) -> Iterator[bool]:
        """Hold a slot during a call and take note how it fails; yields whether it is a probe."""
        is_probe = endpoint.begin()
        try:
            yield is_probe
        except RowRejectedError:
            self._tell(endpoint.lives(trio.current_time()))
            raise
        except EmbedderError as error:
            self._tell(
                endpoint.failed(trio.current_time(), error, is_probe=is_probe, jitter=self._jitter)
            )
            raise
        except trio.Cancelled:
            now = trio.current_time()
            self._tell(endpoint.abandoned(now, began=began, is_probe=is_probe))
            raise
        except BaseException:
            endpoint.breaker.give_up(is_probe=is_probe)
            raise
        finally:
            endpoint.in_flight -= 1
            self._waiting.unpark_all()

    def _check(self, endpoint: Endpoint, vectors: Sequence[Vector], *, rows: int) -> None:
        """Check what only a look at all endpoints can tell, and the count."""
        if len(vectors) != rows:
            raise ProtocolError(f"{endpoint.name}: {len(vectors)} vectors for {rows} texts")
        known = self.dimensions or len(vectors[0])
        for vector in vectors:
            if len(vector) != known:
                raise ProtocolError(
                    f"{endpoint.name}: a vector has {len(vector)} numbers instead of {known}"
                )
        self.dimensions = known


def _rank_of_hope(error: EmbedderError) -> int:
    return next(
        (rank for rank, kind in enumerate(_HOPEFUL) if isinstance(error, kind)), len(_HOPEFUL)
    )
