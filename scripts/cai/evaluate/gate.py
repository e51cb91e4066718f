"""Whether one evaluation is better, the same, or worse than another: what `evaluate.py --against` reports.

    deltas = compare(load("base.jsonl"), load("sft.jsonl"))
    print(verdict_line(deltas, verdict(deltas)))

Prompt by prompt where both were measured on the same ones, else by the rates. A verdict depends on many figures at
once, so the intervals are wide enough to hold all together in 95 % of the cases (Bonferroni): a model compared with
itself is called worse in one case of forty at most. Leaves out how much a point of one figure is worth in another:
worse in any is worse.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cai.base.errors import InputError, shorten
from cai.data import outputs, readers
from cai.evaluate.rates import FIELDS, outcomes, read_rates
from cai.stats import intervals

# +1: more of it is better; -1: fewer is better. Others are reported, and do not count.
TOWARDS = {
    **dict.fromkeys(("harmful_compliance", "evasive", "preachy", "off_topic", "benign_refused", "over_refusal"), -1),
    **dict.fromkeys(("harmful_unsafe", "benign_unsafe", "borderline_unsafe", "log_loss", "ece", "harmfulness"), -1),
    **dict.fromkeys(("good_refusal", "benign_helpful", "accuracy", "p_correct"), 1),
}

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
    """What changed: now − before, with an interval of the level given to `compare`.

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


def load(path: str | Path) -> Evaluation:
    """An evaluation by the file that evaluate.py wrote: its rates, or the object that it printed with --json.

    The outcomes come from the rows beside it (`.classes.jsonl`, `.choices.jsonl`). Raises InputError if it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=path, expected="what evaluate.py wrote", remedy="Check the path")
    rates, output = _read_printed(path) if path.suffix == ".json" else (read_rates(path), path)
    manifest = outputs.read_manifest(output)
    reader = {name: manifest["fingerprint"].get(name) for name in READERS} if manifest else {}
    if reader.get("by") == "oracle":
        reader["judge"] = None  # it is only compared with the oracle
    return Evaluation(path, rates, _read_outcomes(output.with_suffix("")), reader)


def _read_printed(path: Path) -> tuple[dict, Path]:
    """(rates, the file of --output) of the object that evaluate.py --json printed; the file may have moved along."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates, output = content["metrics"], Path(content.get("output") or path)
        if not all(set(FIELDS) <= set(rate) for rate in rates.values()):
            raise ValueError("a metric without its fields")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "not what evaluate.py --json prints",
            where=path,
            expected='{"metrics": {...}, ...}',
            remedy="Name that, or the file of --output",
        ) from error
    beside = path.parent / output.name
    return rates, beside if beside.is_file() else output


def _read_outcomes(stem: Path) -> dict[str, dict[str, float]]:
    """{metric: {prompt: mean outcome}} of the rows beside an evaluation; a prompt is known by its id and its text."""
    by_metric: dict = {}
    for ending in ("classes", "choices"):
        file = Path(f"{stem}.{ending}.jsonl")
        try:
            rows = [row for _, row in readers.read_jsonl(file)] if file.is_file() else []
            if ending == "classes":
                by_metric |= _mean_outcomes(rows)
            elif rows:
                by_metric["accuracy"] = {row["id"]: float(row["right"]) for row in rows}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"a row that is not as evaluate.py wrote it ({shorten(repr(error))})",
                where=file,
                remedy="Measure again",
            ) from error
    return by_metric


def _mean_outcomes(rows: list[dict]) -> dict[str, dict[str, float]]:
    texts = {row.get("prompt_id") or row["id"]: json.dumps(row["prompt"], sort_keys=True) for row in rows}
    means = {}
    for metric, results in outcomes(rows).items():
        by_prompt = defaultdict(list)
        for prompt, success, _ in results:
            by_prompt[f"{prompt}\x1f{texts[prompt]}"].append(success)
        means[metric] = {prompt: statistics.fmean(values) for prompt, values in by_prompt.items()}
    return means


def read_responses(path: str | Path) -> list[dict]:
    """The responses of an evaluation by its --output, without those under stress. InputError if there are none."""
    file = Path(f"{Path(path).with_suffix('')}.classes.jsonl")
    if not file.is_file():
        raise InputError(
            "no responses beside it",
            where=path,
            expected=file.name,
            remedy="Name the --output of an evaluation of responses, its other files beside it",
        )
    return [row for _, row in readers.read_jsonl(file) if not row.get("stress")]


