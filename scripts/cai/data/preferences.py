"""Preference rows as judge.py writes them, read for training: which response was chosen, and how surely.

    pairs, counts, digest = read_pairs(["preferences.jsonl"], "soft", limit=None)

TRL's chosen/rejected and HH-RLHF's two transcripts are read too; they have no soft label, so one must be given.
Leaves out what teaches nothing or is not wanted, and counts it: pairs that the judge could not decide, identical
responses, labels nearer to a toss-up than `min_margin`. How a trainer uses a pair is the trainer's business.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed, sha256_text
from cai.data.dialogue import as_messages, prompt_text
from cai.data.prefills import continuation_of, conversation_of, prefill_of
from cai.data.readers import Row
from cai.data.reading import AS_THEY_ARE, Reading
from cai.data.shards import Shard
from cai.data.sources import Source, first_row

LABELS = ("A", "B")

ORDERS = ("ab", "ba")  # which response is shown first, and so under the label A


# Fields of a pair and its verdict. A row of one response may carry them along from a file of pairs.
OF_A_PAIR = ("response_a", "response_b", "gold", "chosen", "rejected", "p_chosen", "p_a", "verdicts", "tie")


def without_responses(row: Row) -> Row:
    """A prompt's row without what it says of earlier responses: a new one is about to be made."""
    return {name: value for name, value in row.items() if name not in ("rounds", "in_context", *OF_A_PAIR)}


# --- preferences for training -------------------------------------------------------------------------------


def check_sides(row: Row, where: object, line: int) -> None:
    """Raise InputError if a pair has one response only; an undecided pair of judge.py has none."""
    missing = [side for side in ("chosen", "rejected") if row[side] is None]
    if len(missing) == 1:
        raise InputError(
            f"'{missing[0]}' is null, and the other response is there",
            where=where,
            line=line,
            expected="two responses, or null for both where nothing was decided",
            remedy="Fix or delete this row",
        )


def check_label(row: Row, where: object, line: int) -> None:
    """Raise InputError if a decided pair has no probability to train to."""
    p = row.get("p_chosen")
    if row["chosen"] is None or row["rejected"] is None:
        return
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise InputError(
            f"p_chosen is {shorten(p)!r}",
            where=where,
            line=line,
            expected="a probability from 0 to 1",
            remedy="Make the rows with judge.py, or train on --labels hard, or give --default-label",
        )


def find_fault(row: Row) -> str | None:
    """Why a pair teaches nothing: "undecided" or "identical"; None where it can be trained on."""
    if row["chosen"] is None:
        return "undecided"
    return "identical" if row["chosen"].strip() == row["rejected"].strip() else None


def read_pairs(
    inputs: Sequence[str],
    labels: str,
    limit: int | None,
    *,
    min_margin: float = 0.0,
    default_label: float | None = None,
    reading: Reading = AS_THEY_ARE,
) -> tuple[list[Row], dict[str, int], str]:
    """(decided pairs of {prompt, chosen, rejected, p_chosen, prefill if there is one}, counts, digest of the input).

    Args:
        labels: "soft" takes the row's p_chosen, "hard" 1.
        min_margin: least |2p − 1| of a pair to keep, 0 (all) to 1 (those that the judge was certain of).
        default_label: the p_chosen of pairs that have none, such as human ones; without it they are refused where
            one is needed.

    Counts, beside rows and undecided, those that are not 0: identical, below_margin, and default_label (kept).
    Raises InputError for a row without what it needs, or if no pair remains.
    """
    pairs, counts, digest = _read_file(inputs, labels, limit, min_margin, default_label, reading)
    if not pairs:
        raise _no_pair(inputs, counts)
    return pairs, counts, digest


