"""Pairs of responses to the same prompt, chosen from rows of one response each.

pairs = Pairs(source, None, 5, seed=0)
for comparison in pairs: ...
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations, product

from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed, sha256_text
from cai.data.preferences import prompt_key
from cai.data.rounds import text_of_round
from cai.data.sources import Source

# Of two rows that are compared, these stay behind: they speak of one response.
_OF_ONE_RESPONSE = ("id", "response", "rounds", "sample", "finish")


def choose_pairs(ours: Sequence, theirs: Sequence | None, most: int | None, *draw) -> list[tuple]:
    """Pairs of responses to one prompt: all within `ours`, or each of `ours` with each of `theirs`.

    Args:
        most: keep so many, picked by hashing the pair with `draw` (seed and the like), so that neither the
            order of the rows nor a resume changes which.
    """
    pairs = list(combinations(ours, 2)) if theirs is None else list(product(ours, theirs))
    if most is None or len(pairs) <= most:
        return pairs
    kept = set(sorted(pairs, key=lambda pair: hashed_seed("pair", *draw, *pair))[:most])
    return [pair for pair in pairs if pair in kept]


class Pairs:
    """Comparisons of the responses to the same prompt, from rows of one response; iterable again and again.

    Holds ids, and of the rows those only whose partner has not come yet.

    Args:
        source: rows with `prompt` and `response`; a revised row counts with its last revision.
        against: rows to compare them with; without it they are compared among themselves.
        most: pairs for one prompt at most.
    Attributes:
        ids: of the comparisons, `<row id> vs <row id>`, in the order of the prompts.
        unpaired: how many rows have no other response to their prompt to be compared with.
    Raises InputError if two rows of one prompt_id have different prompts, or nothing can be paired.
    """

    def __init__(self, source: Source, against: Source | None, most: int | None, seed: int):
        self.sources = [source] if against is None else [source, against]
        rows: dict[str, list[list[str]]] = {}
        prompts: dict[str, str] = {}
        for side, one in enumerate(self.sources):
            for row in one:
                key = prompt_key(row)
                prompt = sha256_text(json.dumps(row["prompt"], sort_keys=True))
                if prompts.setdefault(key, prompt) != prompt:
                    raise InputError(
                        f"row {shorten(row['id'])!r} has another prompt than those before it with prompt_id "
                        f"{shorten(key)!r}",
                        where=", ".join(one.inputs),
                        expected="one prompt a prompt_id",
                        remedy="Mend the prompt_id, or remove it: rows are then joined by their prompt",
                    )
                rows.setdefault(key, [[] for _ in self.sources])[side].append(row["id"])
        self.plan, self.unpaired = {}, 0
        for key, sides in rows.items():
            ours, *theirs = map(sorted, sides)  # so that the order of the rows decides nothing
            pairs = choose_pairs(ours, theirs[0] if theirs else None, most, seed, key)
            if pairs:
                self.plan[key] = pairs
            else:
                self.unpaired += sum(map(len, sides))
        self.ids = [_pair_id(*pair) for pairs in self.plan.values() for pair in pairs]
        if not self.ids:
            raise InputError(
                "no two responses to the same prompt",
                where=", ".join(name for one in self.sources for name in one.inputs),
                remedy="Sample more with generate.py --samples 2, or name a second file of responses",
            )

    def __iter__(self) -> Iterator[dict]:
        last = len(self.sources) - 1
        waiting: dict[str, dict] = {}
        for side, source in enumerate(self.sources):
            for row in source:
                key, place = prompt_key(row), (side, row["id"])
                pairs = self.plan.get(key, ())
                wanted = {(0, a) for a, _ in pairs} | {(last, b) for _, b in pairs}
                if place not in wanted:
                    continue
                seen = waiting.setdefault(key, {})
                seen[place] = row
                if len(seen) == len(wanted):
                    yield from (_compared(seen[0, a], seen[last, b]) for a, b in pairs)
                    del waiting[key]


def _pair_id(a: str, b: str) -> str:
    return f"{a} vs {b}"


def _compared(a: dict, b: dict) -> dict:
    """One comparison of two rows, with what both say alike, and who wrote which where that differs."""
    shared = {k: v for k, v in a.items() if k not in _OF_ONE_RESPONSE and k in b and b[k] == v}
    authors = (
        {}
        if "model" in shared
        else {f"model_{side}": row["model"] for side, row in (("a", a), ("b", b)) if "model" in row}
    )
    return {
        "id": _pair_id(a["id"], b["id"]),
        **shared,
        **authors,
        "response_a": text_of_round(a),
        "response_b": text_of_round(b),
    }
