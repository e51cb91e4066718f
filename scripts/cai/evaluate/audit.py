"""The quality of a judge's labels: its biases, its agreement with itself, with other judges and with gold labels.

    python scripts/judge.py --input pairs.jsonl --model tiny --output judged.jsonl --audit audit.json

Every figure is {value, low, high, n} with a 95 % interval; pairs of one prompt count as alike (`clusters`). Read from
the rows that judge.py wrote, which keep every verdict: nothing is judged again. Leaves out a verdict on the judge:
which bias is too strong is for the reader to decide (SKILL.md has gates).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cai.base import files, hashing
from cai.base.errors import InputError, shorten
from cai.data import preferences
from cai.stats import agreement, calibration, drawing, intervals


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
    identical, pairs, verdicts, orders, labels = 0, [], [], [], []
    for number, row in enumerate(rows, 1):
        _check(row, number)
        if row.get("tie"):
            identical += 1
            continue
        by_judge = row.get("judges") or {judges[0]: row["p_a"]}
        pair = _read_pair(row, by_judge)
        pairs.append(pair)
        labels += [
            {**pair, "judge": name, "p": p, "own": _own_preference(name, by_judge, row)} for name, p in by_judge.items()
        ]
        verdicts += [{**verdict, "prompt": pair["prompt"]} for verdict in row["verdicts"]]
        orders += _read_orders(row, pair)
    figures = {
        "rows": len(pairs) + identical,
        "pairs": len(pairs),
        "identical": identical,
        "empty": sum(pair["empty"] for pair in pairs),
        **_label_figures(pairs),
        **_pair_figures(pairs),
        **_verdict_figures(verdicts),
        **_order_figures(orders),
        **_own_figures(labels),
    }
    names = list(dict.fromkeys([*judges, *(label["judge"] for label in labels)]))
    if len(names) > 1:
        figures["agreement"] = agreement.agreement(Counter(pair["votes"] for pair in pairs))
        figures["judges"] = {name: _judge_figures([row for row in labels if row["judge"] == name]) for name in names}
    return figures


def _read_pair(row: dict, by_judge: Mapping[str, float | None]) -> dict:
    """What is counted of a row. p: the label that is measured, here the combined one."""
    return {
        "prompt": hashing.hashed_seed(preferences.prompt_key(row)),  # eight bytes for what may be long
        "p": row["p_a"],
        "combined": row["p_a"],
        "gold": row.get("gold"),
        "longer": len(row["response_a"]) - len(row["response_b"]),
        "empty": not (row["response_a"].strip() and row["response_b"].strip()),
        "votes": agreement.votes(list(by_judge.values())),
    }


def _read_orders(row: dict, pair: dict) -> list[dict]:
    """Of each judge and principle, the verdicts in both orders. p: their mean; combined: only of several principles."""
    return [
        {
            **pair,
            "principle": principle or row["principle"],
            "orders": orders,
            "p": sum(orders) / 2,
            "combined": row["p_a"] if principle else None,
        }
        for (_, principle), orders in preferences.group_verdicts(row["verdicts"]).items()
        if None not in orders
    ]


def _rate(rows: Sequence[dict], success: Callable[[dict], float]) -> dict:
    """The rate over rows, those of one prompt alike."""
    return intervals.clustered_rate([success(row) for row in rows], [row["prompt"] for row in rows])


def _accuracy(rows: Iterable[dict]) -> dict:
    """How often a decided label is the gold one."""
    return _rate([row for row in rows if row["gold"] and row["p"] not in (None, 0.5)], _is_right)


def _is_right(row: dict) -> bool:
    return (row["p"] > 0.5) == (row["gold"] == "a")


def _disagreement(rows: Iterable[dict]) -> dict:
    """How often a decided label is against the combined one."""
    decided = [row for row in rows if not {None, 0.5} & {row["p"], row["combined"]}]
    return _rate(decided, lambda row: (row["p"] > 0.5) != (row["combined"] > 0.5))


def _label_figures(rows: Iterable[dict]) -> dict:
    """accuracy, ece, log_loss and calibration of labels whose gold is known; {} without any."""
    known = [row for row in rows if row["gold"] and row["p"] is not None]
    if not known:
        return {}
    # The confidence is in the side that was chosen; at a half neither was, and either would do.
    outcomes = [0.5 if row["p"] == 0.5 else float(_is_right(row)) for row in known]
    bins = calibration.calibration([max(row["p"], 1 - row["p"]) for row in known], outcomes)
    p_gold = [row["p"] if row["gold"] == "a" else 1 - row["p"] for row in known]
    return {
        "accuracy": _accuracy(known),
        "ece": bins["ece"],
        "log_loss": intervals.mean([-math.log(max(p, 1e-12)) for p in p_gold]),
        "calibration": bins,
    }


def _pair_figures(pairs: Sequence[dict]) -> dict:
    known = [pair for pair in pairs if pair["p"] is not None]
    decided = [pair for pair in known if pair["p"] != 0.5]
    with_gold = [pair for pair in decided if pair["gold"]]
    labels, lengths = [pair["p"] for pair in known], [pair["longer"] for pair in known]
    rules = {
        "always_a": _rate(with_gold, lambda pair: pair["gold"] == "a"),
        "longer": _rate(with_gold, lambda pair: (pair["longer"] > 0) == (pair["gold"] == "a")),
    }
    return {
        "nulls": _rate(pairs, lambda pair: pair["p"] is None),
        "undecided": _rate(known, lambda pair: pair["p"] == 0.5),
        "mean_margin": intervals.mean([abs(2 * p - 1) for p in labels]),
        "win_rate": _rate(known, lambda pair: pair["p"]),
        "length_corrected_win_rate": length_corrected(labels, lengths, [pair["prompt"] for pair in known]),
        "length_correlation": intervals.correlation(labels, lengths),
        "longer_wins": _rate(
            [pair for pair in decided if pair["longer"]], lambda pair: (pair["p"] > 0.5) == (pair["longer"] > 0)
        ),
        **(rules if with_gold else {}),
    }


def _verdict_figures(verdicts: Sequence[dict]) -> dict:
    with_mass = [verdict for verdict in verdicts if verdict.get("mass") is not None]
    first = [
        v["p_a"] if v["order"] == preferences.ORDERS[0] else 1 - v["p_a"] for v in verdicts if v["p_a"] is not None
    ]
    return {
        "first_shown": intervals.mean(first),
        "label_mass": intervals.mean([verdict["mass"] for verdict in with_mass]),
        "low_mass": _rate(with_mass, lambda verdict: verdict["mass"] < 0.5),
    }


def _order_figures(orders: Sequence[dict]) -> dict:
    """Figures of verdicts in both orders, all together and by principle; without those that no row counts for."""

    def same_position(rows: Sequence[dict]) -> dict:
        return _rate(rows, lambda row: preferences.same_position(*row["orders"]))

    names = sorted({row["principle"] for row in orders})
    by_principle = {name: [row for row in orders if row["principle"] == name] for name in names}
    principles = {
        name: {
            "win_rate": _rate(rows, lambda row: row["p"]),
            "same_position": same_position(rows),
            "disagreement": _disagreement(rows),
            "accuracy": _accuracy(rows),
        }
        for name, rows in by_principle.items()
    }
    disagreement = _disagreement(orders)
    return {
        "same_position": same_position(orders),
        "order_agreement": _rate(orders, lambda row: (row["orders"][0] - 0.5) * (row["orders"][1] - 0.5) > 0),
        **({"disagreement": disagreement} if disagreement["n"] else {}),
        "principles": {
            name: {figure: rate for figure, rate in rates.items() if rate["n"]} for name, rates in principles.items()
        },
    }


def _own_figures(labels: Sequence[dict]) -> dict:
    self_written = [row for row in labels if row["own"]]
    return {
        "self_preference": _rate(self_written, lambda row: row["own"][0]),
        "self_preference_excess": intervals.mean(
            [is_own - others for is_own, others in (row["own"] for row in self_written) if others is not None]
        ),
    }


def _judge_figures(labels: Sequence[dict]) -> dict:
    return {
        **_label_figures(labels),
        "nulls": _rate(labels, lambda row: row["p"] is None),
        "disagreement": _disagreement(labels),
        "self_preference": _own_figures(labels)["self_preference"],
    }


def _own_preference(judge: str, labels: Mapping[str, float | None], row: dict) -> tuple[bool, float | None] | None:
    """(whether a judge prefers its own response, how far others do); None where it wrote neither, or both.

    The others: the gold label, or the share of the other judges.
    """
    own_sides = [side for side in "ab" if row.get(f"model_{side}") == judge]
    if len(own_sides) != 1 or labels[judge] in (None, 0.5):
        return None
    [side] = own_sides
    other_labels = [p for name, p in labels.items() if name != judge]
    others = float(row["gold"] == "a") if row.get("gold") else agreement.majority(other_labels)
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
        return {**intervals.rate(0, 0), "n": n}
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
