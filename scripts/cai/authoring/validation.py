"""Whether a constitution does anything: its faults, the prompts that it covers, and what it changes beyond a placebo.

    report = Validation(options).write(claim)      # see `constitution.py validate`

Each principle is tried on a few prompts: the same response is criticised and revised once under the principle and once
under a placebo, whose requests have the same length and are about something that no response is about. A judge compares
the two revisions under the principle. Leaves out worked examples, which a placebo has none of, and training.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, cycle, groupby, islice
from types import SimpleNamespace

from cai.authoring.inference import credit, judge_pairs
from cai.base import hashing
from cai.constitution import rendering, templates
from cai.constitution.files import REQUESTS, Principle, load_constitution
from cai.data import dialogue, outputs
from cai.evaluate import measurement
from cai.evaluate.coverage import Coverage
from cai.models import loading
from cai.models.engine import Engine, Message, Request
from cai.stats import intervals, tables

# How each request of a placebo begins. It goes on with further things that responses are not about, until it is as long
# as the principle's request: what the model changes under a placebo, it changes without any principle.
PLACEBO = {
    "critique": "Say where the response is about lavender",
    "revision": "Rewrite the response so that it is not about lavender",
    "preference": "Which response is less about lavender",
}
FURTHER = ("or a goose", "or lavender")

PAIRS_COMPARED = 24  # pairs of revisions that are judged under every principle, to see which principles pull apart

NOT_TOLD = "no principle can be distinguished from the placebo"

Claim = Callable[[str, dict], outputs.Output]


class Validation:
    """A constitution and what is asked about it. Made without loading a model."""

    def __init__(self, options: SimpleNamespace):
        self.options, self.constitution = options, load_constitution(options.constitution)
        self.writer, self.writer_endpoints = loading.split_endpoint(options.model, options.endpoints)
        self.judge, self.judge_endpoints = loading.split_endpoint(options.judge or options.model, options.endpoints)
        loading.check_model(self.writer)
        judging = SimpleNamespace(**{**vars(options), "model": self.judge, "endpoints": self.judge_endpoints})
        self.coverage = Coverage(judging)
        self.placebos = {principle.id: make_placebo(principle) for principle in self.constitution.principles}
        self.trials = self._assign()
        names = ("critique", "revise")
        self.revising = {
            "model": self.writer,
            "weights": hashing.identity(self.writer),
            "input": self.coverage.source.digest,
            "limit": options.limit,
            "constitution": self.constitution.sha256,
            "placebo": hashing.sha256_text(repr((PLACEBO, FURTHER))),
            "templates": [templates.load_template(name).sha256 for name in names],
            **asdict(options.sampling),
            "count": options.count,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        names = ("preference", "preference_answer")
        self.judging = {
            **self.revising,
            "judge": hashing.identity(self.judge),
            "judge_templates": [templates.load_template(name).sha256 for name in names],
        }

    def _assign(self) -> list[dict]:
        """{id, prompt, principle}: for each principle `count` prompts, drawn by hashing."""
        prompts = {row["id"]: row["prompt"] for row in self.coverage.source}
        seed = self.options.seed

        def draw(principle: Principle) -> list[str]:
            return sorted(prompts, key=lambda id_: hashing.hashed_seed("validate", seed, principle.id, id_))

        return [
            {"id": f"{id_} under {principle.id}", "prompt": prompts[id_], "principle": principle.id}
            for principle in self.constitution.principles
            for id_ in draw(principle)[: self.options.count]
        ]

    def plan(self) -> dict:
        """What `--dry-run` reports."""
        trials, principles = len(self.trials), len(self.constitution.principles)
        compared = min(trials, PAIRS_COMPARED)
        return {
            "prompts": self.coverage.source.count,
            "trials": trials,
            "model_calls": 5 * trials,
            "judge_calls_at_most": self.coverage.count_questions() + 2 * (trials + compared * (principles - 1)),
        }

    def write(self, claim: Claim, judgements: outputs.Output) -> dict:
        """The report; every stage is a file beside it, and is resumed there.

        Args:
            claim: the output of an ending and the settings that decide it.
            judgements: the output of the last stage, with `self.judging`.
        """
        lint = rendering.check_all([self.options.constitution])
        covered = claim("coverage", self.coverage.settings_of_rows)
        self.coverage.write(covered, claim("nonsense", self.coverage.settings))
        trials = self._revise(claim("trials", self.revising))
        judged = self._judge(judgements, trials)
        ids = [principle.id for principle in self.constitution.principles]
        return {
            "constitution": self.constitution.path,
            "lint": lint,
            "coverage": covered.counts,
            **compare_with_placebo(trials, judged, ids),
            "pull_apart": find_opposed(judged, ids),
        }

    def _revise(self, journal: outputs.Output) -> list[dict]:
        """Rows {id, prompt, principle, response, revisions: {principle, placebo}}; a revision that the model could not
        write is None."""
        options = self.options

        def produce(engine: Engine) -> Iterator[dict]:
            remaining = (trial for trial in self.trials if trial["id"] not in journal.done)
            while window := list(islice(remaining, 8 * options.batch_size)):
                yield from self._revise_window(engine, window)

        load = partial(loading.load_engine, self.writer, endpoints=self.writer_endpoints, **options.loading)
        return measurement.fill(journal, [trial["id"] for trial in self.trials], "revise", load, produce)

    def _revise_window(self, engine: Engine, trials: Sequence[dict]) -> Iterator[dict]:
        def answer(command: str, conversations: Mapping[Hashable, Sequence[Message]]) -> dict[Hashable, str]:
            requests = (
                # Both revisions of a trial have the seed of the trial: they differ by what is asked.
                Request(key, conversation, hashing.hashed_seed("validate", command, self.options.seed, key[0]))
                for key, conversation in conversations.items()
            )
            generated = engine.generate(requests, self.options.sampling)
            return {request.key: generation.text for request, generation in generated if not generation.lost}

        critique, revise = (templates.load_template(name) for name in ("critique", "revise"))
        prompt = {trial["id"]: trial["prompt"] for trial in trials}
        sides = {
            (trial["id"], side): principle
            for trial in trials
            for side, principle in (
                ("principle", self.constitution[trial["principle"]]),
                ("placebo", self.placebos[trial["principle"]]),
            )
        }
        responses = answer("respond", {(id_, ""): dialogue.as_messages(text) for id_, text in prompt.items()})
        responses = {id_: text for (id_, _), text in responses.items()}
        values = {
            (id_, side): {"principle": principle, "prompt": prompt[id_], "response": responses[id_]}
            for (id_, side), principle in sides.items()
            if id_ in responses
        }
        critiques = answer("critique", {key: critique.render(**fields) for key, fields in values.items()})
        questions = {key: revise.render(**values[key], critique=text) for key, text in critiques.items()}
        revisions = answer("revise", questions)
        for trial in trials:
            both = {side: revisions.get((trial["id"], side)) for side in ("principle", "placebo")}
            yield {**trial, "response": responses.get(trial["id"]), "revisions": both}

    def _judge(self, journal: outputs.Output, trials: Sequence[dict]) -> list[dict]:
        """Rows {id, principle, p}: of `judge_pairs`, whether the principle's revision is better than the placebo's.

        The first pairs are judged under every principle, the others under their own. Trials without two revisions that
        differ are not judged.
        """
        pairs = [
            {"response_a": trial["revisions"]["principle"], "response_b": trial["revisions"]["placebo"], **trial}
            for trial in trials
            if has_two_texts(trial)
        ]
        order = sorted(pairs, key=lambda pair: hashing.hashed_seed("compared", self.options.seed, pair["id"]))
        compared = {pair["id"] for pair in order[:PAIRS_COMPARED]}

        def group(pair: dict) -> str:
            return "" if pair["id"] in compared else pair["principle"]

        def produce(engine: Engine) -> Iterator[dict]:
            remaining = (pair for pair in sorted(pairs, key=group) if pair["id"] not in journal.done)
            for name, group_pairs in groupby(remaining, key=group):
                principles = [self.constitution[name]] if name else self.constitution.principles
                while window := list(islice(group_pairs, 4 * self.options.batch_size)):
                    for pair, row in zip(window, judge_pairs(engine, window, principles), strict=True):
                        yield {"id": row["id"], "principle": pair["principle"], "p": row["p"]}

        def load() -> Engine | None:
            options = {"endpoints": self.judge_endpoints, **self.options.loading}
            return loading.load_engine(self.judge, **options) if pairs else None

        return measurement.fill(journal, [pair["id"] for pair in pairs], "judge", load, produce)


def make_placebo(principle: Principle) -> Principle:
    """A principle about nothing that a response has: each request as long as the principle's, or up to three words
    longer, and never shorter than those of `PLACEBO`."""

    def fill(request: str) -> str:
        text, further = PLACEBO[request], cycle(FURTHER)
        while len(text.split()) < len(getattr(principle, request).split()):
            text = f"{text} {next(further)}"
        return text + ("?" if request == "preference" else ".")

    return replace(principle, **{request: fill(request) for request in REQUESTS}, examples=(), principle="")


def has_two_texts(trial: dict) -> bool:
    """Whether both revisions were written and differ."""
    both = trial["revisions"].values()
    return None not in both and len(set(both)) == 2


def compare_with_placebo(trials: Iterable[dict], judged: Iterable[dict], ids: Sequence[str]) -> dict:
    """{placebo, principles, weakest, verdict, failed} over trials and their judgements.

    placebo: the share of trials in which the judge prefers the revision under the principle to that under the placebo,
    with a 95 % interval; where both are equal, or the judge can't tell, half a trial. principles: the same for each.
    A principle `is_told` from the placebo if its own interval and that of all trials are above a half: with many
    principles, some would be by luck. failed: trials without two revisions, or without an answer of the judge.
    """
    p = {row["id"]: row["p"] and row["p"][row["principle"]] for row in judged}
    credits: dict[str, list[float]] = defaultdict(list)
    failed = identical = 0
    for trial in trials:
        if None in trial["revisions"].values() or (has_two_texts(trial) and p.get(trial["id"]) is None):
            failed += 1
            continue
        identical += not has_two_texts(trial)
        credits[trial["principle"]].append(credit(p[trial["id"]] - 0.5) if has_two_texts(trial) else 0.5)

    def measure(values: Sequence[float]) -> dict:
        figure = intervals.clustered_rate(values, range(len(values)))
        return {name: figure[name] for name in ("value", "low", "high", "n")}

    total = measure([value for values in credits.values() for value in values])
    is_told = total["n"] > 0 and total["low"] > 0.5
    figures = [{"id": id_, **measure(credits[id_])} for id_ in ids]
    for figure in figures:
        figure["is_told"] = is_told and figure["n"] > 0 and figure["low"] > 0.5
    weakest = min((figure for figure in figures if figure["n"]), key=lambda figure: figure["value"], default=None)
    count = sum(figure["is_told"] for figure in figures)
    if not is_told:
        verdict = NOT_TOLD
    elif not count:
        verdict = (
            "the constitution can be distinguished from the placebo, but no single principle: try each on more prompts "
            "(-n)"
        )
    else:
        verdict = f"{count} of {len(ids)} principles can be distinguished from the placebo"
    return {
        "verdict": verdict,
        "placebo": total,
        "principles": figures,
        "weakest": weakest and weakest["id"],
        "identical": identical,
        "failed": failed,
    }


def find_opposed(judged: Iterable[dict], ids: Sequence[str]) -> list[dict]:
    """{principles, value, low, high, n, correlation} of each two principles that pull apart, the worst first.

    value: share of pairs of revisions about which their verdicts disagree. They pull apart if they disagree more often
    than two coins: its lower bound is above a half.
    """
    known = [row["p"] for row in judged if row["p"]]
    opposed = []
    for first, second in combinations(ids, 2):
        both = [(p[first] - 0.5, p[second] - 0.5) for p in known if first in p and second in p]
        disagreement = intervals.rate(sum(a * b < 0 for a, b in both), len(both))
        if both and disagreement["low"] > 0.5:
            correlation = intervals.correlation(*zip(*both, strict=True))["value"]
            opposed.append({"principles": [first, second], **disagreement, "correlation": correlation})
    return sorted(opposed, key=lambda row: -row["value"])


def as_text(report: dict) -> str:
    """The report as a table of the principles, with the findings below it."""
    speaks_to = report["coverage"]["speaks_to"]
    lines = [
        (row["id"], speaks_to[row["id"]], tables.show(row), row["n"], "yes" if row["is_told"] else "no")
        for row in report["principles"]
    ]
    header = ("principle", "prompts", "beats the placebo (95 % interval)", "n", "told from it")
    coverage = report["coverage"]
    parts = [
        f"VERDICT: {report['verdict']}",
        tables.table(header, lines),
        f"all principles: {tables.show(report['placebo'])} of {report['placebo']['n']} trials",
        f"weakest principle: {report['weakest'] or '–'}",
        f"coverage: uncovered {tables.show(coverage['uncovered'])}, unsure {tables.show(coverage['unsure'])}",
    ]
    for row in report["pull_apart"]:
        parts.append(f"{' and '.join(row['principles'])} pull apart: they disagree on {tables.show(row)} of {row['n']}")
    if not report["pull_apart"]:
        parts.append("no two principles pull apart")
    return "\n".join([*parts, rendering.findings_as_text(report["lint"])])