def _read_file(
    inputs: Sequence[str],
    labels: str,
    limit: int | None,
    min_margin: float,
    default_label: float | None,
    reading: Reading,
) -> tuple[list[Row], dict[str, int], str]:
    """`read_pairs`, where no pair need remain."""
    needs_p = labels == "soft" or min_margin > 0

    def check(row: Row, where: str, line: int) -> None:
        check_sides(row, where, line)
        if needs_p and not (default_label is not None and row.get("p_chosen") is None):
            check_label(row, where, line)

    source = Source(inputs, require=("prompt", "chosen", "rejected"), limit=limit, check=check, reading=reading)
    counts = dict.fromkeys(("undecided", "identical", "below_margin", "default_label"), 0)
    pairs = []
    for row in source:
        label = row.get("p_chosen") if needs_p else 1.0
        p = float(label if label is not None else default_label or 0.0)
        if fault := find_fault(row):
            counts[fault] += 1
        elif abs(2 * p - 1) < min_margin - 1e-9:  # 2 · 0.6 − 1 is a little less than 0.2
            counts["below_margin"] += 1
        else:
            counts["default_label"] += label is None
            texts = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            texts |= {"prefill": row["prefill"]} if prefill_of(row) else {}
            pairs.append({**texts, "p_chosen": p if labels == "soft" else 1.0})
    counts = {"rows": source.count, "undecided": counts.pop("undecided"), **{k: n for k, n in counts.items() if n}}
    return pairs, counts, source.digest


def _no_pair(inputs: Iterable[str], counts: Mapping[str, int]) -> InputError:
    is_margin = bool(counts.get("below_margin"))
    return InputError(
        f"no decided pair that differs ({dict(counts)})",
        where=", ".join(map(str, inputs)),
        expected="rows with `chosen` and `rejected`" + (", of which the judge was sure" if is_margin else ""),
        remedy="Lower --min-margin" if is_margin else "",
    )


def read_weights(inputs: Sequence[str], mix: Sequence[str]) -> dict[str, float]:
    """{file: weight} of --input (1) and --mix FILE=WEIGHT. Raises InputError for another text or a file named twice."""
    weights: dict[str, float] = {}
    for file, value in [*((file, 1.0) for file in inputs), *map(split_weight, mix)]:
        if os.path.realpath(file) in map(os.path.realpath, weights):
            raise InputError("the same input twice", where=file, remedy="Name it once")
        weights[file] = value
    return weights


def split_weight(text: str, default: float | None = None) -> tuple[str, float]:
    """(file, weight) of FILE=WEIGHT. InputError where the weight is 0 or not a number, and for a FILE alone unless
    there is a `default`."""
    if default is not None and os.path.exists(text):
        return text, default  # a name may end in =0.5
    file, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        if default is not None:
            return text, default
        value = math.nan
    if not file or not 0 < value < math.inf:
        raise InputError(
            f"--mix {text}", expected="FILE=WEIGHT, with a weight above 0", remedy="For example --mix helpful.jsonl=0.5"
        )
    return file, value


def read_sources(weights: Mapping[str, float], options: Any) -> tuple[list[Row], dict[str, int], list[list[Any]]]:
    """Pairs of several files.

    Args:
        weights: of `read_weights`.
        options: have labels, limit (of each file), min_margin, default_label and reading.
    Returns:
        (pairs with their source and weight, counts over all files, [digest, weight] of each). InputError if no file
        has a pair that remains.
    """
    pairs: list[Row] = []
    counts: dict[str, int] = {}
    digests: list[list[Any]] = []
    for file, weight in weights.items():
        from_file, counted, digest = _read_file(
            [file], options.labels, options.limit, options.min_margin, options.default_label, options.reading
        )
        pairs += [{**pair, "source": file, "weight": weight} for pair in from_file]
        counts = {name: counts.get(name, 0) + counted.get(name, 0) for name in {**counts, **counted}}
        digests.append([digest, weight])
    if not pairs:
        raise _no_pair(weights, counts)
    return pairs, counts, digests


def is_held_out(prompt: str | Sequence[Row], share: float, seed: int) -> bool:
    """Whether a prompt's pairs are held out: by hashing, so that the pairs of a prompt stay together."""
    return hashed_seed("holdout", seed, prompt_text(prompt)) < share * 2**63


def split_holdout(pairs: Sequence[Row], share: float, seed: int) -> dict[str, list[Row]]:
    """{train, held_out: pairs}. Raises InputError if all are held out."""
    parts: dict[str, list[Row]] = {"train": [], "held_out": []}
    for pair in pairs:
        parts["held_out" if is_held_out(pair["prompt"], share, seed) else "train"].append(pair)
    if not parts["train"]:
        raise InputError(f"all {len(pairs)} pairs are held out", where="--holdout", remedy="Lower it")
    return parts


def prompt_and_sides(pairs: Sequence[Row]) -> list[tuple[list[Row], list[str]]]:
    """(the prompt's messages, [chosen, rejected]) of each pair: rows of `estimate.lengths_of`."""
    return [(as_messages(pair["prompt"]), [pair["chosen"], pair["rejected"]]) for pair in pairs]


