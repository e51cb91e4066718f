"""Principles behind preferences: candidates from pairs of responses, and how many held-out pairs each predicts.

    task = Inference(options)
    rows, counts, constitution = task.write(claim)      # asks, clusters, judges, ranks; see `constitution.py infer`

The inverse of judging (inverse constitutional AI, arXiv 2406.06560). A candidate counts for as much as its lower bound
is above the best of five predictors that read no principle: the longer response, the shorter, always A, always B, and
the judge under a placebo. Leaves out causes: a principle that predicts the choices need not be why they were made.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from cai.authoring import asking
from cai.base import hashing
from cai.base.errors import InputError
from cai.constitution import lint, polarity, templates
from cai.constitution.files import Constitution, Principle, load_constitution, move_sources, phrase
from cai.data import outputs, preferences, sources
from cai.evaluate import measurement
from cai.models import choice, loading
from cai.models.engine import Engine, Message, Request
from cai.stats import intervals, tables, texts

# A question that no response answers. What the judge still prefers under it, it prefers without any principle: help,
# length, a position. A question about letters or words would not do, because it is answered by the longer response.
PLACEBO = Principle("placebo", "", "", "Which response was written on a Tuesday?")

LEAST_COSINE = 0.5  # mean cosine of the words of two clusters from which they are one

MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Candidate:
    """A principle to be scored; `sentences` are those of its cluster, itself first, and none if it is from a file."""

    principle: Principle
    sentences: tuple[str, ...] = ()


class Inference:
    """The pairs and what is asked about them. Made without loading a model."""

    def __init__(self, options: SimpleNamespace):
        if not options.propose and not options.candidates:
            raise InputError("no candidates", where="--propose 0", expected="--candidates FILE, or --propose 1 or more")
        self.writer, self.writer_endpoints = loading.split_endpoint(options.model, options.endpoints)
        self.judge, self.judge_endpoints = loading.split_endpoint(options.judge or options.model, options.endpoints)
        for model in (self.writer, self.judge):
            loading.check_model(model)
        self.options = options
        self.given = load_constitution(options.candidates) if options.candidates else None
        self.pairs, self.counts, digest = read_preferences(options)
        # Nothing is learned from pairs if nothing is proposed: all of them can be predicted.
        share = options.heldout_share if options.propose else 1
        self.train, self.heldout = split(self.pairs, share, options.seed)
        if not self.heldout or (options.propose and not self.train):
            problem = f"{len(self.train)} pairs to propose from and {len(self.heldout)} held out"
            raise InputError(problem, where=", ".join(options.inputs), expected="some of both, of different prompts")
        self.train.sort(key=lambda pair: hashing.hashed_seed("infer", options.seed, pair["id"]))
        self.asked = self.train[: options.propose]
        self.proposing = {
            "model": self.writer,
            "weights": hashing.identity(self.writer),
            "input": digest,
            "limit": options.limit,
            "template": templates.load_template("infer").sha256,
            **asdict(options.sampling),
            "propose": options.propose,
            "tries": options.tries,
            "heldout_share": share,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        names = ("preference", "preference_answer")
        self.settings = {
            **self.proposing,
            "judge": hashing.identity(self.judge),
            "candidates": self.given and self.given.sha256,
            "clusters": options.clusters,
            "templates": [templates.load_template(name).sha256 for name in names],
        }

    def plan(self) -> dict:
        """What `--dry-run` reports."""
        most = (len(self.given.principles) if self.given else 0) + (self.options.clusters if self.asked else 0)
        calls = len(self.asked) + 2 * (most + 1) * len(self.heldout)
        return {"train": len(self.train), "heldout": len(self.heldout), "model_calls_at_most": calls, **self.counts}

    def write(self, claim: Callable[[str, dict], outputs.Output]) -> tuple[list[dict], dict, Constitution]:
        """(rows of the baselines and of the candidates, the best candidate first; counts; the best candidates).

        Args:
            claim: the output of an ending and the settings that decide it.
        """
        candidates = [Candidate(principle) for principle in self._read_candidates()]
        counts = {"train": len(self.train), "heldout": len(self.heldout), **self.counts}
        if self.asked:
            proposed = self._propose(claim("proposals", self.proposing))
            sentences = [row["sentence"] for row in proposed if row["sentence"]]
            clusters = group_sentences(sentences)
            counts |= {"proposals": len(proposed), "refused_proposals": len(proposed) - len(sentences)}
            counts |= {"clusters": len(clusters), "clusters_left_out": max(0, len(clusters) - self.options.clusters)}
            known = {candidate.principle.id for candidate in candidates}
            candidates += name_candidates(clusters[: self.options.clusters], known)
        principles = [*(candidate.principle for candidate in candidates), PLACEBO]
        judged = self._judge(
            claim("judged", {**self.settings, "principles": list(map(describe, principles))}), principles
        )
        counts["failed"] = sum(row["p"] is None for row in judged)
        rows = rank(self.heldout, {row["id"]: row["p"] for row in judged if row["p"]}, candidates)
        counts["beat_baselines"] = sum(row.get("beats_baselines", False) for row in rows)
        return rows, counts, compose(rows, candidates, self.options.best)

    def _read_candidates(self) -> Sequence[Principle]:
        """The principles of `--candidates`, the paths of their sources relative to the working folder."""
        given = self.given
        return move_sources(given.principles, Path(given.path).parent, ".") if given else ()

    def _propose(self, journal: outputs.Output) -> list[dict]:
        """Rows {id, sentence, problems}: what the model gives as the principle behind each pair; None if unusable."""
        options, pairs = self.options, {pair["id"]: pair for pair in self.asked}
        template = templates.load_template("infer")

        def render(id_: str, problem: str) -> list[Message]:
            pair = pairs[id_]
            values = {name: pair[name] for name in ("prompt", "response_a", "response_b")}
            return template.render(**values, better=pair["gold"].upper(), problem=problem)

        def produce(engine: Engine) -> Iterator[dict]:
            waiting = [id_ for id_ in pairs if id_ not in journal.done]
            seed = ("infer", options.seed)
            answers = asking.ask(
                engine, waiting, render, read_sentence, options.sampling, seed=seed, tries=options.tries
            )
            for answer in answers:
                yield {"id": answer.key, "sentence": answer.value, "problems": answer.problems}

        load = partial(loading.load_engine, self.writer, endpoints=self.writer_endpoints, **options.loading)
        return measurement.fill(journal, list(pairs), "propose", load, produce)

    def _judge(self, journal: outputs.Output, principles: Sequence[Principle]) -> list[dict]:
        """Rows {id, p: {principle: probability that response_a is better}}; p is None if a question had no answer."""
        options = self.options

        def produce(engine: Engine) -> Iterator[dict]:
            remaining = (pair for pair in self.heldout if pair["id"] not in journal.done)
            while window := list(islice(remaining, 4 * options.batch_size)):
                yield from judge_pairs(engine, window, principles)

        load = partial(loading.load_engine, self.judge, endpoints=self.judge_endpoints, **options.loading)
        return measurement.fill(journal, [pair["id"] for pair in self.heldout], "judge", load, produce)


# --- pairs --------------------------------------------------------------------------------------------------


def read_preferences(options: SimpleNamespace) -> tuple[list[dict], dict, str]:
    """(decided pairs {id, prompt, response_a, response_b, gold, key}, counts of the others, digest of the input).

    key: what pairs of the same prompt share.
    """
    if not preferences.is_pair(sources.first_row(options.inputs, options.reading)):
        raise InputError(
            "rows that are not pairs",
            where=", ".join(options.inputs),
            expected="chosen and rejected, or response_a, response_b and gold",
        )
    given = preferences.GivenPairs(options.inputs, options.limit, options.reading)
    counts, pairs = Counter(undecided=0, identical=0), []
    for row in given:
        gold = find_gold(row)
        if preferences.is_tie(row):
            counts["identical"] += 1
        elif gold is None:
            counts["undecided"] += 1
        else:
            fields = {name: row[name] for name in ("id", "prompt", "response_a", "response_b")}
            pairs.append({**fields, "gold": gold, "key": preferences.prompt_key(row)})
    return pairs, dict(counts), given.digest


def find_gold(row: dict) -> str | None:
    """Which response was preferred, a or b: the `chosen` one where the row has that field, as the rows of judge.py,
    else by `gold`. None if neither decides."""
    if "chosen" in row:
        sides = {row["response_a"]: "a", row["response_b"]: "b"}
        return sides.get(row["chosen"])
    return row.get("gold")


def split(pairs: Iterable[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, held-out): all pairs of a prompt on one side, drawn by hashing."""
    sides: tuple[list[dict], list[dict]] = ([], [])
    for pair in pairs:
        point = (hashing.hashed_seed("heldout", seed, pair["key"]) >> 10) / 2**53
        sides[point < share].append(pair)
    return sides


