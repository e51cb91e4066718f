"""Preference rows as judge.py writes them, read for training: who was chosen, and how surely.

    pairs, counts, digest = read_pairs(["preferences.jsonl"], "soft", limit=None)

Leaves out pairs that the judge could not decide (counted), and what a trainer makes of a pair.
"""

from cai.errors import InputError, shorten
from cai.records import Source


def check_label(row: dict, where, line: int) -> None:
    """InputError if a decided pair has no probability to train to."""
    p = row.get("p_chosen")
    if row["chosen"] is None or row["rejected"] is None:
        return
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise InputError(
            f"p_chosen is {shorten(p)!r}", where=where, line=line, expected="a probability from 0 to 1",
            remedy="Make the rows with judge.py, or train on --labels hard",
        )


def read_pairs(inputs, labels: str, limit: int | None) -> tuple[list[dict], dict, str]:
    """(decided pairs of {prompt, chosen, rejected, p_chosen}, counts, digest of the input).

    labels: "soft" takes the row's p_chosen, "hard" 1. Raises InputError for a row without what it needs, or
    if no pair is decided.
    """
    source = Source(inputs, require=("prompt", "chosen", "rejected"), limit=limit,
                    check=check_label if labels == "soft" else None)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"],
         "p_chosen": float(row["p_chosen"]) if labels == "soft" else 1.0}
        for row in source
        if row["chosen"] is not None and row["rejected"] is not None
    ]
    if not pairs:
        raise InputError("no decided pair", where=", ".join(inputs), expected="rows with `chosen`")
    return pairs, {"rows": source.count, "undecided": source.count - len(pairs)}, source.digest
