"""Comparisons for the judge: pairs of responses to the same prompt, or rows that are pairs already.

comparisons, digests = read_comparisons(["samples.jsonl"], None, 5, seed=0, limit=None)
for comparison in comparisons: ...
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from functools import partial
from itertools import combinations, product

from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed, sha256_text
from cai.data import preferences, rounds, sources
from cai.data.preferences import OF_A_PAIR, GivenPairs, is_pair
from cai.data.reading import AS_THEY_ARE, Reading
from cai.data.selection import flags_of_texts
from cai.data.shards import Shard
from cai.data.sources import Source, first_row

# Fields that describe one response, or a pair that rows have carried along: a comparison of two rows leaves them out.
_OF_ONE_RESPONSE = ("id", "response", "rounds", "sample", "finish", *OF_A_PAIR)


def read_comparisons(
    inputs: Sequence[str],
    against: str | None,
    most: int | None,
    seed: int,
    limit: int | None,
    reading: Reading = AS_THEY_ARE,
    shard: Shard | None = None,
    *,
    unflagged: bool = False,
) -> tuple["Pairs | GivenPairs", dict[str, str | None]]:
    """(comparisons, digests of the input files) from rows of pairs, or from rows of one response each.

    Args:
        against, most, unflagged: for rows of one response, as `Pairs` takes them.
        shard: the comparisons of this shard alone.
    Raises InputError if the rows are neither, or of both kinds.
    """
    if is_pair(first_row(inputs, reading)):
        if against or most:
            raise InputError(
                "--against or --pairs-per-prompt with rows that are pairs already",
                where=", ".join(inputs),
                remedy="Leave it out",
            )
        pairs = GivenPairs(inputs, limit, reading, shard)
        return pairs, {"input": pairs.digest}
    responses = partial(Source, require=("prompt", "response"), check=rounds.check_rounds, reading=reading)
    source, others = responses(inputs, limit=limit), responses([against]) if against else None
    digests = {"input": source.digest, "against": others and others.digest}
    return Pairs(source, others, most, seed, shard, unflagged=unflagged), digests


def choose_pairs(
    ours: Sequence, theirs: Sequence | None, most: int | None, *draw, own: Set = frozenset()
) -> list[tuple]:
    """Pairs of responses to one prompt: all within `ours`, or each of `ours` with each of `theirs`.

    Args:
        own: those of `ours` that are paired with the same one of `theirs` alone.
        most: keep so many, picked by hashing the pair with `draw` (seed and the like), so that neither the
            order of the rows nor a resume changes which.
    """
    crossed = combinations(ours, 2) if theirs is None else product(ours, theirs)
    pairs = [(a, b) for a, b in crossed if a == b or a not in own]
    if most is None or len(pairs) <= most:
        return pairs
    kept = set(sorted(pairs, key=lambda pair: hashed_seed("pair", *draw, *pair))[:most])
    return [pair for pair in pairs if pair in kept]


class Pairs:
    """Comparisons of the responses to the same prompt, from rows of one response; iterable again and again.

    A revised row that is in `against` too, by its id and first response, is compared with that row alone: with the
    response that it revises, and not with others to the same prompt. Holds the ids of all rows, and only those rows
    whose partner has not come yet.

    Args:
        source: rows with `prompt` and `response`; a revised row counts with its last revision.
        against: rows to compare them with; without it they are compared among themselves.
        most: pairs per prompt at most.
        shard: only the comparisons whose ids belong to it, which may be none.
        unflagged: leave out revised rows of `source` whose text has flags, other than that of a copy.
    Attributes:
        ids: of the comparisons, `<row id> vs <row id>`, in the order of the prompts.
        unpaired: number of rows without another response to their prompt.
        flagged: number of rows that `unflagged` leaves out.
    Raises InputError if two rows of one prompt_id have different prompts, or nothing can be paired.
    """

    def __init__(
        self,
        source: sources.Source,
        against: sources.Source | None,
        most: int | None,
        seed: int,
        shard: Shard | None = None,
        *,
        unflagged: bool = False,
    ):
        self.sources = [source] if against is None else [source, against]
        self.plan: dict[str, list[tuple]] = {}
        self.unpaired = self.flagged = 0
        self._unflagged = unflagged
        groups, own = self._group_ids()
        for key, sides in groups.items():
            ours, *theirs = map(sorted, sides)  # the order of the rows decides nothing
            if pairs := choose_pairs(ours, theirs[0] if theirs else None, most, seed, key, own=own):
                self.plan[key] = pairs
            else:
                self.unpaired += sum(map(len, sides))
        has_pairs = bool(self.plan)
        if shard:
            kept = {key: [(a, b) for a, b in pairs if shard.has(f"{a} vs {b}")] for key, pairs in self.plan.items()}
            self.plan = {key: pairs for key, pairs in kept.items() if pairs}
        self.ids = [f"{a} vs {b}" for pairs in self.plan.values() for a, b in pairs]
        if not has_pairs:
            raise InputError(
                "no two responses to the same prompt"
                + (f"; {self.flagged} rows with a flagged revision are left out" if self.flagged else ""),
                where=", ".join(name for source in self.sources for name in source.inputs),
                remedy="Sample more with generate.py --samples 2, or name other responses to the prompts by --against: "
                "for revisions, the file that was revised",
            )

    def _group_ids(self) -> tuple[dict[str, list[list[str]]], set[str]]:
        """({prompt key: row ids of each source}, ids of revised rows whose own response is in `against`)."""
        ids: dict[str, list[list[str]]] = defaultdict(lambda: [[] for _ in self.sources])
        prompts: dict[str, str] = {}
        revised, responses = set(), set()
        for side, source in enumerate(self.sources):
            for row in source:
                key = preferences.prompt_key(row)
                prompt = sha256_text(json.dumps(preferences.prompt_identity(row), sort_keys=True))
                if prompts.setdefault(key, prompt) != prompt:
                    raise InputError(
                        f"row {shorten(row['id'])!r} has another prompt than earlier rows with prompt_id "
                        f"{shorten(key)!r}",
                        where=", ".join(source.inputs),
                        expected="one prompt per prompt_id",
                        remedy="Fix the prompt_id, or remove it: rows are then joined by their prompt. Leave out the "
                        "responses of evaluate.py in frames: grep -v '\"frame\":'",
                    )
                identity = row["id"], key, sha256_text(row["response"])
                if side:
                    responses.add(identity)
                elif row.get("rounds"):
                    if self._unflagged and flags_of_texts(row["rounds"])[-1] - {rounds.UNCHANGED}:
                        self.flagged += 1
                        continue
                    revised.add(identity)
                ids[key][side].append(row["id"])
        return ids, {row_id for row_id, *_ in revised & responses}

    def __iter__(self) -> Iterator[dict]:
        last = len(self.sources) - 1
        waiting: dict[str, dict] = defaultdict(dict)
        for side, source in enumerate(self.sources):
            for row in source:
                key = preferences.prompt_key(row)
                pairs = self.plan.get(key, ())
                wanted = {(0, a) for a, _ in pairs} | {(last, b) for _, b in pairs}
                if (side, row["id"]) not in wanted:
                    continue
                rows = waiting[key]
                rows[side, row["id"]] = row
                if len(rows) == len(wanted):
                    yield from (_compare(rows[0, a], rows[last, b]) for a, b in pairs)
                    del waiting[key]


def _compare(a: dict, b: dict) -> dict:
    """One comparison of two rows: the fields that are the same in both, and where they differ each side's model and the
    constitution that stood in its context."""
    shared = {
        name: value for name, value in a.items() if name not in _OF_ONE_RESPONSE and name in b and b[name] == value
    }
    differing = {
        f"{name}_{side}": row[name]
        for name in ("model", "in_context")
        for side, row in (("a", a), ("b", b))
        if name in row and name not in shared
    }
    return {
        "id": f"{a['id']} vs {b['id']}",
        **shared,
        **differing,
        "response_a": rounds.text_of_round(a),
        "response_b": rounds.text_of_round(b),
    }