# --- candidates ---------------------------------------------------------------------------------------------


def read_sentence(_: object, answer: str) -> str:
    """The sentence of an answer `Principle: …`. Raises `Refused` for any other form, and for unclear polarity."""
    label, colon, sentence = answer.strip().partition(":")
    sentence = sentence.strip(" *_")
    if label.strip(" *_").lower() != "principle" or not colon or not sentence or "\n" in sentence:
        raise asking.Refused('it is not one line that begins with "Principle:"')
    if len(sentence) > MOST_CHARACTERS:
        raise asking.Refused(f"the sentence is longer than {MOST_CHARACTERS} characters")
    if polarity.judge_sentence(sentence).polarity == polarity.UNCLEAR:
        raise asking.Refused("it is unclear whether the sentence demands or prohibits")
    candidate = Principle("candidate", **phrase(sentence), principle=sentence)
    if fault := next(iter(lint.lint(Constitution("", "", "", (candidate,)))), None):
        raise asking.Refused(fault.message)
    return " ".join(sentence.split())


def group_sentences(sentences: Iterable[str]) -> list[list[str]]:
    """Clusters of sentences that share their words, the largest first, the most central sentence in front.

    A demand and a prohibition are never in one cluster: with the same words they are opposites.
    """
    groups = []
    for kind in (polarity.DEMAND, polarity.PROHIBITION):
        same = [sentence for sentence in sentences if polarity.judge_sentence(sentence).polarity == kind]
        bags = [lint.content_words(texts.words(sentence)) for sentence in same]
        groups += [[same[number] for number in group] for group in texts.cluster(bags, LEAST_COSINE)]
    return sorted(groups, key=len, reverse=True)


