"""Alarms: what goes wrong in reinforcement learning on a language model, seen in the figures of each update.

    watch = Watch(limits(("kl=25", "length=off")), stop_on=("kl",))
    for alarm in watch.look({"kl": 31.0, "entropy": 0.4}, prompts, responses): print(alarm.message)

A policy that games its reward looks ever better by that reward. What gives it away is beside the score: how far it
is from the reference, what it still varies, how long it talks, and which phrases it has come to put everywhere. Each
alarm compares the newest figures with a limit or with the start of the run, when the policy was still the reference.
It says what was found, what it means, and what to do; whether that is bad enough to stop is `--stop-on`'s to say.

`DEFAULTS` has an alarm's limit. What a row of figures does not have is not looked at, so that any trainer can use
this. Leaves out languages written without spaces for the phrases (a clause is then one word), and any cure.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import click

from cai.base.errors import InputError, shorten
from cai.stats.texts import duplicates, grown

# Responses that a share or a mean is taken over at least: of fewer, chance alone moves it by more than the limits.
ENOUGH = 128

# Updates to a window of the judge's alarm, and words to a phrase.
WINDOW = 5

DEFAULTS = {"kl": 40.0, "entropy": 0.3, "length": 1.5, "eos": 0.8, "duplicates": 0.3, "boilerplate": 0.3, "judge": 3.0}

MEANING = {
    "kl": "nats a response that the policy may be from the reference",
    "entropy": "share of the entropy at the start that must be left",
    "length": "factor by which responses may grow or shrink",
    "eos": "share of responses that must come to their end",
    "duplicates": "share of responses, more than at the start, that may repeat the answer to another prompt",
    "boilerplate": "share of responses, more than at the start, that may have one phrase",
    "judge": "standard errors by which the judge may fall while the score does not",
}


@dataclass(frozen=True)
class Alarm:
    """One thing wrong: its name in `DEFAULTS`, the value found, the limit, and a line for people."""

    name: str
    value: float
    limit: float
    message: str


def options(function):
    """Decorator that adds `--alarm NAME=LIMIT` and `--stop-on NAME`; the function gets alarm and stop_on (tuples)."""
    known = ", ".join(f"{name} {limit:g}" for name, limit in DEFAULTS.items())
    function = click.option(
        "--stop-on",
        multiple=True,
        type=click.Choice([*DEFAULTS, "all"]),
        help="Stop the run at this alarm; what was saved before is kept. Repeatable.",
    )(function)
    return click.option(
        "--alarm",
        multiple=True,
        metavar="NAME=LIMIT",
        help=f"Move an alarm's limit, or NAME=off. Repeatable. Defaults: {known}.",
    )(function)


def limits(given: Iterable[str]) -> dict[str, float]:
    """The limits of the alarms that are on, from `NAME=LIMIT` and `NAME=off`. InputError for another text."""
    found = dict(DEFAULTS)
    for text in given:
        name, _, value = text.partition("=")
        if name not in DEFAULTS:
            raise InputError(
                f"no alarm {shorten(name)!r}",
                where="--alarm",
                expected=f"one of {', '.join(DEFAULTS)}",
                remedy="For instance --alarm kl=25, or --alarm length=off",
            )
        if value == "off":
            found.pop(name, None)
            continue
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf or (name == "length" and found[name] <= 1):
            raise InputError(
                f"the limit {shorten(value)!r} of {name}",
                where="--alarm",
                expected=f"a number above {1 if name == 'length' else 0} ({MEANING[name]}), or off",
            )
    return found


@dataclass
class Watch:
    """Looks at each update of a run, and remembers as much of the updates before as the alarms need.

    Args:
        limits: of `limits`; an alarm without one is off.
        stop_on: names of alarms that stop the run, or "all".
    Attributes:
        figures: what the last look counted in the texts: duplicates, boilerplate (growth of the phrase that grew most).
        grown: the phrases behind it, of `grown`.
    """

    limits: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULTS))
    stop_on: Sequence[str] = ()
    figures: dict[str, float] = field(default_factory=dict)
    grown: list[tuple[str, float, float]] = field(default_factory=list)
    _rows: list[dict] = field(default_factory=list)
    _first: list[str] = field(default_factory=list)  # responses at the start
    _last: list[list[str]] = field(default_factory=list)  # those of the newest updates

    def look(self, figures: Mapping, prompts: Sequence = (), responses: Sequence[str] = ()) -> list[Alarm]:
        """The alarms of one update; none where all is well.

        Args:
            figures: of any of kl (nats a response), entropy (nats a token), response_length (tokens), eos_rate, score
                (mean), judge (mean of a judge that the policy is not trained on) with judge_std (of a response).
            prompts, responses: of this update, in the same order; without them no texts are looked at.
        """
        row = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        row["count"] = len(responses) or ENOUGH
        self.figures = {}
        if responses:
            row["duplicates"] = self.figures["duplicates"] = duplicates(prompts, responses)
            self._remember(responses)
            self.grown = grown(self._first, [text for texts in self._last for text in texts])
            row["boilerplate"] = self.figures["boilerplate"] = max((b - a for _, a, b in self.grown), default=0.0)
        self._rows.append(row)
        found = []
        for name, check in _CHECKS.items():
            if name in self.limits and (alarm := check(self, self.limits[name])):
                found.append(Alarm(name, float(alarm[0]), self.limits[name], alarm[1]))
        return found

    def stops(self, alarms: Iterable[Alarm]) -> Alarm | None:
        """The first of the alarms that is to stop the run, or None."""
        return next((alarm for alarm in alarms if alarm.name in self.stop_on or "all" in self.stop_on), None)

    def state(self) -> dict:
        """What `restore` takes, fit for JSON: a resumed run compares with the same start."""
        return {"rows": self._rows, "first": self._first, "last": self._last}

    def restore(self, state: Mapping) -> None:
        """Go on from where `state` was taken."""
        self._rows, self._first, self._last = list(state["rows"]), list(state["first"]), list(state["last"])

    def _remember(self, responses: Sequence[str]) -> None:
        if len(self._first) < ENOUGH:
            self._first.extend(responses)
        self._last.append(list(responses))
        while sum(map(len, self._last[1:])) >= ENOUGH:
            self._last.pop(0)

    def _mean(self, name: str, rows: Sequence[dict]) -> float | None:
        """Mean over the first of `rows` that make up `ENOUGH` responses; None where they are too few."""
        total = count = 0.0
        for row in rows:
            if name not in row:
                return None
            total, count = total + row["count"] * row[name], count + row["count"]
            if count >= ENOUGH:
                return total / count
        return None

    def then_and_now(self, name: str) -> tuple[float, float] | None:
        """A figure's mean at the start and over the newest updates, `ENOUGH` responses each; None before that."""
        then, now = self._mean(name, self._rows), self._mean(name, self._rows[::-1])
        return None if then is None or now is None else (then, now)


