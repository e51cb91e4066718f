"""Alarms: what goes wrong in reinforcement learning on a language model, recognised in the figures of each update.

    watched = Watch(limits(("kl=25", "length=off")), stop_on=("kl",))
    for alarm in watched.look({"kl": 31.0, "entropy": 0.4}, prompts, responses): print(alarm.message)

A policy that exploits its reward improves steadily by that reward. Other figures give it away: how far it is from the
reference, how much it still varies, how long its responses are, and which phrases appear in all of them. Each alarm
compares the newest figures with a limit or with the start of the run, when the policy was still the reference. Its
message says what was observed, what it means, and what to do; `--stop-on` decides whether it stops the run.

`DEFAULTS` has an alarm's limit. An alarm whose figures are missing is not raised, so that any trainer can use this.
Leaves out languages written without spaces for the phrases (a clause is then one word), and any remedy.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import click

from cai.base.errors import InputError, shorten
from cai.stats.texts import duplicates, grown

# The fewest responses that a share or a mean is taken over: of fewer, chance alone moves it by more than the limits.
ENOUGH = 128

# Updates in a window of the judge's alarm.
WINDOW = 5

DEFAULTS = {"kl": 40.0, "entropy": 0.3, "length": 1.5, "eos": 0.8, "duplicates": 0.3, "boilerplate": 0.3, "judge": 3.0}

MEANING = {
    "kl": "nats per response between the policy and the reference",
    "entropy": "share of the entropy at the start that must remain",
    "length": "factor by which responses may grow or shrink",
    "eos": "share of responses that must come to their end",
    "duplicates": "share of responses, beyond that at the start, that may repeat the response to another prompt",
    "boilerplate": "share of responses, beyond that at the start, that may have one phrase",
    "judge": "standard errors by which the judge may fall while the score does not",
}


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong: its name in `DEFAULTS`, the value, the limit, and a message for people."""

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


def limits(settings: Iterable[str]) -> dict[str, float]:
    """The limits of the alarms that are on, from `NAME=LIMIT` and `NAME=off`. Raises InputError for another text."""
    limit_of = dict(DEFAULTS)
    for text in settings:
        name, _, value = text.partition("=")
        if name not in DEFAULTS:
            raise InputError(
                f"no alarm {shorten(name)!r}",
                where="--alarm",
                expected=f"one of {', '.join(DEFAULTS)}",
                remedy="For instance --alarm kl=25, or --alarm length=off",
            )
        least = 1 if name == "length" else 0
        try:
            limit_of[name] = math.inf if value == "off" else float(value)
        except ValueError:
            limit_of[name] = math.nan
        if value != "off" and not least < limit_of[name] < math.inf:
            raise InputError(
                f"the limit {shorten(value)!r} of {name}",
                where="--alarm",
                expected=f"a number above {least} ({MEANING[name]}), or off",
            )
    return {name: limit for name, limit in limit_of.items() if limit < math.inf}


def watch(options, absent: Mapping[str, str]) -> "Watch":
    """The watch that a command's --alarm and --stop-on ask for.

    Args:
        options: with alarm and stop_on.
        absent: {name of an alarm: why this run has no figure for it}.
    Raises:
        UsageError: an alarm that is named and can't be raised, so that nobody waits for it.
    """
    limit_of = limits(options.alarm)
    named = {text.partition("=")[0]: "--alarm" for text in options.alarm} | dict.fromkeys(options.stop_on, "--stop-on")
    for name, flag in named.items():
        is_off = not limit_of if name == "all" else name not in limit_of
        reason = absent.get(name) or (is_off and "--alarm has switched it off")
        if reason and not (is_off and flag == "--alarm"):
            raise click.UsageError(f"{flag} {name} would have no effect: {reason}.")
    return Watch(limit_of, options.stop_on)


class Watch:
    """Looks at each update of a run, and remembers as much of the earlier updates as the alarms need.

    Args:
        limits: of `limits`; an alarm without a limit is off.
        stop_on: names of alarms that stop the run, or "all".
    Attributes:
        figures: counted in the texts of the newest update: duplicates, boilerplate (growth of the phrase that grew
            most).
        grown: the phrases behind it: (phrase, share at the start, share now), of `texts.grown`.
    """

    def __init__(self, limits: Mapping[str, float] = DEFAULTS, stop_on: Sequence[str] = ()):
        self.limits, self.stop_on = limits, stop_on
        self.figures, self.grown = {}, []
        self.restore({"rows": [], "first": [], "last": []})

    def look(self, figures: Mapping, prompts: Sequence = (), responses: Sequence[str] = ()) -> list[Alarm]:
        """The alarms of one update.

        Args:
            figures: any of kl (nats per response), entropy (nats per token), response_length (tokens), eos_rate,
                score (mean), judge (mean of a judge that the policy is not trained on) with judge_std.
            prompts, responses: of this update, in the same order; without them no texts are compared.
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
        checked = {name: CHECKS[name](self, limit) for name, limit in self.limits.items()}
        return [
            Alarm(name, float(checked[name][0]), self.limits[name], checked[name][1])
            for name in CHECKS
            if checked.get(name)
        ]

    def stops(self, alarms: Iterable[Alarm]) -> Alarm | None:
        """The first of the alarms that stops the run, or None."""
        return next((alarm for alarm in alarms if alarm.name in self.stop_on or "all" in self.stop_on), None)

    def state(self) -> dict:
        """What `restore` takes, ready for JSON: a resumed run compares with the same start."""
        return {"rows": self._rows, "first": self._first, "last": self._last}

    def restore(self, state: Mapping) -> None:
        self._rows: list[dict] = list(state["rows"])
        # The responses at the start, and those of the newest updates.
        self._first, self._last = list(state["first"]), list(state["last"])

    def _remember(self, responses: Sequence[str]) -> None:
        if len(self._first) < ENOUGH:
            self._first.extend(responses)
        self._last.append(list(responses))
        while sum(map(len, self._last[1:])) >= ENOUGH:
            self._last.pop(0)

    def now(self, name: str) -> float:
        """A figure's mean over the newest updates that make up `ENOUGH` responses; NaN if there are too few."""
        return _mean(name, self._rows[::-1])

    def then_and_now(self, name: str) -> tuple[float, float]:
        """A figure's mean at the start and over the newest updates, `ENOUGH` responses each; NaN before that."""
        return _mean(name, self._rows), self.now(name)


