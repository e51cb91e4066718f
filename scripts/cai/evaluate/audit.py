"""What a judge's labels are worth: its bents, its agreement with itself, with other judges and with gold labels.

    python scripts/judge.py --input pairs.jsonl --model tiny --output judged.jsonl --audit audit.json

Every figure is {value, low, high, n} with a 95 % interval; pairs of one prompt count as alike (`clusters`). Read from
the rows that judge.py wrote, which keep every verdict: nothing is judged again. Leaves out a verdict on the judge:
which bent is too strong is for the reader to say (SKILL.md has gates).
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed
from cai.data import preferences
from cai.stats import agreement, calibration, drawing, intervals

NOTHING = {"value": None, "low": None, "high": None, "n": 0}


class _Share:
    """Shares of successes, each with the prompt that it belongs to."""

    def __init__(self):
        self.successes, self.prompts = [], []

    def add(self, success: float, prompt: int) -> None:
        self.successes.append(success)
        self.prompts.append(prompt)

    def rate(self) -> dict:
        return intervals.clustered_rate(self.successes, self.prompts)


def measure(rows: Iterable[dict], judges: Sequence[str]) -> dict:
    """The figures of rows that judge.py wrote.

    Args:
        judges: names of the judges that made them.

    Of all pairs but ties (identical responses):
        nulls: rate without a readable verdict. undecided: rate at exactly a half.
        same_position: rate of verdicts' pairs of orders that prefer the same place, order_agreement: that prefer
            the same response. first_shown: mean probability of what was shown first; 0.5 without a bent.
        label_mass: mean share of probability that went to the labels; low_mass: rate of verdicts below a half,
            where the judge was about to say something else, a refusal for instance. None where it wrote letters.
        mean_margin: of |2p − 1|.
        win_rate: mean probability that response_a is better. length_corrected_win_rate: what it would be if both
            were of one length. length_correlation: of that probability with the difference in characters.
            longer_wins: rate of decided pairs that the longer one wins.
        self_preference: rate of decided pairs with one response of the judge's own (`model_a`, `model_b`) that
            this one wins; self_preference_excess: by how much more than by gold labels or, where there are none,
            by the mean of the other judges.
        disagreement: rate of verdicts under one of several principles that are against the combined label.
        principles: {id: {win_rate, same_position, disagreement, accuracy}}.
    With gold labels:
        accuracy, over decided pairs, beside always_a and longer (what these rules would get); ece and log_loss of
        the labels before clamping; calibration: the bins of the reliability diagram.
    With several judges:
        agreement: Krippendorff's alpha. judges: {name: {accuracy, ece, nulls, disagreement, self_preference}}.

    Raises InputError for a row that judge.py did not write, or a label that is no probability.
    """
    count = dict.fromkeys(("rows", "pairs", "identical", "empty"), 0)
    shares: dict[str, _Share] = defaultdict(_Share)
    principles: dict[str, dict[str, _Share]] = defaultdict(lambda: defaultdict(_Share))
    each: dict[str, _Judge] = {name: _Judge() for name in judges}
    whole = _Judge()
    margins, masses, first_shown, votes = [], [], [], Counter()
    labels, lengths, prompts, excess = [], [], [], []
    for number, row in enumerate(rows, 1):
        count["rows"] += 1
        _check(row, number)
        if row.get("tie"):
            count["identical"] += 1
            continue
        count["pairs"] += 1
        prompt = hashed_seed(preferences.prompt_key(row))  # eight bytes for what may be long
        a, b = row["response_a"], row["response_b"]
        count["empty"] += not (a.strip() and b.strip())
        p, gold = row["p_a"], row.get("gold")
        shares["nulls"].add(p is None, prompt)
        for one in row["verdicts"]:
            if one.get("mass") is not None:
                masses.append(one["mass"])
                shares["low_mass"].add(one["mass"] < 0.5, prompt)
            if one["p_a"] is not None:
                first_shown.append(one["p_a"] if one["order"] == preferences.ORDERS[0] else 1 - one["p_a"])
        for (_, principle), both in preferences.group_verdicts(row["verdicts"]).items():
            if None not in both:
                name = principle or row["principle"]
                _read_both(both, p if principle else None, gold, prompt, shares, principles[name])
        by_judge = row.get("judges") or {judges[0]: p}
        for name, label in by_judge.items():
            judge = each.setdefault(name, _Judge())
            judge.add(label, p, row, prompt)
            if own := _of_own(name, label, by_judge, row):
                judge.own.add(own[0], prompt)
                shares["self_preference"].add(own[0], prompt)
                if own[1] is not None:
                    excess.append(own[0] - own[1])
        votes[agreement.votes(list(by_judge.values()))] += 1
        if p is None:
            continue
        whole.add(p, None, row, prompt)
        shares["undecided"].add(p == 0.5, prompt)
        shares["win_rate"].add(p, prompt)
        margins.append(abs(2 * p - 1))
        labels.append(p)
        lengths.append(len(a) - len(b))
        prompts.append(prompt)
        if p != 0.5 and len(a) != len(b):
            shares["longer_wins"].add((p > 0.5) == (len(a) > len(b)), prompt)
        if gold and p != 0.5:
            shares["always_a"].add(gold == "a", prompt)
            shares["longer"].add((len(a) > len(b)) == (gold == "a"), prompt)
    made = {
        **count,
        **whole.figures(),
        **{name: shares[name].rate() for name in ("nulls", "undecided", "same_position", "order_agreement")},
        "first_shown": intervals.mean(first_shown),
        "label_mass": intervals.mean(masses),
        "low_mass": shares["low_mass"].rate(),
        "mean_margin": intervals.mean(margins),
        "win_rate": shares["win_rate"].rate(),
        "length_corrected_win_rate": length_corrected(labels, lengths, prompts),
        "length_correlation": intervals.correlation(labels, lengths),
        "longer_wins": shares["longer_wins"].rate(),
        "self_preference": shares["self_preference"].rate(),
        "self_preference_excess": intervals.mean(excess),
    }
    for name in ("always_a", "longer", "disagreement"):
        if name in shares:
            made[name] = shares[name].rate()
    made["principles"] = {
        name: {figure: share.rate() for figure, share in found.items()} for name, found in sorted(principles.items())
    }
    if len(each) > 1:
        made["agreement"] = agreement.agreement(votes)
        made["judges"] = {name: one.figures() | one.beside() for name, one in each.items()}
    return made


class _Judge:
    """What the labels of one judge, or of all combined, add up to."""

    def __init__(self):
        self.right, self.nulls, self.against, self.own = _Share(), _Share(), _Share(), _Share()
        self.said, self.held, self.losses = [], [], []

    def add(self, p: float | None, combined: float | None, row: dict, prompt: int) -> None:
        self.nulls.add(p is None, prompt)
        if p is None:
            return
        if combined is not None and 0.5 not in (p, combined):
            self.against.add((p > 0.5) != (combined > 0.5), prompt)
        if row.get("gold"):
            is_a = row["gold"] == "a"
            if p != 0.5:
                self.right.add((p > 0.5) == is_a, prompt)
            # Of the side that was chosen; at a half neither was, and either would do.
            self.said.append(max(p, 1 - p))
            self.held.append(0.5 if p == 0.5 else float((p > 0.5) == is_a))
            self.losses.append(-math.log(max(p if is_a else 1 - p, 1e-12)))

    def figures(self) -> dict:
        if not self.said:
            return {}
        found = calibration.calibration(self.said, self.held)
        return {
            "accuracy": self.right.rate(),
            "ece": found["ece"],
            "log_loss": intervals.mean(self.losses),
            "calibration": found,
        }

    def beside(self) -> dict:
        return {"nulls": self.nulls.rate(), "disagreement": self.against.rate(), "self_preference": self.own.rate()}


def _read_both(both, combined, gold, prompt, shares, found) -> None:
    """Count both orders of one judge under one principle; `found` is the principle's own."""
    same = preferences.same_position(*both)
    agree = (both[0] - 0.5) * (both[1] - 0.5) > 0
    p = sum(both) / 2
    shares["same_position"].add(same, prompt)
    shares["order_agreement"].add(agree, prompt)
    found["win_rate"].add(p, prompt)
    found["same_position"].add(same, prompt)
    if combined is not None and 0.5 not in (p, combined):
        against = (p > 0.5) != (combined > 0.5)
        found["disagreement"].add(against, prompt)
        shares["disagreement"].add(against, prompt)
    if gold and p != 0.5:
        found["accuracy"].add((p > 0.5) == (gold == "a"), prompt)


