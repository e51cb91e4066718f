"""How long is waited for a server's answer: the bound by hand, and the watch over requests under way."""

import asyncio
import time

import pytest

from cai.models import latency
from cai.models.latency import Patience, SilenceError, Wait, Watch


def answered(patience, seconds, *, kind="text", length=100):
    """The waits for answers that took so many seconds."""
    waits = [Wait(kind, length) for _ in seconds]
    for wait, each in zip(waits, seconds, strict=True):
        patience.note(wait, each)
    return waits


def test_the_bound_by_hand():
    patience = Patience(longest=300)
    answered(patience, [1.0] * 7)
    assert patience.bound(Wait("text", 100)) == 300  # of seven answers nothing is learned
    patience = Patience(longest=300)
    answered(patience, range(1, 21))  # 1 to 20 s: the 18th of them is 18 s
    assert patience.bound(Wait("text", 100)) == 4 * 18
    assert patience.bound(Wait("text", 10)) == 72  # a shorter prompt gets no less
    assert patience.bound(Wait("text", 250)) == 2.5 * 72
    assert patience.bound(Wait("text", 100, given_up=1)) == 2 * 72
    assert patience.bound(Wait("text", 100, given_up=2)) == 4 * 72
    assert patience.bound(Wait("text", 100, given_up=3)) == 300  # not 576: never more than the longest
    assert patience.bound(Wait("text", 1000)) == 300
    assert patience.bound(Wait("choice", 100)) == 300  # of another kind nothing is known
    assert patience.bound(Wait("text", 1000, most=20.0)) == 20
    assert patience.bound(Wait("text", 1000, most=900.0)) == 300


def test_a_bound_has_a_floor_and_follows_the_last_answers():
    patience = Patience(longest=120)
    answered(patience, [0.01] * 20)
    assert patience.bound(Wait("text")) == latency.FLOOR
    answered(patience, [3.0] * 21)  # of 41, the 37th
    assert patience.bound(Wait("text")) == 12
    answered(patience, [0.1] * latency.WINDOW)
    assert patience.bound(Wait("text")) == latency.FLOOR
    assert Patience(longest=1.0).bound(Wait("text")) == 1.0


def test_many_that_are_given_up_lengthen_the_bound_and_their_answers_shorten_it_again():
    patience = Patience(longest=120)
    answered(patience, [1.0] * 17)
    waits = answered(patience, [4.0, 4.0])  # given up after the bound
    assert patience.bound(Wait("text", 100)) == 16  # the 18th of 19
    for wait in waits:
        patience.note(wait, 1.0)  # their connections had hung: asked again they came at once
    assert patience.bound(Wait("text", 100)) == 4
    answered(patience, [4.0])  # one in twenty
    assert patience.bound(Wait("text", 100)) == 4


@pytest.mark.parametrize("count, rank", [(1, 1), (8, 8), (10, 9), (11, 10), (20, 18), (200, 180)])
def test_the_quantile_is_that_of_the_nearest_rank(count, rank):
    assert latency.high_quantile(range(count, 0, -1)) == rank


def watched(patience, *jobs):
    """The results, or errors, of coroutines that take a watch, which runs meanwhile."""

    async def main():
        watch = Watch(patience, lambda _longest: None)
        watching = asyncio.create_task(watch.run())
        try:
            return await asyncio.gather(*(job(watch) for job in jobs), return_exceptions=True)
        finally:
            watching.cancel()

    return asyncio.run(main())


def sleep(seconds, wait):
    async def job(watch):
        async with watch.limit(wait):
            await asyncio.sleep(seconds)
        return "answered"

    return job


def test_one_that_hangs_is_ended_by_what_the_others_teach_meanwhile(monkeypatch):
    monkeypatch.setattr(latency, "FLOOR", 0.3)
    monkeypatch.setattr(latency, "TICK", 0.02)
    patience, hanging = Patience(longest=60), Wait("text")
    *others, error = watched(patience, *(sleep(0.05, Wait("text")) for _ in range(10)), sleep(60, hanging))
    assert others == ["answered"] * 10
    assert isinstance(error, SilenceError) and error.is_learned and error.bound == pytest.approx(0.3, abs=0.2)
    assert hanging.given_up == 1 and patience.bound(hanging) >= 0.6


def test_at_the_longest_wait_nothing_more_is_to_be_had(monkeypatch):
    monkeypatch.setattr(latency, "TICK", 0.02)
    [error] = watched(Patience(longest=0.1), sleep(60, Wait("text")))
    assert isinstance(error, SilenceError) and not error.is_learned and "0.1 s" in str(error)


def test_while_the_caller_is_busy_no_answer_is_late(monkeypatch):
    """The loop stands still for longer than the bound, while the answer is there."""
    monkeypatch.setattr(latency, "TICK", 0.02)

    async def block(_watch):
        await asyncio.sleep(0.05)
        time.sleep(0.6)

    results = watched(Patience(longest=0.4), sleep(0.1, Wait("text")), block)
    assert results == ["answered", None]