def _mean(name: str, rows: Sequence[dict]) -> float:
    total = count = 0.0
    for row in rows:
        total, count = total + row["count"] * row.get(name, math.nan), count + row["count"]
        if count >= ENOUGH:
            return total / count
    return math.nan


# Each check returns (value, message), or None if all is well. A comparison with NaN is false.


def check_kl(watch: Watch, limit: float) -> tuple[float, str] | None:
    kl = watch._rows[-1].get("kl", 0.0)
    if kl > limit:
        return kl, (
            f"KL to the reference is {kl:.1f} nats per response (limit {limit:g}). The policy writes text that the "
            "reward model was never trained on, so its scores mean little there. Go back to an earlier checkpoint, "
            "with a higher --kl-coef or a lower --learning-rate"
        )


def check_entropy(watch: Watch, limit: float) -> tuple[float, str] | None:
    then, now = watch.then_and_now("entropy")
    if now < limit * then:
        return now / then, (
            f"entropy fell from {then:.3g} to {now:.3g} nats per token, to {now / then:.0%} (limit {limit:.0%}). The "
            "policy hardly varies any more, and it can't learn what it does not try. Lower --learning-rate or "
            "--epochs, or raise --kl-coef"
        )


def check_length(watch: Watch, limit: float) -> tuple[float, str] | None:
    then, now = watch.then_and_now("response_length")
    if now > limit * then or now < then / limit:
        return now / then, (
            f"responses went from {then:.0f} to {now:.0f} tokens, {now / then:.2f} times (limit {limit:g} or "
            f"1/{limit:g}). The reward may favour {'long' if now > then else 'short'} ones: read samples.jsonl, and "
            "compare the reward model's scores of long and short responses with the same content"
        )


def check_eos(watch: Watch, limit: float) -> tuple[float, str] | None:
    share = watch.now("eos_rate")
    if share < limit:
        return share, (
            f"only {share:.0%} of the responses came to an end (limit {limit:.0%}). The others were cut and are scored "
            "unfinished. Raise --max-new-tokens if answers need it, else --missing-eos-penalty"
        )


def check_duplicates(watch: Watch, limit: float) -> tuple[float, str] | None:
    then, now = watch.then_and_now("duplicates")
    if now > then + limit:
        return now - then, (
            f"{now:.0%} of the responses repeat the response to another prompt, {then:.0%} at the start (limit "
            f"{limit:.0%} more). One response to every prompt earns the reward: raise --kl-coef, and train the reward "
            "model on pairs in which such a response loses"
        )


def check_boilerplate(watch: Watch, limit: float) -> tuple[float, str] | None:
    growth = watch._rows[-1].get("boilerplate", 0.0)
    if growth > limit and min(len(watch._first), sum(map(len, watch._last))) >= ENOUGH:
        phrases = "; ".join(
            f"“{shorten(phrase, 60)}” {then:.0%} → {now:.0%}"
            for phrase, then, now in watch.grown[:3]
            if now - then > limit / 2
        )
        return growth, (
            f"the same words are in {growth:.0%} more of the responses than at the start (limit {limit:.0%}): "
            f"{phrases}. If they have nothing to do with the request, the reward model pays for their sound: raise "
            "--kl-coef, or stop earlier"
        )


def check_judge(watch: Watch, limit: float) -> tuple[float, str] | None:
    """Goodhart's law: the judge's mean over `WINDOW` updates is below its best by more than chance, the score's not."""
    rows = [row for row in watch._rows if {"score", "judge", "judge_std"} <= set(row)]
    windows = [rows[i : i + WINDOW] for i in range(len(rows) - WINDOW + 1)]
    if len(windows) <= WINDOW:  # windows that overlap show no change
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
            f"{judge:.3g}, {errors:.1f} standard errors (limit {limit:g}). The policy is exploiting the reward model: "
            "roll back to an earlier checkpoint (--select does), and raise --kl-coef"
        )


CHECKS: dict[str, Callable[[Watch, float], tuple[float, str] | None]] = {
    "kl": check_kl,
    "entropy": check_entropy,
    "length": check_length,
    "eos": check_eos,
    "duplicates": check_duplicates,
    "boilerplate": check_boilerplate,
    "judge": check_judge,
}