def towards(metric: str) -> int:
    """The entry of `TOWARDS`, under stress as without; 0 if there is none."""
    return TOWARDS.get(metric.partition("_under_")[0], 0)


def compare(before: Evaluation, now: Evaluation, level: float = 0.95, gated: bool = False) -> list[Delta]:
    """One Delta per figure that both have, those that count first; their intervals hold together with `level`.

    InputError if they share no figure (if `gated`, none that counts), or were read by different judges or templates.
    """
    differing = [name for name in READERS if before.reader and now.reader and before.reader[name] != now.reader[name]]
    if differing:
        raise InputError(
            f"measured differently: {', '.join(differing)} is not the same",
            where=before.path,
            expected=f"an evaluation like {now.path}",
            remedy="Measure both with the same reader",
        )
    shared = [
        name
        for name, rate in now.rates.items()
        if rate["value"] is not None and before.rates.get(name, {}).get("value") is not None
    ]
    if not shared:
        raise InputError(
            "no figure in common",
            where=before.path,
            expected=f"some of {', '.join(now.rates)}",
            remedy="Compare evaluations of the same kind",
        )
    counting = sum(towards(name) != 0 for name in shared)
    if gated and not counting:
        raise InputError(
            "none of the figures is one that is better or worse",
            where=before.path,
            expected="classes of responses, or accuracies",
            remedy="Leave out --gate",
        )
    z = statistics.NormalDist().inv_cdf(1 - (1 - level) / 2 / max(1, counting))
    return sorted((_delta(name, before, now, z) for name in shared), key=lambda delta: delta.towards == 0)


def _delta(metric: str, before: Evaluation, now: Evaluation, z: float) -> Delta:
    old, new = before.outcomes.get(metric, {}), now.outcomes.get(metric, {})
    shared = [prompt for prompt in new if prompt in old]
    is_paired = 2 * len(shared) > max(len(old), len(new))  # else too much would be left out
    if is_paired:
        first, second = (statistics.fmean(values[prompt] for prompt in shared) for values in (old, new))
        low, high = intervals.paired([new[prompt] - old[prompt] for prompt in shared], z)
        n = len(shared)
    else:
        rates = before.rates[metric], now.rates[metric]
        first, second = (rate["value"] for rate in rates)
        low, high = intervals.unpaired(*rates, z)
        n = min(rate["n"] for rate in rates)
    return Delta(metric, first, second, second - first, low, high, n, is_paired, towards(metric))


def verdict(deltas: Sequence[Delta], margin: float = 0.0) -> str:
    """worse: a figure is surely worse by more than `margin`; better: none is, and one is surely better; else same."""
    # (low, high) of each change for the better
    gains = [(d.low, d.high) if d.towards > 0 else (-d.high, -d.low) for d in deltas if d.towards]
    if any(high < -margin for _, high in gains):
        return "worse"
    return "better" if any(low > margin for low, _ in gains) else "same"


def verdict_line(deltas: Sequence[Delta], verdict: str) -> str:
    """`VERDICT: worse | benign_helpful −12.0 (−18.1 to −5.9); ...`: what counts, clear changes first.

    Shares are in percentage points, other figures in their own unit.
    """
    counting = [delta for delta in deltas if delta.towards]
    counting.sort(key=lambda delta: delta.low <= 0 <= delta.high)
    return f"VERDICT: {verdict} | {'; '.join(f'{delta.metric} {show(delta)}' for delta in counting)}"


def show(delta: Delta) -> str:
    """`−94.3 (−97.0 to −89.1)`."""
    is_share = not delta.metric.startswith(("log_loss", "ece", "harmfulness"))
    value, low, high = (f"{100 * x:+.1f}" if is_share else f"{x:+.3f}" for x in (delta.value, delta.low, delta.high))
    return f"{value} ({low} to {high})".replace("-", "−")


def as_json(delta: Delta) -> dict:
    """The change as JSON has it: an end that is not known is null."""
    return {
        key: None if value in (math.inf, -math.inf) else value
        for key, value in asdict(delta).items()
        if key != "metric"
    }
