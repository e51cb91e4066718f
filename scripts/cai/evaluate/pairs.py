"""A policy on pairs whose better response is known: which one it makes likelier, and what it writes itself.

    pairs = Pairs("holdout.jsonl", limit=None)
    for row in score(pairs, load_engine("tiny"), pairs.first_ids, ...): ...
    rates, counts = figures(rows, pairs)

Each response is scored whole, after the tokens of the prompt alone and with its end token, as dpo.py trains it. Beside
the log-probabilities stands text by the policy and by its reference, greedy first and then by the same seeds: training
moves probabilities long before it changes what a model writes. Leaves out reward models (tasks.py), whose scores are no
log-probabilities, and servers, which give none of a text that is not their own.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from cai.base.errors import CaiError, InputError
from cai.base.hashing import hashed_seed
from cai.data import dialogue, preferences, sources
from cai.data.reading import AS_THEY_ARE, Reading
from cai.evaluate.benchmarks import sum_logprobs
from cai.evaluate.rates import without_clusters
from cai.models.chat import encode
from cai.models.engine import Request, Sampling
from cai.stats import intervals, preference

SIDES = ("chosen", "rejected")

_WINDOW = 16  # batches of pairs that are sampled for and scored together


class Pairs:
    """Pairs of a file, each {id, prompt, chosen, rejected, chosen_is_a}; iterable again and again.

    Rows with `chosen` and `rejected` in any shape, or `response_a` and `response_b` with `gold`. Without response_a it
    is drawn by hashing which side is A.

    Attributes: ids, digest; first_ids: of the first pair of each prompt; counts: rows, and those left out, which are
    undecided, identical or without gold.
    Raises InputError with file and line for a row that is no pair, and if no pair remains.
    """

    def __init__(self, file: str, limit: int | None, reading: Reading = AS_THEY_ARE):
        self.has_gold = "chosen" not in sources.first_row([file], reading)
        sides, check = (
            (("response_a", "response_b"), preferences.check_pair)
            if self.has_gold
            else (SIDES, preferences.check_sides)
        )
        self._source = sources.Source([file], require=("prompt", *sides), limit=limit, check=check, reading=reading)
        self.digest, left_out = self._source.digest, dict.fromkeys(("undecided", "identical", "no_gold"), 0)
        self.ids, first_of_prompt = [], {}
        for row in self._source:
            fault = "no_gold" if self.has_gold and not row.get("gold") else preferences.find_fault(self._sides(row))
            if fault:
                left_out[fault] += 1
            else:
                self.ids.append(row["id"])
                first_of_prompt.setdefault(dialogue.prompt_text(row["prompt"]), row["id"])
        self.first_ids = set(first_of_prompt.values())
        self.counts = {"rows": self._source.count, **{name: n for name, n in left_out.items() if n}}
        if not self.ids:
            raise InputError(f"no pair with a better response ({self.counts})", where=file)

    def _sides(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not self.has_gold:
            return {name: row[name] for name in SIDES}
        better, worse = ("a", "b") if row.get("gold") == "a" else ("b", "a")
        return {"chosen": row[f"response_{better}"], "rejected": row[f"response_{worse}"]}

    def __iter__(self) -> Iterator[dict]:
        kept = set(self.ids)
        for row in self._source:
            if row["id"] in kept:
                sides = self._sides(row)
                first = row if "response_a" in row else preferences.with_sides({"id": row["id"], **sides})
                is_a = first["response_a"] == sides["chosen"]
                yield {"id": row["id"], "prompt": row["prompt"], **sides, "chosen_is_a": is_a}


def score(
    pairs: Iterable[dict],
    engine,
    sampled: Collection[str],
    samples: int,
    sampling: Sampling,
    seed: int,
    reference: Mapping[str, dict],
) -> Iterator[dict | None]:
    """The row of each pair, with the log-probabilities of both responses; None for one too long for the model.

    A row: {id, prompt, chosen, rejected, chosen_is_a, logps: {chosen, rejected}, tokens: {chosen, rejected}, texts},
    with a reference also `reference` (its logps), `reference_texts`; and what `preference.figures` counts.

    Args:
        engine: a model on this machine.
        sampled: ids of the pairs that have `texts`, `samples` each; of several pairs with one prompt the first.
        reference: rows of this function by id, of another model; {} for none. A pair that it lacks is left out.
    """
    pairs = iter(pairs)
    while window := list(islice(pairs, _WINDOW * engine.batch_size)):
        texts = _sample(engine, [pair for pair in window if pair["id"] in sampled], samples, sampling, seed)
        for pair, scores in zip(window, _score_window(engine, window), strict=True):
            before = reference.get(pair["id"])
            if scores is None or (reference and before is None):
                yield None
                continue
            row = {**pair, **scores, "texts": texts.get(pair["id"], [])}
            if before:
                row |= {"reference": before["logps"], "reference_texts": before["texts"]}
            yield row | _outcomes(as_logprobs(row))


def _sample(engine, pairs: Sequence[dict], samples: int, sampling: Sampling, seed: int) -> dict[str, list[str | None]]:
    """{pair's id: its prompt's texts, the first one greedy}, None where there is no answer."""
    texts: dict[str, list[str | None]] = {pair["id"]: [None] * samples for pair in pairs}

    def ask(numbers: range, sampling: Sampling) -> None:
        requests = [
            # By the prompt, so that the policy and the reference draw alike whatever the rows around it are.
            Request((pair["id"], n), dialogue.as_messages(pair["prompt"]), hashed_seed("pairs", seed, n, name))
            for pair in pairs
            for name in (dialogue.prompt_text(pair["prompt"]),)
            for n in numbers
        ]
        for request, generation in engine.generate(requests, sampling) if requests else ():
            pair_id, n = request.key
            texts[pair_id][n] = None if generation.lost else generation.text

    ask(range(min(1, samples)), replace(sampling, temperature=0.0))
    ask(range(1, samples), sampling)
    return texts


def _score_window(engine, window: Sequence[dict]) -> list[dict | None]:
    """{logps, tokens} of each pair, None for one that does not fit the model's context."""
    sequences, positions = [], []  # positions: where a pair's two sequences begin, None where it is too long
    for pair in window:
        messages = dialogue.as_messages(pair["prompt"])
        encoded = [encode(engine.chat, messages, pair[side]) for side in SIDES]
        fits = not engine.context or max(len(before) + len(answer) for before, answer in encoded) <= engine.context
        positions.append(len(sequences) if fits else None)
        sequences += [([*before, *answer], len(before)) for before, answer in encoded if fits]
    logps = sum_logprobs(engine, sequences) if sequences else []
    return [
        None
        if start is None
        else {
            "logps": dict(zip(SIDES, logps[start : start + 2], strict=True)),
            "tokens": {
                side: len(ids) - begin for side, (ids, begin) in zip(SIDES, sequences[start : start + 2], strict=True)
            },
        }
        for start in positions
    ]