def name_candidates(clusters: Iterable[Sequence[str]], known: Iterable[str]) -> list[Candidate]:
    """The most central sentence of each cluster as a candidate, with an id that is not in `known`."""
    free = (name for number in range(1, 10**6) if (name := f"proposed-{number}") not in set(known))
    return [
        Candidate(Principle(name, **phrase(sentences[0]), principle=sentences[0]), tuple(sentences))
        for name, sentences in zip(free, clusters, strict=False)
    ]


def describe(principle: Principle) -> list[str]:
    """What decides a candidate's score, for a fingerprint."""
    return [principle.id, principle.preference]


# --- scores -------------------------------------------------------------------------------------------------


def judge_pairs(engine: Engine, pairs: Sequence[dict], principles: Sequence[Principle]) -> Iterator[dict]:
    """{id, p: {principle id: probability that response_a is better, the mean over both orders}} of each pair."""
    template = templates.load_template("preference" if engine.scores_choices else "preference_answer")

    def render(pair: dict, principle: Principle, order: str) -> list[Message]:
        first, second = (pair[f"response_{side}"] for side in order)
        values = {"prompt": pair["prompt"], "response_a": first, "response_b": second, "reasoning": ""}
        return template.render(principle=principle, **values)

    choices = {}
    for principle in principles:  # one by one, so that what its questions begin with is read once
        requests = (
            Request((number, principle.id, order), render(pair, principle, order))
            for order in preferences.ORDERS
            for number, pair in enumerate(pairs)
        )
        chosen = choice.choose(engine, requests, preferences.LABELS)
        choices |= {request.key: logprobs for request, logprobs in chosen}
    for number, pair in enumerate(pairs):
        p = {}
        for principle in principles:
            plain, swapped = (choices[number, principle.id, order] for order in preferences.ORDERS)
            if plain is not None and swapped is not None:
                p[principle.id] = round((choice.probabilities(plain)[0] + choice.probabilities(swapped)[1]) / 2, 6)
        yield {"id": pair["id"], "p": p if len(p) == len(principles) else None}