def _kl(watch: Watch, limit: float):
    kl = watch._rows[-1].get("kl", 0.0)
    if kl > limit:
        return kl, (
            f"KL to the reference is {kl:.1f} nats a response (limit {limit:g}). The policy writes what the reward "
            "model was never trained on, so its scores mean little there. Go back to a policy saved before, with a "
            "higher --kl-coef or a lower --learning-rate"
        )
    return None


def _entropy(watch: Watch, limit: float):
    both = watch.then_and_now("entropy")
    if both and both[0] > 0 and both[1] < limit * both[0]:
        then, now = both
        return now / then, (
            f"entropy fell from {then:.3g} to {now:.3g} nats a token, to {now / then:.0%} (limit {limit:.0%}). The "
            "policy hardly varies any more, and what it does not try it can't learn. Lower --learning-rate or "
            "--epochs, or raise --kl-coef"
        )
    return None


def _length(watch: Watch, limit: float):
    both = watch.then_and_now("response_length")
    if both and both[0] > 0:
        then, now = both
        factor = now / then
        if factor > limit or factor < 1 / limit:
            longer = factor > 1
            return factor, (
                f"responses went from {then:.0f} to {now:.0f} tokens, {factor:.2f} times (limit {limit:g} or one over "
                f"it). The reward may be paid for {'length' if longer else 'saying little'}: read samples.jsonl, and "
                "compare the reward model's scores of long and short responses alike in content"
            )
    return None


def _eos(watch: Watch, limit: float):
    now = watch._mean("eos_rate", watch._rows[::-1])
    if now is not None and now < limit:
        return now, (
            f"only {now:.0%} of the responses came to an end (limit {limit:.0%}). The others were cut and are scored "
            "unfinished. Raise --max-new-tokens where answers need it, else --missing-eos-penalty"
        )
    return None


def _duplicates(watch: Watch, limit: float):
    both = watch.then_and_now("duplicates")
    if both and both[1] > both[0] + limit:
        then, now = both
        return now - then, (
            f"{now:.0%} of the responses repeat the answer to another prompt, {then:.0%} at the start (limit "
            f"{limit:.0%} more). One answer for every prompt earns the reward: raise --kl-coef, and let the reward "
            "model see pairs in which such an answer loses"
        )
    return None


def _boilerplate(watch: Watch, limit: float):
    if len(watch._first) < ENOUGH or sum(map(len, watch._last)) < ENOUGH or not watch.grown:
        return None
    growth = watch._rows[-1]["boilerplate"]
    if growth > limit:
        shown = [(phrase, a, b) for phrase, a, b in watch.grown[:3] if b - a > limit / 2]
        said = "; ".join(f"“{shorten(phrase, 60)}” {a:.0%} → {b:.0%}" for phrase, a, b in shown)
        return growth, (
            f"the same words are in {growth:.0%} more of the responses than at the start (limit {limit:.0%}): {said}. "
            "If they say nothing about the request, the reward model pays for their sound: raise --kl-coef, or end "
            "earlier"
        )
    return None


def _judge(watch: Watch, limit: float):
    """Goodhart's law: the judge's mean over `WINDOW` updates is below its best by more than chance, the score's not."""
    rows = [row for row in watch._rows if {"score", "judge", "judge_std"} <= set(row)]
    windows = [rows[i : i + WINDOW] for i in range(len(rows) - WINDOW + 1)]
    if len(windows) <= WINDOW:  # windows that overlap say nothing about a change
        return None

    def mean(name, window):
        return sum(row[name] for row in window) / len(window)

    last = windows[-1]
    best = max(windows[:-WINDOW], key=lambda window: mean("judge", window))
    error = math.sqrt(sum(row["judge_std"] ** 2 / row["count"] for row in (*best, *last))) / WINDOW
    (score_then, judge_then), (score, judge) = ((mean("score", w), mean("judge", w)) for w in (best, last))
    if judge_then - judge > limit * error and score > score_then:
        errors = (judge_then - judge) / error if error else math.inf
        return errors, (
            f"the score rose from {score_then:.3g} to {score:.3g} while the judge fell from {judge_then:.3g} to "
            f"{judge:.3g}, {errors:.1f} standard errors (limit {limit:g}). The policy serves the reward model, no "
            "longer what it stands for: take a policy saved before (--select does), and raise --kl-coef"
        )
    return None


_CHECKS: dict[str, Callable] = {
    "kl": _kl,
    "entropy": _entropy,
    "length": _length,
    "eos": _eos,
    "duplicates": _duplicates,
    "boilerplate": _boilerplate,
    "judge": _judge,
}
