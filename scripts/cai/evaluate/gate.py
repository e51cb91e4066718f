"""Whether one evaluation is better, the same, or worse than another: what `evaluate.py --against` says.

    found = compare(load("base.jsonl"), load("sft.jsonl"))
    print(line(found, verdict(found)))

Prompt by prompt where both were measured on the same ones, else by the rates. A verdict looks at many figures at
once, so the intervals are wide enough to hold all together in 95 % of the cases (Bonferroni): a model compared
with itself is called worse in one case of forty at most. Leaves out how much a point of one figure is worth in
another: worse in any is worse.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

from cai.base.errors import InputError, shorten
from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.evaluate import rates as rates_
from cai.evaluate.rates import read_rates
from cai.stats.intervals import paired, unpaired

FEWER_IS_BETTER = (
    "harmful_compliance",
    "evasive",
    "preachy",
    "off_topic",
    "benign_refused",
    "over_refusal",
    "harmful_unsafe",
    "benign_unsafe",
    "borderline_unsafe",
    "log_loss",
    "ece",
    "harmfulness",
)

MORE_IS_BETTER = ("good_refusal", "benign_helpful", "accuracy", "p_correct")

# What has to be equal for two evaluations to be about the same thing.
READERS = ("by", "judge", "classifier", "unsafe_label", "template", "choice_format")


@dataclass
class Evaluation:
    """One output of evaluate.py. `outcomes`: {metric: {prompt: mean outcome, 0 to 1}}, as far as rows are beside it."""

    path: Path
    rates: dict[str, dict]
    outcomes: dict[str, dict[str, float]] = field(default_factory=dict)
    reader: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """What changed: now − before, with an interval of the level that `compare` was asked for.

    paired: by prompt. towards: +1 if more of it is better, −1 if fewer, 0 if it does not count for the verdict.
    """

    metric: str
    before: float
    now: float
    value: float
    low: float
    high: float
    n: int
    paired: bool
    towards: int

    @property
    def gain(self) -> tuple[float, float]:
        """(low, high) of the change for the better."""
        return (self.low, self.high) if self.towards > 0 else (-self.high, -self.low)


def load(path: str | Path) -> Evaluation:
    """An evaluation by the file that evaluate.py wrote: its rates, or the object that it printed with --json.

    The outcomes come from the rows beside it (`.classes.jsonl`, `.choices.jsonl`). Raises InputError if it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=path, expected="what evaluate.py wrote", remedy="Check the path")
    rates, home = None, path
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rates = content["metrics"]
            home = path.parent / Path(content["output"]).name if content.get("output") else path
            home = home if home.is_file() else Path(content.get("output") or path)
            assert all({"value", "low", "high", "n"} <= set(one) for one in rates.values())
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise InputError(
                "not what evaluate.py --json prints",
                where=path,
                expected='{"metrics": {...}, ...}',
                remedy="Name that, or the file of --output",
            ) from error
    else:
        rates = read_rates(path)
    stem = home.with_suffix("")
    made = Evaluation(path, rates, _outcomes(stem), {})
    manifest = read_manifest(home) or {}
    if manifest:
        made.reader = {name: manifest["fingerprint"].get(name) for name in READERS}
        if made.reader["by"] == "oracle":
            made.reader["judge"] = None  # it only looks on
    return made


def _outcomes(stem: Path) -> dict[str, dict[str, float]]:
    """{metric: {prompt: mean outcome}}; a prompt is told by its id and its text."""
    found: dict = {}
    for ending, read in ((".classes.jsonl", _by_class), (".choices.jsonl", _by_choice)):
        file = Path(f"{stem}{ending}")
        if file.is_file():
            try:
                found |= read([row for _, row in read_jsonl(file)])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise InputError(
                    f"a row that is not as evaluate.py wrote it ({shorten(repr(error))})",
                    where=file,
                    remedy="Measure again",
                ) from error
    return found


def _by_class(rows: list[dict]) -> dict[str, dict[str, float]]:
    found = {}
    texts = {row.get("prompt_id") or row["id"]: json.dumps(row["prompt"], sort_keys=True) for row in rows}
    for name, ones in rates_.outcomes(rows).items():
        each = defaultdict(list)
        for prompt, success, _ in ones:
            each[f"{prompt}\x1f{texts[prompt]}"].append(success)
        found[name] = {prompt: math.fsum(all_) / len(all_) for prompt, all_ in each.items()}
    return found


def _by_choice(rows: list[dict]) -> dict[str, dict[str, float]]:
    return {"accuracy": {row["id"]: float(row["right"]) for row in rows}}


