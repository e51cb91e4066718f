"""How long to wait for a server's answer: a bound learned from the latency of the other answers.

    patience = Patience(longest=120.0)
    watch = Watch(patience, report)              # one per event loop, with `watch.run()` as a task in it
    async with watch.limit(Wait(kind, length)): ...       # SilenceError once the bound has passed

A connection that hangs is given up soon where answers come soon, and a slow server gets the time that it needs. The
bound is `FACTOR` times the 90 % quantile of the latency of the last answers to requests of the same kind, longer for a
prompt that is longer than theirs; it doubles whenever the request is given up, up to the longest wait. Leaves out what
becomes of a request that was given up (servers.py).
"""

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

ENOUGH = 8  # answers, before which the bound is the longest wait

WINDOW = 200  # answers that count

QUANTILE = 0.9

FACTOR = 4.0

FLOOR = 2.0  # seconds; no bound that is learned is less

TICK = 0.1  # seconds between two looks at the requests under way


class SilenceError(Exception):
    """No answer came within a bound.

    bound: seconds. is_learned: whether more may be waited for the next attempt.
    """

    def __init__(self, bound: float, is_learned: bool):
        super().__init__(f"no answer within {bound:.3g} s")
        self.bound, self.is_learned = bound, is_learned


@dataclass(eq=False)
class Wait:
    """The wait for the answer to one request, over all its attempts.

    kind: latencies are compared within a kind. length: of the prompt, in any unit.
    most: seconds, instead of what is learned. given_up: attempts that were given up.
    seconds: latency of the last attempt that ended, by an answer or because it was given up; None before.
    """

    kind: Hashable
    length: int = 0
    most: float | None = None
    given_up: int = 0
    seconds: float | None = None


class Patience:
    """What the latencies of answers say about the wait for the next.

    Args:
        longest: seconds; the most that is ever waited for an answer.
    """

    def __init__(self, longest: float):
        self.longest = longest
        self._waits: dict[Hashable, deque[Wait]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._usual: dict[Hashable, tuple[float, int]] = {}  # quantiles of latency and length, until the next answer

    def note(self, wait: Wait, seconds: float) -> None:
        """Count an attempt that ended after so many seconds.

        A request counts once, by its last attempt. One that was given up counts as answered after that time: where
        many are given up the bound grows, so that a server that has become slow is not asked again and again. Once it
        is answered its real latency takes the place, so that connections that hang do not make the bound grow.
        """
        if wait.seconds is None:
            self._waits[wait.kind].append(wait)
        wait.seconds = seconds
        self._usual.pop(wait.kind, None)

    def bound(self, wait: Wait) -> float:
        """Seconds to wait for the answer of the next attempt, or of the one under way."""
        if wait.most is not None:
            return min(wait.most, self.longest)
        waits = self._waits[wait.kind]
        if len(waits) < ENOUGH:
            return self.longest
        if wait.kind not in self._usual:
            latency = high_quantile(each.seconds or 0.0 for each in waits)
            self._usual[wait.kind] = latency, int(high_quantile(each.length for each in waits))
        seconds, length = self._usual[wait.kind]
        scale = max(1.0, wait.length / max(1, length))
        return min(self.longest, max(FLOOR, FACTOR * seconds * scale) * 2.0**wait.given_up)


def high_quantile(values: Iterable[float]) -> float:
    """The `QUANTILE` of values by the nearest rank: the least value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1]


class Watch:
    """Looks at the requests under way in one event loop, and ends those whose bound has passed.

    Its clock runs only while the loop does: where the caller is busy with an answer for a minute, the others are no
    later for it.

    Args:
        report: called at every look with the seconds that the oldest request under way has waited.
    """

    def __init__(self, patience: Patience, report: Callable[[float], None]):
        self.patience, self.report = patience, report
        self._clock = 0.0
        self._under_way: dict[Wait, tuple[float, asyncio.Timeout]] = {}

    async def run(self) -> None:
        """Look every `TICK` until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(TICK)
            self._clock += min(loop.time() - before, 2 * TICK)
            ages = [0.0]
            for wait, (began, scope) in self._under_way.items():
                ages.append(self._clock - began)
                if ages[-1] > self.patience.bound(wait) and scope.when() is None:
                    scope.reschedule(loop.time())
            self.report(max(ages))

    @asynccontextmanager
    async def limit(self, wait: Wait) -> AsyncIterator[None]:
        """Raise SilenceError for what is inside once the bound has passed. An answer's latency is noted."""
        began = self._clock
        try:
            async with asyncio.timeout(None) as scope:
                self._under_way[wait] = began, scope
                yield
        except TimeoutError:
            bound = self.patience.bound(wait)
            self.patience.note(wait, self._clock - began)
            wait.given_up += 1
            raise SilenceError(bound, is_learned=bound < self.patience.longest) from None
        else:
            self.patience.note(wait, self._clock - began)
        finally:
            del self._under_way[wait]