def credit(margin: float) -> float:
    """1 for a prediction of the preferred response, 0 for the other one, ½ for neither."""
    return 0.5 if margin == 0 else float(margin > 0)


def rank(pairs: Iterable[dict], judged: dict[str, dict[str, float]], candidates: Sequence[Candidate]) -> list[dict]:
    """Rows of the baselines, then of the candidates by their margin, the best first.

    value, low, high: the share of pairs predicted, with a 95 % interval that counts pairs of one prompt as alike.
    margin: the lower bound less the best baseline's share; above 0 the candidate `beats_baselines`.

    Args:
        judged: {pair id: {principle id: probability that response_a is better}}; pairs not in it are in no figure.
    """
    pairs = [pair for pair in pairs if pair["id"] in judged]
    keys = [pair["key"] for pair in pairs]
    signs = [1 if pair["gold"] == "a" else -1 for pair in pairs]

    def measure(margins: Iterable[float]) -> dict:
        credits = [credit(sign * margin) for sign, margin in zip(signs, margins, strict=True)]
        return intervals.clustered_rate(credits, keys)

    def by(id_: str) -> list[float]:
        return [judged[pair["id"]][id_] - 0.5 for pair in pairs]

    longer = [len(pair["response_a"]) - len(pair["response_b"]) for pair in pairs]
    predictors = {
        "longer": longer,
        "shorter": [-difference for difference in longer],
        "always_a": [1] * len(pairs),
        "always_b": [-1] * len(pairs),
        PLACEBO.id: by(PLACEBO.id),
    }
    rows = [{"id": f"baseline {name}", **measure(margins)} for name, margins in predictors.items()]
    best = max(row["value"] for row in rows) if pairs else None
    scored = []
    for candidate in candidates:
        figure = measure(by(candidate.principle.id))
        margin = None if best is None else figure["low"] - best
        scored.append(
            {
                "id": candidate.principle.id,
                "preference": candidate.principle.preference,
                **figure,
                "margin": margin,
                "beats_baselines": margin is not None and margin > 0,
                "proposed": len(candidate.sentences),
                "sentences": candidate.sentences,
            }
        )
    return rows + (sorted(scored, key=lambda row: (-row["margin"], -row["value"])) if pairs else scored)


def compose(rows: Iterable[dict], candidates: Iterable[Candidate], best: int) -> Constitution:
    """The first `best` candidates that beat the baselines, as a constitution."""
    principles = {candidate.principle.id: candidate.principle for candidate in candidates}
    chosen = [principles[row["id"]] for row in rows if row.get("beats_baselines")][:best]
    # Worked examples stay in the file of the candidates.
    chosen = [replace(principle, examples=()) for principle in chosen]
    return Constitution("inferred", "", "", tuple(chosen), "Principles that predict preferences.")


def as_text(rows: Iterable[dict]) -> str:
    """The rows of `rank` as a table."""
    lines = [
        (row["id"], tables.show(row), row["n"], "yes" if row.get("beats_baselines") else "", row.get("preference", ""))
        for row in rows
    ]
    return tables.table(("", "pairs predicted (95 % interval)", "n", "beats all baselines", "question"), lines)