def _of_own(name: str, label: float | None, by_judge: Mapping, row: dict) -> tuple[bool, float | None] | None:
    """(whether a judge prefers its own response, how far others do); None where it wrote neither, or both.

    The others: the gold label, or the share of the other judges.
    """
    wrote = [side for side in "ab" if row.get(f"model_{side}") == name]
    if len(wrote) != 1 or label in (None, 0.5):
        return None
    if row.get("gold"):
        others = float(row["gold"] == wrote[0])
    else:
        others = agreement.majority([p for judge, p in by_judge.items() if judge != name])
        if others is not None and wrote[0] == "b":
            others = 1 - others
    return (label > 0.5) == (wrote[0] == "a"), others


def length_corrected(labels: Sequence[float], differences: Sequence[int], clusters: Sequence) -> dict:
    """The mean label that is left when both responses are of one length.

    The label's log-odds are taken to be a constant and a multiple of tanh(difference / standard deviation), as in
    Dubois et al. 2024 (arXiv 2404.04475) without their term for how hard a prompt is; the constant alone is shown.
    Fitted by Newton's method, weakly held to 0 (variance 25) so that it exists where all labels are alike. The 95 %
    interval is the sandwich estimator's, by clusters.

    Args:
        labels: probability that response_a is better. differences: characters of a less those of b.
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
    _, places = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((places.max() + 1, 2))
    np.add.at(sums, places, x * (y - p)[:, None])
    inverse = np.linalg.inv(curvature)
    half = intervals.Z * math.sqrt((inverse @ (sums.T @ sums) @ inverse)[0, 0])
    value, low, high = (float(1 / (1 + np.exp(-z))) for z in (weights[0], weights[0] - half, weights[0] + half))
    return {"value": value, "low": low, "high": high, "n": n}


def check_path(path: str | None, others: Iterable[str]) -> None:
    """InputError if the audit can't go there: it must be a .json beside which a .png can lie, and no other file."""
    if path is None:
        return
    if Path(path).suffix != ".json":
        raise InputError(f"--audit {path}", expected="a file name that ends in .json")
    if any(os.path.realpath(path) == os.path.realpath(other) for other in others):
        raise InputError("the audit would replace an input or the output", where=path, remedy="Name another --audit")


def write(path: str, measured: Mapping, title: str) -> dict:
    """Write the figures as JSON and, with gold labels, the reliability diagram beside it. Returns where they are."""
    written = {"file": str(path)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if "calibration" in measured:
        picture = Path(path).with_suffix(".png")
        drawing.reliability(picture, measured["calibration"], shorten(title, 40))
        written["reliability"] = str(picture)
    temporary = f"{path}.tmp"
    Path(temporary).write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return written


def _check(row: dict, number: int) -> None:
    missing = [name for name in ("prompt", "response_a", "response_b", "p_a", "verdicts") if name not in row]
    if missing:
        raise InputError(f"row {number} has no {missing[0]!r}", expected="rows that judge.py wrote")
    for p in (row["p_a"], *(row.get("judges") or {}).values(), *(one["p_a"] for one in row["verdicts"])):
        if p is not None and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1):
            raise InputError(
                f"row {number} ({shorten(row.get('id'))}) has the label {shorten(p)!r}",
                expected="a probability from 0 to 1, or null",
            )