def rows(path: str | Path) -> list[dict]:
    """The responses of an evaluation by its --output, those under stress left out. InputError if there are none."""
    file = Path(f"{Path(path).with_suffix('')}.classes.jsonl")
    if not file.is_file():
        raise InputError(
            "no responses beside it",
            where=path,
            expected=file.name,
            remedy="Name the --output of an evaluation of responses, its other files beside it",
        )
    return [row for _, row in read_jsonl(file) if not row.get("stress")]


def towards(metric: str) -> int:
    """+1: more is better; −1: fewer; 0: it is told, and does not count."""
    plain = metric.partition("_under_")[0]
    return -1 if plain in FEWER_IS_BETTER else 1 if plain in MORE_IS_BETTER else 0


def compare(before: Evaluation, now: Evaluation, level: float = 0.95, gated: bool = False) -> list[Delta]:
    """One Delta a figure that both have, those that count first; their intervals hold together with `level`.

    InputError if they share no figure (if `gated`, none that counts), or were read by different judges or templates.
    """
    differing = [name for name in READERS if before.reader and now.reader and before.reader[name] != now.reader[name]]
    if differing:
        raise InputError(
            f"measured differently: {', '.join(differing)} is not the same",
            where=before.path,
            expected=f"an evaluation like {now.path}",
            remedy="Measure both by the same reader",
        )
    both = [
        name
        for name, one in now.rates.items()
        if one["value"] is not None and before.rates.get(name, {}).get("value") is not None
    ]
    if not both:
        raise InputError(
            "no figure in common",
            where=before.path,
            expected=f"some of {', '.join(now.rates)}",
            remedy="Compare evaluations of the same kind",
        )
    counting = sum(towards(name) != 0 for name in both)
    if gated and not counting:
        raise InputError(
            "none of the figures is one that is better or worse",
            where=before.path,
            expected="classes of responses, or accuracies",
            remedy="Leave out --gate",
        )
    z = NormalDist().inv_cdf(1 - (1 - level) / 2 / max(1, counting))
    made = [_delta(name, before, now, z) for name in both]
    return sorted(made, key=lambda one: one.towards == 0)


def _delta(name: str, before: Evaluation, now: Evaluation, z: float) -> Delta:
    old, new = before.rates[name], now.rates[name]
    ones, others = before.outcomes.get(name, {}), now.outcomes.get(name, {})
    shared = [prompt for prompt in others if prompt in ones]
    if 2 * len(shared) > max(len(ones), len(others)):  # else too much would be left out
        a = math.fsum(ones[prompt] for prompt in shared) / len(shared)
        b = math.fsum(others[prompt] for prompt in shared) / len(shared)
        low, high = paired([others[prompt] - ones[prompt] for prompt in shared], z)
        return Delta(name, a, b, b - a, low, high, len(shared), True, towards(name))
    low, high = unpaired(old, new, z)
    n = min(old["n"], new["n"])
    return Delta(name, old["value"], new["value"], new["value"] - old["value"], low, high, n, False, towards(name))


def verdict(deltas: Sequence[Delta], margin: float = 0.0) -> str:
    """worse: a figure is surely worse by more than `margin`; better: none is, and one is surely better; else same."""
    counting = [one for one in deltas if one.towards]
    if any(one.gain[1] < -margin for one in counting):
        return "worse"
    return "better" if any(one.gain[0] > margin for one in counting) else "same"


def line(deltas: Sequence[Delta], said: str) -> str:
    """`VERDICT: worse | benign_helpful −12.0 (−18.1 to −5.9); ...`: what counts, clear changes first.

    Shares are in points of a hundred, other figures in their own unit.
    """
    counting = sorted((one for one in deltas if one.towards), key=lambda one: not _clear(one))
    return f"VERDICT: {said} | {'; '.join(map(shown, counting))}"


def shown(one: Delta) -> str:
    """`harmful_compliance −94.3 (−97.0 to −89.1)`."""
    share = not one.metric.startswith(("log_loss", "ece", "harmfulness"))
    value, low, high = (f"{100 * x:+.1f}" if share else f"{x:+.3f}" for x in (one.value, one.low, one.high))
    return f"{one.metric} {value} ({low} to {high})".replace("-", "−")


def as_json(one: Delta) -> dict:
    """The change as JSON has it: an end that is not known is null."""
    return {
        key: None if value in (math.inf, -math.inf) else value for key, value in asdict(one).items() if key != "metric"
    }


def _clear(one: Delta) -> bool:
    return one.low > 0 or one.high < 0
