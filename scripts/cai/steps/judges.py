"""Judges at work: each judge's verdicts go into an output, and those of several judges become one label.

    judges = read_judges(["tiny", "openai:qwen3@http://localhost:8000"], ())
    judge_output(team, output, comparisons, question, limits, load)

Leaves out how a comparison is put to a judge and what its verdicts say (judging.py).
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, starmap
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cai.base import requests
from cai.base.errors import InputError
from cai.base.hashing import identity
from cai.constitution import files, templates
from cai.data import preferences, processes, readers, shards
from cai.data.outputs import Output
from cai.models import engine, estimate, loading
from cai.stats import agreement
from cai.steps import judging, pairs, sharing
from cai.steps.principles import Chooser, read_matches

COT_LIMITS = (0.4, 0.6)  # paper, section 4.1: after reasoning the judge is overconfident


@dataclass(frozen=True)
class Task:
    """What every judge is asked.

    chooser: of the principles. limits: p_chosen is clamped to them.
    inputs: the files of the comparisons. fingerprint: what decides the rows, beside the judge.
    """

    comparisons: pairs.Pairs | preferences.GivenPairs
    question: judging.Question
    chooser: Chooser
    limits: tuple[float, float]
    inputs: Sequence[str]
    fingerprint: dict[str, Any]


def read_task(
    inputs: Sequence[str],
    settings: SimpleNamespace,
    *,
    model: str,
    output: str,
    against: str | None,
    pairs_per_prompt: int | None,
    constitution: str,
    template: str,
    answer_template: str,
    principles: str,
    matches: str | None,
    most_examples: int | None,
    cot: bool,
    clamp: tuple[float, float] | None,
) -> Task:
    """The task of judge.py's options. Raises InputError for bad rows, a bad constitution, template or --clamp.

    model: the first judge, which is asked what speaks to a prompt.
    """
    limits = read_limits(clamp, COT_LIMITS if cot else (0.0, 1.0))
    rules = files.load_constitution(constitution)
    paths = [*inputs, *([against] if against else [])]
    kept = read_matches(principles, matches, model, rules, output, paths, settings)
    chooser = Chooser(rules, principles, settings.seed, kept)
    question = make_question(
        chooser, settings, template=template, answer_template=answer_template, most_examples=most_examples, cot=cot
    )
    comparisons, digests = pairs.read_comparisons(
        inputs, against, pairs_per_prompt, settings.seed, settings.limit, settings.reading, settings.shard
    )
    fingerprint = {
        **digests,
        "pairs_per_prompt": pairs_per_prompt,
        **chooser.fingerprint,
        "examples": most_examples,
        "template": question.template.sha256,
        "answer_template": question.written.sha256,
        "clamp": limits,
        "seed": settings.seed,
        "limit": settings.limit,
        "dtype": settings.loading["dtype"],
        **shards.fingerprint(settings.shard),
    }
    if cot:
        sampling = {name: getattr(settings.sampling, name) for name in ("max_new_tokens", "temperature", "top_p")}
        fingerprint |= {"cot": question.reasoning.sha256, **sampling}
    return Task(comparisons, question, chooser, limits, paths, fingerprint)


def make_question(
    chooser: Chooser,
    settings: SimpleNamespace,
    *,
    template: str,
    answer_template: str,
    most_examples: int | None,
    cot: bool,
    key: str = "id",
) -> judging.Question:
    """How comparisons are put to a judge. key: the field of a comparison that its principle is drawn by."""
    each = chooser.mode == "each"
    return judging.Question(
        chooser.constitution,
        templates.load_template(template),
        templates.load_template("preference_cot") if cot else None,
        settings.sampling,
        settings.seed,
        templates.load_template(answer_template),
        every=each,
        most_examples=most_examples,
        choose_principle=None if each else lambda comparison: chooser.choose(_bare(comparison, key)),
    )


def read_limits(clamp: tuple[float, float] | None, default: tuple[float, float]) -> tuple[float, float]:
    """The limits of --clamp. Raises InputError for limits that favour one side."""
    low, high = clamp or default
    if abs(low + high - 1) > 1e-9 or low >= 0.5:
        raise InputError(
            f"--clamp {low} {high}",
            expected="LOW below 0.5 and HIGH = 1 - LOW, such as 0.4 0.6",
            remedy="Other limits would favour one side",
        )
    return low, high


def _bare(comparison: Mapping[str, Any], key: str = "id") -> dict[str, Any]:
    """What decides its principle: it may come from a file with fields of any other kind."""
    return {"id": comparison[key], "prompt": comparison["prompt"]}


def read_judges(names: Iterable[str], endpoints: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """{judge: its servers}. `openai:NAME@URL` names its own server.

    Raises InputError if there is no judge, the same one twice, or one whose model folder does not exist.
    """
    judges: dict[str, tuple[str, ...]] = {}
    for name in names:
        judge, servers = loading.split_endpoint(name, endpoints)
        if judge in judges:
            raise InputError(f"the judge {judge} twice", where="--judge", remedy="Name each judge once")
        loading.check_model(judge)
        judges[judge] = servers
    if not judges:
        raise InputError("no judge", expected="--model MODEL, or --judge MODEL for each of several")
    if endpoints and endpoints not in judges.values():
        raise InputError(
            "an endpoint, but no judge of the kind openai:NAME",
            where="--endpoint",
            remedy="Name the model as the server calls it, or leave --endpoint out",
        )
    return judges


def claim_outputs(
    output: str, judges: Sequence[str], combine: str, task: Task, overwrite: bool
) -> tuple[dict[str, Output], Output]:
    """({judge: its output}, the final output); for a single judge they are the same.

    One of several judges writes to `<output>.judge<number>`, with the output's suffix. Under the same settings that
    file stays valid for another way to combine, --overwrite or not.
    """

    def claim(path: str, overwrite: bool, **more) -> Output:
        claim = {"command": "judge", "fingerprint": {**more, **task.fingerprint}, "inputs": task.inputs}
        return Output(path, overwrite=overwrite, **claim)

    if len(judges) > 1 and "shard" in task.fingerprint:
        raise InputError(
            "several judges over shards",
            where="--shard",
            expected="one judge: what combines the labels of several has to see all comparisons",
            remedy="Run the shards once per judge, merge each, and combine them with --verdicts",
        )
    weights = {name: identity(name) for name in judges}
    if len(judges) == 1:
        final = claim(output, overwrite, model=judges[0], weights=weights[judges[0]])
        return {judges[0]: final}, final
    outputs, path = {}, Path(output)
    for number, name in enumerate(judges, 1):
        claim_judge = partial(
            claim, str(path.with_name(f"{path.stem}.judge{number}{path.suffix}")), model=name, weights=weights[name]
        )
        with suppress(InputError):
            outputs[name] = claim_judge(overwrite=False)
        outputs[name] = outputs.get(name) or claim_judge(overwrite=overwrite)
    return outputs, claim(output, overwrite, judges=weights, combine=combine)


def match_prompts(team: processes.Team, task: Task, load: Callable[[], engine.Engine]) -> None:
    """With `--principles match`, ask which principles speak to the prompts of the comparisons."""
    task.chooser.prepare(team, load, task.comparisons)


def judge_output(team: processes.Team, output: Output | None, task: Task, load: Callable[[], engine.Engine]) -> None:
    """Have one judge decide the comparisons that are left; under `accelerate launch` each process its share.

    Comparisons that do not fit the judge's context are counted and listed in the manifest.
    """

    def load_checked() -> engine.Engine:
        judge = load()
        empty = {"prompt": "", "response_a": "", "response_b": "", "reasoning": ""}
        task.chooser.check_context(judge, 0, task.question.template, **empty)
        return judge

    with sharing.share_work(team, output, load_checked, partial(_judge_share, task)) as (judge, results):
        if results is None:
            return
        for comparison in task.comparisons:
            if preferences.is_tie(comparison) and comparison["id"] not in output.done:
                output.write(judging.tie(comparison))
        failed = {comparison_id: reason for share in results for comparison_id, reason in share.items()}
        _finish(output, task, failed, judge)


def _judge_share(task: Task, team: processes.Team, journal: Any, judge: engine.Engine) -> dict[str, str]:
    """Judge the differing comparisons of this process that are left. Returns {id: why there is no verdict}."""
    failed, done, question = {}, frozenset(journal.done), task.question
    reason = (
        f"it does not fit the model's context of {judge.context} tokens"
        if judge.context
        else "it is too long, or the server would not answer"
    )
    differing = (comparison for comparison in task.comparisons if not preferences.is_tie(comparison))
    with sharing.share_progress(team, len(task.comparisons.ids), len(done), "judge") as bar:
        for comparison, verdicts in judging.judge(judge, team.share(differing), question, done):
            if verdicts is None:
                failed[comparison["id"]] = reason
            else:
                principle = "each" if question.every else question.principles(comparison)[0].id
                p_a = judging.soft_label(verdicts, question.weights)
                preference = judging.preference(comparison, principle, verdicts, p_a, task.limits)
                journal.write({**preference, **task.chooser.describe(_bare(comparison))})
            bar.update(1)
    return failed


def _finish(output: Output, task: Task, failed: dict[str, str], judge: engine.Engine | None = None, **more) -> None:
    """Finish an output with the counts over its rows; `more`: further counts."""
    counts = {**judging.summary(row for _, row in readers.read_jsonl(output.journal)), **more, "failed": len(failed)}
    if task.chooser.matches:
        rows = (row for _, row in readers.read_jsonl(output.journal) if "tie" not in row)
        counts["unmatched"] = sum(row.get("speaks") is None for row in rows)
    if task.comparisons.unpaired:
        counts["unpaired"] = task.comparisons.unpaired
    sharing.finish_output(output, task.comparisons.ids, counts, failed, judge)


def combine_judges(final: Output, outputs: Mapping[str, Output], task: Task, way: str) -> None:
    """Combine the judges' finished outputs into the final one.

    A comparison that one judge could not be asked is decided by the others. It fails if none could be asked.

    Args:
        outputs: {judge: its output}, each in the order of the comparisons.
        way: one of `agreement.WAYS`.
    """
    names = list(outputs)

    def labels(rows: Mapping[str, dict]) -> list[float | None]:
        return [rows[name]["p_a"] if name in rows else None for name in names]

    def judged_labels() -> Iterator[list[float | None]]:
        return (
            labels(rows) for rows in _rows_by_judge(outputs, task) if not any("tie" in row for row in rows.values())
        )

    combined = agreement.combiner(way, judged_labels, len(names))
    votes = Counter()
    failed = dict.fromkeys(task.comparisons.ids, "it does not fit the context of any judge")
    with final:
        if final.complete:
            return
        for rows in _rows_by_judge(outputs, task):
            row = next(iter(rows.values()))
            del failed[row["id"]]
            if "tie" not in row:
                votes[agreement.votes(labels(rows))] += 1
                verdicts = [
                    {"judge": name, **verdict} for name, judged in rows.items() for verdict in judged["verdicts"]
                ]
                row = judging.preference(row, row["principle"], verdicts, combined(labels(rows)), task.limits)
                row["judges"] = dict(zip(names, labels(rows), strict=True))
            if row["id"] not in final.done:
                final.write(row)
        more = {"combine": way, "agreement": agreement.agreement(votes)}
        more["judges"] = {name: output.counts for name, output in outputs.items()}
        more |= requests.sum_counts(output.counts for output in outputs.values())
        if way == "dawid-skene":
            more["estimated_accuracy"] = dict(zip(names, combined.accuracy, strict=True))
        _finish(final, task, failed, **more)


def _rows_by_judge(outputs: Mapping[str, Output], task: Task) -> Iterator[dict[str, dict]]:
    """{judge: its row} of each comparison that any judge has a row of, in the order of the comparisons."""
    positions = {comparison_id: position for position, comparison_id in enumerate(task.comparisons.ids)}

    def read(name: str, path: Path) -> Iterator[tuple[int, str, dict]]:
        return ((positions[row["id"]], name, row) for _, row in readers.read_jsonl(path))

    merged = heapq.merge(*(read(name, output.path) for name, output in outputs.items()), key=itemgetter(0))
    for _, rows in groupby(merged, key=itemgetter(0)):
        yield {name: row for _, name, row in rows}


def plan_judges(task: Task, outputs: Mapping[str, Output], plan: Mapping[str, Any]) -> dict:
    """What `--dry-run` reports; under `judges` where there are several.

    plan: arguments of `text_plan`.
    """
    plans = {name: _plan_judge(task, output, name, plan) for name, output in outputs.items()}
    return {
        "pairs": len(task.comparisons.ids),
        **task.chooser.plan(task.comparisons),
        **({"judges": plans} if len(plans) > 1 else plans.popitem()[1]),
    }


def _plan_judge(task: Task, output: Output, model: str, plan: Mapping[str, Any]) -> dict:
    """Each order of each principle is one call, and one more with reasoning."""
    question = task.question

    def calls() -> Iterator[tuple]:
        return (
            (comparison, order, principle)
            for comparison in (() if output.complete else task.comparisons)
            if comparison["id"] not in output.done and not preferences.is_tie(comparison)
            for principle in question.principles(comparison)
            for order in preferences.ORDERS
        )

    done = len(task.comparisons.ids) if output.complete else len(output.done)
    total = estimate.text_plan(starmap(question.choose, calls()), model, engine.Sampling(0), **{**plan, "like": None})
    if question.reasoning:
        reasoning = estimate.text_plan(starmap(question.think, calls()), model, question.sampling, **plan)
        total |= {name: value for name, value in reasoning.items() if name not in total or name.endswith("_gb")}
        for name in ("model_calls", "prompt_tokens_about", "new_tokens_at_most"):
            total[name] += reasoning[name]
    return {"done": done, **total}