def prompt_and_continuations(pairs: Sequence[Row]) -> list[tuple[list[Row], list[str]]]:
    """`prompt_and_sides` with a prefill as the end of the prompt: what a policy wrote, and is trained on."""
    sides = ("chosen", "rejected")
    return [(conversation_of(pair), [continuation_of(pair, pair[side]) for side in sides]) for pair in pairs]


# --- comparisons to judge -----------------------------------------------------------------------------------


def prompt_key(row: Mapping[str, Any]) -> str:
    """What the responses to one prompt share: `prompt_id`, or the hash of the prompt itself."""
    if row.get("prompt_id") is not None:
        return str(row["prompt_id"])
    return sha256_text(json.dumps(prompt_identity(row), sort_keys=True))


def prompt_identity(row: Mapping[str, Any]) -> Any:
    """What two responses to one prompt have in common: the prompt, and the prefill where there is one."""
    return [row["prompt"], prefill_of(row)] if prefill_of(row) else row["prompt"]


class GivenPairs:
    """Comparisons that are rows already: `response_a` and `response_b`, or TRL's `chosen` and `rejected`.

    A chosen response is the better one by the author of the row (`gold`); on which side it is shown is drawn by
    hashing, so that the gold label is not always the same.

    Attributes: ids, digest, unpaired (0), as those of `Pairs`.
    Raises InputError with file and line for a row with a side missing, or a gold label that is neither a nor b.
    """

    def __init__(
        self, inputs: Sequence[str], limit: int | None, reading: Reading = AS_THEY_ARE, shard: Shard | None = None
    ):
        self.trl = "response_a" not in first_row(inputs, reading)
        sides = ("chosen", "rejected") if self.trl else ("response_a", "response_b")
        self._source = Source(
            inputs, require=("prompt", *sides), limit=limit, check=check_pair, reading=reading, shard=shard
        )
        self.ids, self.digest, self.unpaired = self._source.ids, self._source.digest, 0

    def __iter__(self) -> Iterator[Row]:
        return map(with_sides, self._source) if self.trl else iter(self._source)


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair already. A row with a response of its own is not, whatever it carries along."""
    return row.get("response") is None and ("response_a" in row or "chosen" in row)


def with_sides(row: Mapping[str, Any]) -> Row:
    """TRL's row as a comparison."""
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    if hashed_seed("side", row["id"]) % 2:
        return {**rest, "response_a": row["rejected"], "response_b": row["chosen"], "gold": "b"}
    return {**rest, "response_a": row["chosen"], "response_b": row["rejected"], "gold": "a"}


def is_tie(comparison: Mapping[str, Any]) -> bool:
    """Whether both responses are the same except for outer whitespace: there is nothing to judge."""
    return bool(comparison["response_a"].strip() == comparison["response_b"].strip())


def check_pair(row: Row, where: object, line: int) -> None:
    """Raise InputError for a row of one response, TRL's row without a side, or a `gold` other than "a", "b" or none."""
    if row.get("response") is not None:
        raise InputError(
            "a row with a response of its own, among rows that are pairs",
            where=where,
            line=line,
            expected="pairs, or rows of one response each",
            remedy="Judge them in two runs, or delete the column that does not count",
        )
    if "response_a" not in row and (missing := [k for k in ("chosen", "rejected") if row.get(k) is None]):
        raise InputError(
            f"{missing[0]!r} is null", where=where, line=line, expected="two responses", remedy="Fix or delete this row"
        )
    if row.get("gold") not in (None, "a", "b"):
        raise InputError(
            f"gold is {shorten(row['gold'])!r}",
            where=where,
            line=line,
            expected='"a" or "b"',
            remedy="Fix it, or leave gold out where nobody knows",
        )


def group_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> dict[tuple[str | None, str | None], list[float | None]]:
    """{(judge, principle): [p_a with a first, p_a with b first]}; None for what a verdict does not name."""
    groups: dict[tuple[str | None, str | None], list[float | None]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.get("judge"), verdict.get("principle")), []).append(verdict["p_a"])
    return groups


def same_position(p_ab: float, p_ba: float) -> bool:
    """Whether both orders prefer the response in the same position, which says nothing about the responses.

    Args: the probability that response_a is better, in each order.
    """
    return (p_ab - 0.5) * (p_ba - 0.5) < 0
