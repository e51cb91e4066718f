"""Compare responses by a principle of the constitution: preferences with soft labels.

    python scripts/judge.py --input samples.jsonl --model tiny --output preferences.jsonl

The judge answers a forced choice in both orders; the labels' log-probabilities are read and averaged (paper,
section 4.1). A principle is drawn for each comparison, or all are asked. Several judges are asked one after the
other, each into a file of its own beside the output, and then combined. Leaves out any training.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.base.hashing import identity
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import preferences
from cai.data.outputs import Output
from cai.data.processes import Team
from cai.data.readers import read_jsonl
from cai.data.sources import Source
from cai.evaluate import audit
from cai.models.engine import Sampling
from cai.models.estimate import text_plan
from cai.models.loading import check_model, load_engine
from cai.models.local import fast_path
from cai.report import hub
from cai.stats import agreement, tables
from cai.steps import judging, text
from cai.steps.pairs import Pairs

COT_LIMITS = (0.4, 0.6)  # paper, section 4.1: reasoning makes the probabilities too sure


@click.command(cls=cli.Command)
@cli.options("input", "output")
@click.option("--model", metavar="MODEL", help="The judge: a folder, a hub id, or `tiny` (bundled).")
@click.option(
    "--judge", multiple=True, metavar="MODEL", help="A further judge. Repeatable; then --model may be left out."
)
@click.option(
    "--combine",
    type=click.Choice(agreement.WAYS),
    default="mean",
    show_default=True,
    help="How several judges become one label. dawid-skene weighs them by how they agree. Another way with "
    "--overwrite asks no judge again.",
)
@cli.options("constitution")
@click.option(
    "--principles",
    type=click.Choice(["drawn", "all"]),
    default="drawn",
    show_default=True,
    help="One principle for each comparison, drawn at random, or all, averaged by weight.",
)
@click.option("--no-examples", is_flag=True, help="Do not show the judge the constitution's worked comparisons.")
@click.option(
    "--against", metavar="FILE", help="Compare with these responses to the same prompts instead of among --input."
)
@click.option(
    "--pairs-per-prompt",
    type=click.IntRange(min=1),
    default=None,
    help="Compare at most N pairs of a prompt's responses.  [default: all]",
)
@click.option(
    "--template", default="preference", show_default=True, metavar="NAME|FILE", help="Template of the forced choice."
)
@click.option(
    "--answer-template",
    default="preference_answer",
    show_default=True,
    metavar="NAME|FILE",
    help="Template for a judge without log-probabilities, which writes a letter.",
)
@click.option("--cot", is_flag=True, help="Let the judge reason first, with the template preference_cot.")
@click.option(
    "--clamp",
    nargs=2,
    type=click.FloatRange(0, 1),
    default=None,
    metavar="LOW HIGH",
    help="Keep probabilities within these; 0 1 is off.  [default: 0.4 0.6 with --cot, else off]",
)
@click.option(
    "--audit",
    "audit_path",
    metavar="FILE",
    help="Measure what the labels are worth, with intervals, and "
    "write it here as JSON; with gold labels a reliability diagram (PNG) beside it.",
)
@hub.option
@text.options
def main(
    inputs,
    output,
    model,
    judge,
    combine,
    constitution,
    principles,
    no_examples,
    against,
    pairs_per_prompt,
    template,
    answer_template,
    cot,
    clamp,
    audit_path,
    endpoints,
    temperature,
    top_p,
    max_new_tokens,
    seed,
    limit,
    batch_size,
    batch_tokens,
    like,
    gpu,
    price,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
):
    """Compare responses to the same prompt, and write which is better and how sure the judge is.

    Rows have a `response` (those of one prompt_id are compared), a `response_a` and a `response_b`, or TRL's
    `chosen` and `rejected`. With a `gold` of "a" or "b", or a chosen one, the judge's accuracy is measured. Sampling
    options matter with --cot only. With --audit a finished output is measured without judging again.

    \b
    Example:
      python scripts/judge.py --input samples.jsonl --model tiny \\
          --constitution harmlessness --output preferences.jsonl
    """
    judges = read_judges(model, judge, endpoints)
    names = list(judges)
    low, high = limits = clamp or (COT_LIMITS if cot else (0.0, 1.0))
    if abs(low + high - 1) > 1e-9 or low >= 0.5:
        raise InputError(
            f"--clamp {low} {high}",
            expected="LOW below 0.5 and HIGH = 1 - LOW, such as 0.4 0.6",
            remedy="Other limits would favour one side",
        )
    question = judging.Question(
        load_constitution(constitution),
        load_template(template),
        load_template("preference_cot") if cot else None,
        Sampling(max_new_tokens, temperature, top_p),
        seed,
        load_template(answer_template),
        every=principles == "all",
        examples=not no_examples,
    )
    pairs, digests = read_comparisons(inputs, against, pairs_per_prompt, seed, limit)
    shared = {
        **digests,
        "pairs_per_prompt": pairs_per_prompt,
        "constitution": question.constitution.sha256,
        "principles": principles,
        "examples": not no_examples,
        "template": question.template.sha256,
        "answer_template": question.written.sha256,
        "clamp": limits,
        "seed": seed,
        "limit": limit,
        "dtype": dtype,
    }
    if cot:
        shared |= {
            "cot": question.reasoning.sha256,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }

    def claim(path, overwrite=overwrite, **fingerprint):
        return Output(
            path,
            command="judge",
            fingerprint={**fingerprint, **shared},
            overwrite=overwrite,
            inputs=[*inputs, *([against] if against else [])],
        )

    def claim_one(path, name):
        """The file of one of several judges: what it said under these very settings holds for another --combine."""
        given = {"model": name, "weights": identity(name)}
        with suppress(InputError):
            return claim(path, overwrite and alone, **given)
        return claim(path, **given)

    loading = {"batch_size": batch_size, "batch_tokens": batch_tokens, "device": device, "dtype": dtype}
    team, alone = Team(), len(names) == 1
    if not team.first:
        if not (dry_run or team.tell()):
            for name in names:
                fill(team, None, pairs, name, question, limits, endpoints=judges[name], **loading)
        return
    paths = [output] if alone else [beside(output, number) for number in range(1, len(names) + 1)]
    journals = [claim_one(path, name) for path, name in zip(paths, names, strict=True)]
    final = journals[0] if alone else claim(output, judges={name: identity(name) for name in names}, combine=combine)
    audit.check_path(audit_path, [*inputs, output, *paths])
    summary = {"command": "judge", "output": output}
    if dry_run:
        plan = {"like": like, "gpu": gpu, "price": price, **loading}
        plans = {
            name: estimate(pairs, journal, question, name, plan) for name, journal in zip(names, journals, strict=True)
        }
        found = plans[names[0]] if alone else {"judges": plans}
        cli.finish({**summary, "pairs": len(pairs.ids), **found, **hub.planned()}, as_json=as_json)
        return
    if team.tell(final.complete):
        cli.note(f"{output} is done already; --overwrite makes it anew")
    else:
        for journal, name in zip(journals, names, strict=True):
            fill(team, journal, pairs, name, question, limits, endpoints=judges[name], **loading)
        if not alone:
            unite(final, journals, names, pairs, combine, limits)
    summary |= final.counts
    if audit_path:
        measured = audit.measure((row for _, row in read_jsonl(output)), names)
        summary["audit"] = audit.write(audit_path, measured, title=", ".join(names))
    if not as_json:
        summary = {
            name: tables.show(value) if isinstance(value, dict) and "low" in value else value
            for name, value in summary.items()
        }
    then = ["scripts/reward_model.py", "--input", output, "--model", "SFT_MODEL", "--output", "REWARD_MODEL"]
    cli.finish({**summary, **hub.push(output)}, as_json=as_json, next_command=shlex.join(["python", *then]))


def read_judges(model: str | None, further: Iterable[str], endpoints: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """{judge: its servers}, --model first. A server's may be said with it: openai:NAME@URL.

    Raises InputError if there is no judge, one twice, or one that can't be.
    """
    judges: dict[str, tuple[str, ...]] = {}
    for given in [*([model] if model else []), *further]:
        name, at, url = given.partition("@http") if given.startswith("openai:") else (given, "", "")
        if name in judges:
            raise InputError(f"the judge {name} twice", where="--judge", remedy="Name each judge once")
        check_model(name)
        judges[name] = (f"http{url}",) if at else endpoints if name.startswith("openai:") else ()
    if not judges:
        raise InputError("no judge", expected="--model MODEL, or --judge MODEL for each of several")
    if endpoints and endpoints not in judges.values():
        raise InputError(
            "an endpoint, and no judge of the kind openai:NAME",
            where="--endpoint",
            remedy="Say what the server calls the model, or leave it out",
        )
    return judges


def beside(output: str, number: int) -> str:
    """Where the rows of one of several judges go."""
    path = Path(output)
    return str(path.with_name(f"{path.stem}.judge{number}{path.suffix}"))


def read_comparisons(inputs, against, most, seed, limit):
    """(comparisons, digests of the inputs) from rows of pairs or rows of one response.

    Raises InputError if the rows are neither, or of both kinds.
    """
    first = next(iter(Source(inputs, limit=1)))
    if preferences.is_pair(first):
        if against or most:
            raise InputError(
                "--against or --pairs-per-prompt with rows that are pairs already",
                where=", ".join(inputs),
                remedy="Leave it out",
            )
        pairs = preferences.GivenPairs(inputs, limit)
        return pairs, {"input": pairs.digest}
    source = Source(inputs, require=("prompt", "response"), limit=limit)
    others = Source([against], require=("prompt", "response")) if against else None
    pairs = Pairs(source, others, most, seed)
    return pairs, {"input": source.digest, "against": others and others.digest}


def fill(team, journal, pairs, name, question, limits, **loading) -> None:
    """Have one judge decide the pairs that are left; under `accelerate launch` each process its share.

    What does not fit the judge's context is counted and named.
    """
    if team.first and journal.complete:
        team.begin(journal)
        return
    engine = load_engine(name, **loading) if team.first else None  # one that can't be loaded leaves no trace
    with journal or nullcontext():
        place = team.begin(journal)
        if place is None:
            return
        engine = engine or load_engine(name, **loading)
        failed = judge_share(team, place, pairs, engine, question, limits)
        found = team.gather(place, failed)
        if team.first:
            for pair in pairs:
                if preferences.is_tie(pair) and pair["id"] not in journal.done:
                    journal.write(judging.tie(pair))
            close(journal, pairs, {key: why for one in found for key, why in one.items()}, {}, **fast_path(engine))


def judge_share(team, journal, pairs, engine, question, limits) -> dict[str, str]:
    """Judge the differing pairs of this process that are left. Returns {id: why there is no verdict}."""
    failed = {}
    why = (
        f"it does not fit the model's context of {engine.context} tokens"
        if engine.context
        else "it is too long, or the server would not answer"
    )
    differing = (pair for pair in pairs if not preferences.is_tie(pair))
    done = frozenset(journal.done)
    with cli.progress(len(pairs.ids) // team.count, "judge") as bar:
        bar.disable = bar.disable or not team.first
        bar.update(len(done) // team.count)
        for pair, verdicts in judging.judge(engine, team.share(differing), question, done):
            if verdicts is None:
                failed[pair["id"]] = why
            else:
                asked = "all" if question.every else question.principles(pair)[0].id
                p_a = judging.soft_label(verdicts, question.weights)
                journal.write(judging.preference(pair, asked, verdicts, p_a, limits))
            bar.update(1)
    return failed


def close(journal, pairs, failed: dict, more: dict, **info) -> None:
    """Finish an output with what its rows say together (`info`: more for its manifest), and warn of what failed."""
    counts = {**judging.summary(row for _, row in read_jsonl(journal.journal)), **more, "failed": len(failed)}
    if pairs.unpaired:
        counts["unpaired"] = pairs.unpaired
    journal.finish(pairs.ids, counts, failed_rows=failed, **info)
    for pair_id, reason in islice(failed.items(), 5):
        cli.warn(f"pair {pair_id}: {reason}")


def unite(final, journals, names, pairs, combine, limits) -> None:
    """Combine the judges' files, which are in the order of the pairs, into the output.

    A pair that one judge could not be asked is decided by the others; it failed if nobody could.
    """

    def together() -> Iterator[dict[str, dict]]:
        """{judge: its row} of each pair that has one."""
        files = {name: _Ahead(journal.path) for name, journal in zip(names, journals, strict=True)}
        for pair_id in pairs.ids:
            yield {name: row for name, file in files.items() if (row := file.take(pair_id))}

    def labels(rows: dict[str, dict]) -> list[float | None]:
        return [rows[name]["p_a"] if name in rows else None for name in names]

    asked = (rows for rows in together() if not any("tie" in row for row in rows.values()))
    joint = agreement.combiner(combine, lambda: map(labels, asked), len(names))
    votes = Counter()
    failed = {}
    with final:
        if final.complete:
            return
        for pair_id, rows in zip(pairs.ids, together(), strict=True):
            if not rows:
                failed[pair_id] = "it does not fit the context of any judge"
                continue
            row = next(iter(rows.values()))
            if "tie" not in row:
                votes[agreement.votes(labels(rows))] += 1
                verdicts = [{"judge": name, **one} for name, row in rows.items() for one in row["verdicts"]]
                row = judging.preference(row, row["principle"], verdicts, joint(labels(rows)), limits)
                row["judges"] = dict(zip(names, labels(rows), strict=True))
            if pair_id not in final.done:
                final.write(row)
        judges = {name: journal.counts for name, journal in zip(names, journals, strict=True)}
        more = {"combine": combine, "agreement": agreement.agreement(votes), "judges": judges}
        if combine == "dawid-skene":
            more["estimated_accuracy"] = dict(zip(names, joint.accuracy, strict=True))
        close(final, pairs, failed, more)


class _Ahead:
    """The rows of a file in order, each taken when its id comes."""

    def __init__(self, path):
        self._rows = (row for _, row in read_jsonl(path))
        self._next = next(self._rows, None)

    def take(self, row_id: str) -> dict | None:
        if self._next is None or self._next["id"] != row_id:
            return None
        row, self._next = self._next, next(self._rows, None)
        return row


def estimate(pairs, journal, question, model, plan) -> dict:
    """What the pairs left will ask of one judge, without loading it: each order of each principle once, and before
    it once more with reasoning."""

    def asked() -> Iterator[tuple]:
        for pair in () if journal.complete else pairs:
            if pair["id"] not in journal.done and not preferences.is_tie(pair):
                yield from ((pair, order, one) for one in question.principles(pair) for order in preferences.ORDERS)

    done = len(pairs.ids) if journal.complete else len(journal.done)
    found = text_plan((question.choose(*one) for one in asked()), model, Sampling(0), **{**plan, "like": None})
    if question.reasoning:
        thinking = text_plan((question.think(*one) for one in asked()), model, question.sampling, **plan)
        found |= {name: thinking[name] for name in thinking if name not in found or name.endswith("_gb")}
        for name in ("model_calls", "prompt_tokens_about", "new_tokens_at_most"):
            found[name] += thinking[name]
    return {"done": done, **found}


if __name__ == "__main__":
    main()
