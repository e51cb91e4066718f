"""The quality of a judge's labels: its biases, its agreement with itself, with other judges and with gold labels.

    python scripts/judge.py --input pairs.jsonl --model tiny --output judged.jsonl --audit audit.json

Every figure is {value, low, high, n} with a 95 % interval; pairs of one prompt count as alike (`clusters`). Read from
the rows that judge.py wrote, which keep every verdict: nothing is judged again. Leaves out a verdict on the judge:
which bias is too strong is for the reader to decide (SKILL.md has gates).
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cai.base import files, hashing
from cai.base.errors import InputError, shorten
from cai.data import preferences
from cai.stats import agreement, calibration, drawing, intervals

NOTHING = {"value": None, "low": None, "high": None, "n": 0}


class _Tally:
    """Outcomes by name, each with the prompt that it belongs to."""

    def __init__(self):
        self.outcomes: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def add(self, prompt: int, **outcomes: float) -> None:
        for name, outcome in outcomes.items():
            self.outcomes[name].append((outcome, prompt))

    def values(self, name: str) -> list[float]:
        return [outcome for outcome, _ in self.outcomes.get(name, ())]

    def rate(self, name: str) -> dict:
        return intervals.clustered_rate(self.values(name), [prompt for _, prompt in self.outcomes.get(name, ())])

    def mean(self, name: str) -> dict:
        return intervals.mean(self.values(name))


def measure(rows: Iterable[dict], judges: Sequence[str]) -> dict:
    """The figures of rows that judge.py wrote.

    Args:
        judges: names of the judges that wrote their verdicts.

    Of all pairs but ties (identical responses):
        nulls: rate without a readable verdict. undecided: rate at exactly a half.
        same_position: rate of verdicts' pairs of orders that prefer the same position, order_agreement: that prefer
            the same response. first_shown: mean probability of the response shown first; 0.5 without a bias.
        label_mass: mean share of probability that went to the labels; low_mass: rate of verdicts below a half,
            where the judge was about to write something else, a refusal for instance. None where it wrote letters.
        mean_margin: of |2p − 1|.
        win_rate: mean probability that response_a is better. length_corrected_win_rate: what it would be if both
            were of one length. length_correlation: of that probability with the difference in characters.
            longer_wins: rate of decided pairs that the longer response wins.
        self_preference: rate of decided pairs with one response by the judge itself (`model_a`, `model_b`) that
            this response wins; self_preference_excess: by how much more than by gold labels or, where there are
            none, by the mean of the other judges.
        disagreement: rate of verdicts under one of several principles that are against the combined label.
        principles: {id: {win_rate, same_position, disagreement, accuracy}}.
    With gold labels:
        accuracy, over decided pairs, beside always_a and longer (what these rules would get); ece and log_loss of
        the labels before clamping; calibration: the bins of the reliability diagram.
    With several judges:
        agreement: Krippendorff's alpha. judges: {name: {accuracy, ece, nulls, disagreement, self_preference}}.

    Raises InputError for a row that judge.py did not write, or a label that is not a probability.
    """
    audit = _Audit(judges)
    for number, row in enumerate(rows, 1):
        _check(row, number)
        audit.add(row)
    return audit.figures()


class _Audit:
    """What the rows of judge.py add up to: all together, by principle, by judge, and the combined label."""

    def __init__(self, judges: Sequence[str]):
        self.counts = dict.fromkeys(("rows", "pairs", "identical", "empty"), 0)
        self.judges = {name: _Tally() for name in judges}
        self.principles: dict[str, _Tally] = defaultdict(_Tally)
        self.pairs, self.combined = _Tally(), _Tally()
        self.votes: Counter = Counter()

    def add(self, row: dict) -> None:
        self.counts["rows"] += 1
        if row.get("tie"):
            self.counts["identical"] += 1
            return
        prompt = hashing.hashed_seed(preferences.prompt_key(row))  # eight bytes for what may be long
        self.counts["pairs"] += 1
        self.counts["empty"] += not (row["response_a"].strip() and row["response_b"].strip())
        self.pairs.add(prompt, nulls=row["p_a"] is None)
        self._add_verdicts(row, prompt)
        self._add_judges(row, prompt)
        if row["p_a"] is not None:
            self._add_combined(row, prompt)

    def _add_verdicts(self, row: dict, prompt: int) -> None:
        for verdict in row["verdicts"]:
            p, mass = verdict["p_a"], verdict.get("mass")
            if mass is not None:
                self.pairs.add(prompt, label_mass=mass, low_mass=mass < 0.5)
            if p is not None:
                self.pairs.add(prompt, first_shown=p if verdict["order"] == preferences.ORDERS[0] else 1 - p)
        for (_, principle), (p_ab, p_ba) in preferences.group_verdicts(row["verdicts"]).items():
            if p_ab is None or p_ba is None:
                continue
            same, p = preferences.same_position(p_ab, p_ba), (p_ab + p_ba) / 2
            self.pairs.add(prompt, same_position=same, order_agreement=(p_ab - 0.5) * (p_ba - 0.5) > 0)
            tally = self.principles[principle or row["principle"]]
            tally.add(prompt, win_rate=p, same_position=same)
            if principle and _are_decided(p, row["p_a"]):
                disagreement = (p > 0.5) != (row["p_a"] > 0.5)
                tally.add(prompt, disagreement=disagreement)
                self.pairs.add(prompt, disagreement=disagreement)
            if row.get("gold") and p != 0.5:
                tally.add(prompt, accuracy=(p > 0.5) == (row["gold"] == "a"))

    def _add_judges(self, row: dict, prompt: int) -> None:
        labels = row.get("judges") or {next(iter(self.judges)): row["p_a"]}
        for name, p in labels.items():
            judge = self.judges.setdefault(name, _Tally())
            judge.add(prompt, nulls=p is None)
            if _are_decided(p, row["p_a"]):
                judge.add(prompt, disagreement=(p > 0.5) != (row["p_a"] > 0.5))
            _add_label(judge, p, row.get("gold"), prompt)
            if (preference := _own_preference(name, labels, row)) is not None:
                is_own, others = preference
                judge.add(prompt, self_preference=is_own)
                self.pairs.add(prompt, self_preference=is_own)
                if others is not None:
                    self.pairs.add(prompt, self_preference_excess=is_own - others)
        self.votes[agreement.votes(list(labels.values()))] += 1

    def _add_combined(self, row: dict, prompt: int) -> None:
        p, gold = row["p_a"], row.get("gold")
        _add_label(self.combined, p, gold, prompt)
        longer = len(row["response_a"]) - len(row["response_b"])
        self.pairs.add(prompt, undecided=p == 0.5, win_rate=p, mean_margin=abs(2 * p - 1), length_difference=longer)
        if p != 0.5 and longer:
            self.pairs.add(prompt, longer_wins=(p > 0.5) == (longer > 0))
        if p != 0.5 and gold:
            self.pairs.add(prompt, always_a=gold == "a", longer=(longer > 0) == (gold == "a"))

    def figures(self) -> dict:
        """The figures of `measure`."""
        pairs = self.pairs
        labels, lengths = pairs.values("win_rate"), pairs.values("length_difference")
        prompts = [prompt for _, prompt in pairs.outcomes.get("win_rate", ())]
        figures = {
            **self.counts,
            **_label_figures(self.combined),
            **{name: pairs.rate(name) for name in ("nulls", "undecided", "same_position", "order_agreement")},
            "first_shown": pairs.mean("first_shown"),
            "label_mass": pairs.mean("label_mass"),
            "low_mass": pairs.rate("low_mass"),
            "mean_margin": pairs.mean("mean_margin"),
            "win_rate": pairs.rate("win_rate"),
            "length_corrected_win_rate": length_corrected(labels, lengths, prompts),
            "length_correlation": intervals.correlation(labels, lengths),
            "longer_wins": pairs.rate("longer_wins"),
            "self_preference": pairs.rate("self_preference"),
            "self_preference_excess": pairs.mean("self_preference_excess"),
            **{name: pairs.rate(name) for name in ("always_a", "longer", "disagreement") if name in pairs.outcomes},
            "principles": {
                name: {figure: tally.rate(figure) for figure in tally.outcomes}
                for name, tally in sorted(self.principles.items())
            },
        }
        if len(self.judges) > 1:
            figures["agreement"] = agreement.agreement(self.votes)
            figures["judges"] = {
                name: _label_figures(judge)
                | {figure: judge.rate(figure) for figure in ("nulls", "disagreement", "self_preference")}
                for name, judge in self.judges.items()
            }
        return figures


def _are_decided(*labels: float | None) -> bool:
    return None not in labels and 0.5 not in labels


def _add_label(tally: _Tally, p: float | None, gold: str | None, prompt: int) -> None:
    """Count a label against the gold one, if there is one."""
    if p is None or not gold:
        return
    is_right, p_gold = (p > 0.5) == (gold == "a"), p if gold == "a" else 1 - p
    if p != 0.5:
        tally.add(prompt, accuracy=is_right)
    # The confidence is in the side that was chosen; at a half neither was, and either would do.
    outcome = 0.5 if p == 0.5 else float(is_right)
    tally.add(prompt, confidence=max(p, 1 - p), outcome=outcome, log_loss=-math.log(max(p_gold, 1e-12)))


def _label_figures(tally: _Tally) -> dict:
    """accuracy, ece, log_loss and calibration of labels whose gold is known; {} without any."""
    if "confidence" not in tally.outcomes:
        return {}
    bins = calibration.calibration(tally.values("confidence"), tally.values("outcome"))
    log_loss = tally.mean("log_loss")
    return {"accuracy": tally.rate("accuracy"), "ece": bins["ece"], "log_loss": log_loss, "calibration": bins}


def _own_preference(judge: str, labels: Mapping, row: dict) -> tuple[bool, float | None] | None:
    """(whether a judge prefers its own response, how far others do); None where it wrote neither, or both.

    The others: the gold label, or the share of the other judges.
    """
    own_sides = [side for side in "ab" if row.get(f"model_{side}") == judge]
    if len(own_sides) != 1 or labels[judge] in (None, 0.5):
        return None
    [side] = own_sides
    if row.get("gold"):
        others = float(row["gold"] == side)
    else:
        others = agreement.majority([p for name, p in labels.items() if name != judge])
        if others is not None and side == "b":
            others = 1 - others
    return (labels[judge] > 0.5) == (side == "a"), others


def length_corrected(labels: Sequence[float], differences: Sequence[int], clusters: Sequence) -> dict:
    """The mean label as it would be if both responses had the same length.

    The label's log-odds are a constant plus a multiple of tanh(difference / standard deviation), as in Dubois et al.
    2024 (arXiv 2404.04475) without their term for how hard a prompt is; the constant alone is reported. Fitted by
    Newton's method with a weak prior (mean 0, variance 25), so that it exists where all labels are alike. The 95 %
    interval is the sandwich estimator's, by clusters.

    Args:
        labels: probability that response_a is better. differences: characters of a minus those of b.
    """
    import numpy as np

    n = len(labels)
    if n < 4:
        return {**NOTHING, "n": n}
    y, d = np.asarray(labels, float), np.asarray(differences, float)
    x = np.column_stack([np.ones(n), np.tanh(d / (d.std() or 1.0))])
    weights, prior = np.zeros(2), np.eye(2) / 25
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ weights)))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(curvature, x.T @ (y - p) - prior @ weights)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    _, positions = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((positions.max() + 1, 2))
    np.add.at(sums, positions, x * (y - p)[:, None])
    inverse = np.linalg.inv(curvature)
    half = intervals.Z * math.sqrt((inverse @ (sums.T @ sums) @ inverse)[0, 0])
    value, low, high = (float(1 / (1 + np.exp(-z))) for z in (weights[0], weights[0] - half, weights[0] + half))
    return {"value": value, "low": low, "high": high, "n": n}


def check_path(path: str | None, others: Iterable[str]) -> None:
    """InputError unless the audit can go there: a .json beside which a .png can lie, and no input or output."""
    if path is None:
        return
    if Path(path).suffix != ".json":
        raise InputError(f"--audit {path}", expected="a file name that ends in .json")
    if any(os.path.realpath(path) == os.path.realpath(other) for other in others):
        raise InputError("the audit would replace an input or the output", where=path, remedy="Name another --audit")


def write(path: str, measured: Mapping, title: str) -> dict:
    """Write the figures as JSON and, with gold labels, the reliability diagram beside it. Returns their paths."""
    paths = {"file": str(path)}
    files.write_text(path, json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    if "calibration" in measured:
        paths["reliability"] = str(Path(path).with_suffix(".png"))
        drawing.reliability(paths["reliability"], measured["calibration"], shorten(title, 40))
    return paths


def _check(row: dict, number: int) -> None:
    missing = [name for name in ("prompt", "response_a", "response_b", "p_a", "verdicts") if name not in row]
    if missing:
        raise InputError(f"row {number} has no {missing[0]!r}", expected="rows that judge.py wrote")
    for p in (row["p_a"], *(row.get("judges") or {}).values(), *(verdict["p_a"] for verdict in row["verdicts"])):
        if p is not None and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1):
            raise InputError(
                f"row {number} ({shorten(row.get('id'))}) has the label {shorten(p)!r}",
                expected="a probability from 0 to 1, or null",
            )