def as_logprobs(row: Mapping[str, Any]) -> preference.PairLogprobs:
    """A row of `score` for `preference.figures`."""

    def both(values: Mapping) -> tuple:
        return values["chosen"], values["rejected"]

    return preference.PairLogprobs(
        dialogue.prompt_text(row["prompt"]),
        both(row["logps"]),
        both(row["tokens"]),
        (len(row["chosen"]), len(row["rejected"])),
        both(row["reference"]) if "reference" in row else None,
    )


def _outcomes(pair: preference.PairLogprobs) -> dict[str, bool]:
    outcomes = {"outright": pair.margin > 0, "outright_per_token": pair.margin_per_token > 0}
    return outcomes if pair.reference is None else {**outcomes, "relative": pair.relative_margin > 0}


def figures(rows: Sequence[dict], pairs: Pairs) -> tuple[dict, dict]:
    """({metric: {value, low, high, n}}, counts) of rows of `score`. CaiError if there are none.

    The notes of the counts answer three questions in words: outright, relative, and whether the text changed.
    """
    if not rows:
        raise CaiError(f"all {len(pairs.ids)} pairs are longer than the model's context")
    scored = [as_logprobs(row) for row in rows]
    rates = {name: without_clusters(figure) for name, figure in preference.figures(scored).items()}
    rates["baseline_longer"] = rates.pop("longer")
    always_a = intervals.clustered_rate([row["chosen_is_a"] for row in rows], [pair.prompt for pair in scored])
    rates["baseline_always_a"] = without_clusters(always_a)
    notes = [f"Does it give the chosen response the higher probability? {preference.answer(rates['outright'])}"]
    if "relative" in rates:
        relative = preference.answer(rates["relative"])
        notes.insert(0, f"Has the policy moved towards the chosen responses, from the reference? {relative}")
        same = [
            (text == before, dialogue.prompt_text(row["prompt"]))
            for row in rows
            for text, before in zip(row["texts"], row["reference_texts"], strict=True)
            if None not in (text, before)
        ]
        if same:
            is_same, prompts = zip(*same, strict=True)
            rates["text_same"] = without_clusters(intervals.clustered_rate(is_same, prompts))
            word = "no" if all(is_same) else "yes"
            notes.append(f"Has its text changed? {word}: {is_same.count(False)} of {len(same)} texts differ")
    counts = {"pairs": len(pairs.ids), **pairs.counts, "failed": len(pairs.ids) - len(rows)}
    return rates, {**counts, "ties": sum(pair.margin == 0 for pair in scored), "notes": notes}
