"""Verdicts that somebody else has made, read from a row of a pair in whatever form they have.

    read_verdict(row, None, "labels.jsonl", 3)     # the probability that response_a is better

The forms: judge.py's `p_a` or `verdicts`; `chosen` with or without `p_chosen`; a letter, a name of the side, or a
probability in a column. Leaves out which pair a row belongs to (steps/verdicts.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data.preferences import group_verdicts
from cai.data.readers import Row
from cai.data.reading import list_columns

_Error = Callable[..., InputError]

# Columns that are looked for where none is named.
COLUMNS = ("verdict", "label", "winner", "preference")


def has_responses(row: Mapping[str, Any]) -> bool:
    """Whether a row shows its two responses; else its id says which pair it is of."""
    return isinstance(row.get("response_a"), str) and isinstance(row.get("response_b"), str)


def sides_of(row: Row) -> tuple[str, str] | None:
    """(response_a, response_b), or TRL's (chosen, rejected); None where a row has neither."""
    if has_responses(row):
        return row["response_a"], row["response_b"]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else None


def read_verdict(row: Row, column: str | None, where: str, line: int) -> float | None:
    """The probability that response_a (of TRL's rows: `chosen`) is better; None where the row has no readable verdict.

    Args:
        column: the one to read. Without it the row's own fields are read; if they contradict each other, that is an
            error. `gold` is the truth and no verdict, except beside a `chosen` without any sign of a judge.
    Raises InputError for a value that is no verdict, for fields that contradict each other, and for a row without any.
    """

    def error(problem: str, expected: str, remedy: str = "Fix or delete this row") -> InputError:
        return InputError(problem, where=where, line=line, expected=expected, remedy=remedy)

    if column is not None:
        return _read_value(row.get(column), column, error)
    evidence = {**_read_judge(row, error), **_read_chosen(row, error)}
    is_judged = bool({"p_a", "verdicts", "p_chosen"} & set(row))
    if "chosen" in evidence and not is_judged and row.get("gold") in ("a", "b") and has_responses(row):
        evidence["gold"] = float(row["gold"] == "a")
    for name in COLUMNS:
        if name in row and not evidence:
            return _read_value(row[name], name, error)
    if not evidence:
        raise error(
            f"no verdict; the row has: {list_columns(row)}",
            f"p_a, chosen and rejected, or one of {', '.join(COLUMNS)}",
            "Name the column with --verdict-field",
        )
    _check_agreement(evidence, error)
    return next(iter(evidence.values()))


def _check_agreement(evidence: Mapping[str, float | None], error: _Error) -> None:
    for_a, for_b = (
        [name for name, p in evidence.items() if p is not None and (p - 0.5) * sign > 0] for sign in (1, -1)
    )
    if for_a and for_b:
        raise error(
            f"the fields contradict each other: for response_a {', '.join(for_a)}; for response_b {', '.join(for_b)}",
            "fields that agree",
            "Fix the row, or name the column that counts with --verdict-field",
        )


def _read_judge(row: Row, error: _Error) -> dict[str, float | None]:
    """What a judge's `p_a` and `verdicts` say, by their names."""
    evidence = {}
    if "p_a" in row:
        evidence["p_a"] = None if row["p_a"] is None else _read_probability(row["p_a"], "p_a", error)
    verdicts = row.get("verdicts")
    if verdicts:
        if not isinstance(verdicts, Sequence) or not all(isinstance(v, Mapping) and "p_a" in v for v in verdicts):
            raise error(f"verdicts is {shorten(verdicts)!r}", "a list of verdicts with p_a")
        groups = group_verdicts(verdicts)
        known = [p for group in groups.values() for p in group if p is not None]
        p = sum(_read_probability(p, "p_a of a verdict", error) for p in known) / len(known) if known else None
        if "p_a" not in row or len(groups) == 1:  # several judges or principles may be combined in any way
            evidence["verdicts"] = p
    return evidence


def _read_chosen(row: Row, error: _Error) -> dict[str, float | None]:
    """What `chosen`, `rejected` and `p_chosen` say, by their names."""
    if "chosen" not in row or "rejected" not in row:
        return {}
    chosen, rejected, p_chosen = row["chosen"], row["rejected"], row.get("p_chosen")
    p = 1.0 if p_chosen is None else _read_probability(p_chosen, "p_chosen", error)
    if chosen is None and rejected is None:
        return {"chosen": None if p_chosen is None else 0.5}
    if p < 0.5:
        raise error(f"p_chosen is {p_chosen}: the other response would be better", "a probability from 0.5 to 1")
    if not has_responses(row):
        return {"chosen": p}
    pair = [text.strip() if isinstance(text, str) else text for text in (chosen, rejected)]
    sides = [row["response_a"].strip(), row["response_b"].strip()]
    if pair == sides:
        return {"chosen": p}
    if pair == sides[::-1]:
        return {"chosen": 1 - p}
    raise error("chosen and rejected are not response_a and response_b", "the same two texts")


def _read_probability(value: Any, name: str, error: _Error) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise error(f"{name} is {shorten(repr(value))}", "a probability from 0 to 1")
    return float(value)


def _read_value(value: Any, name: str, error: _Error) -> float | None:
    """A cell as the probability that response_a is better; None for an empty one."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return _read_probability(value, name, error)
    word = value.strip().lower().removeprefix("response_").removeprefix("model_").strip("()[]. ")
    if word.startswith("tie"):  # such as "tie (bothbad)"
        return 0.5
    if word in ("a", "b"):
        return float(word == "a")
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise error(
            f"{name} is {shorten(value)!r}", "A, B, tie, or the probability that response_a is better, from 0 to 1"
        )
    return number
