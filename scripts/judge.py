"""Compare responses by a principle of the constitution: preferences with soft labels.

    python scripts/judge.py --input samples.jsonl --model tiny --output preferences.jsonl

The judge answers a forced choice in both orders; the labels' log-probabilities are read and averaged (paper,
section 4.1). A principle is drawn for each comparison. Leaves out ensembles of judges and any training.
"""

import shlex
from itertools import islice

import click

from cai import cli, judging, textsteps
from cai.constitution import load_constitution
from cai.engines import Sampling, check_model, load_engine
from cai.errors import InputError
from cai.records import Output, Source, identity, read_jsonl
from cai.templates import load_template

COT_LIMITS = (0.4, 0.6)  # paper, section 4.1: reasoning makes the probabilities too sure
PAIR = ("prompt", "response_a", "response_b")


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--against", metavar="FILE", help="Compare with these responses to the same prompts instead of "
              "among --input.")
@click.option("--pairs-per-prompt", type=click.IntRange(min=1), default=None,
              help="Compare at most N pairs of a prompt's responses.  [default: all]")
@click.option("--template", default="preference", show_default=True, metavar="NAME|FILE",
              help="Template of the forced choice.")
@click.option("--cot", is_flag=True, help="Let the judge reason first, with the template preference_cot.")
@click.option("--clamp", nargs=2, type=click.FloatRange(0, 1), default=None, metavar="LOW HIGH",
              help="Keep probabilities within these; 0 1 is off.  [default: 0.4 0.6 with --cot, else off]")
@cli.options(*textsteps.OPTIONS)
def main(inputs, output, model, constitution, against, pairs_per_prompt, template, cot, clamp, temperature,
         top_p, max_new_tokens, seed, limit, batch_size, device, dtype, as_json, dry_run, overwrite):
    """Compare responses to the same prompt, and write which is better and how sure the judge is.

    Rows have a `response` (those of one prompt_id are compared) or a `response_a` and a `response_b`; with a
    `gold` of "a" or "b" the judge's accuracy is measured. Sampling options matter with --cot only.

    \b
    Example:
      python scripts/judge.py --input samples.jsonl --model tiny \\
          --constitution harmlessness --output preferences.jsonl
    """
    low, high = limits = clamp or (COT_LIMITS if cot else (0.0, 1.0))
    if abs(low + high - 1) > 1e-9 or low >= 0.5:
        raise InputError(f"--clamp {low} {high}", expected="LOW below 0.5 and HIGH = 1 - LOW, such as 0.4 0.6",
                         remedy="Other limits would favour one side")
    check_model(model)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    question = judging.Question(load_constitution(constitution), load_template(template),
                                load_template("preference_cot") if cot else None, sampling, seed)
    pairs, ids, digests = read_comparisons(inputs, against, pairs_per_prompt, seed, limit)
    fingerprint = {"model": model, "weights": identity(model), **digests,
                   "pairs_per_prompt": pairs_per_prompt, "constitution": question.constitution.sha256,
                   "template": question.template.sha256, "clamp": limits, "seed": seed,
                   "limit": limit, "dtype": dtype}
    if cot:
        fingerprint |= {"cot": question.reasoning.sha256, "max_new_tokens": max_new_tokens,
                        "temperature": temperature, "top_p": top_p}
    journal = Output(output, command="judge", fingerprint=fingerprint, overwrite=overwrite,
                     inputs=[*inputs, *([against] if against else [])])
    summary = {"command": "judge", "output": output}
    if dry_run:
        done = set(ids) if journal.complete else journal.done
        summary |= {"pairs": len(ids), "done": len(done), **estimate(pairs, done, question, model)}
        cli.finish(summary, as_json=as_json)
        return
    engine = None
    if not journal.complete:
        engine = load_engine(model, batch_size=batch_size, device=device, dtype=dtype)
    with journal:
        if journal.complete:
            cli.note(f"{output} is done already; --overwrite makes it anew")
        else:
            identical, failed = fill(journal, pairs, len(ids), engine, question, limits)
            counts = {**judging.summary(row for _, row in read_jsonl(journal.journal)),
                      "identical": identical, "failed": len(failed)}
            journal.finish(ids, counts, failed_rows=failed)
            for pair_id, reason in islice(failed.items(), 5):
                cli.warn(f"pair {pair_id}: {reason}")
    then = ["scripts/reward_model.py", "--input", output, "--model", model, "--output", "REWARD_MODEL"]
    cli.finish({**summary, **journal.counts}, as_json=as_json, next_command=shlex.join(["python", *then]))


def read_comparisons(inputs, against, most, seed, limit):
    """(comparisons, their ids, digests of the inputs) from rows of pairs or rows of one response.

    Raises InputError if the rows are neither, or of both kinds.
    """
    made = next(iter(Source(inputs, limit=1)))
    if "response_a" in made:
        if against or most:
            raise InputError("--against or --pairs-per-prompt with rows that are pairs already",
                             where=", ".join(inputs), remedy="Leave it out")
        source = Source(inputs, require=PAIR, limit=limit, check=judging.check_gold)
        return source, source.ids, {"input": source.digest}
    source = Source(inputs, require=("prompt", "response"), limit=limit)
    others = Source([against], require=("prompt", "response")) if against else None
    pairs = judging.Pairs(source, others, most, seed)
    return pairs, pairs.ids, {"input": source.digest, "against": others and others.digest}


def left(pairs, done):
    """The pairs that are not judged yet and can be."""
    return (pair for pair in pairs if pair["id"] not in done and not judging.identical(pair))


def fill(journal, pairs, total, engine, question, limits) -> tuple[int, dict]:
    """Judge the pairs that are left. Returns (how many are identical, {id of a failed pair: why})."""
    failed = {}
    with cli.progress(total, "judge") as bar:
        identical = sum(map(judging.identical, pairs))
        bar.update(identical + len(journal.done))
        for pair, verdicts in judging.judge(engine, left(pairs, ()), question, journal.done):
            if verdicts is None:
                failed[pair["id"]] = f"it does not fit the model's context of {engine.context} tokens"
            else:
                journal.write(judging.preference(pair, question.principle(pair).id, verdicts, limits))
            bar.update(1)
    return identical, failed


def estimate(pairs, done, question, model) -> dict:
    """What the pairs will ask of the model, without loading it: each twice, and twice more with reasoning."""

    def asked():
        return ({**pair, "order": order} for pair in left(pairs, done) for order in judging.ORDERS)

    plan = textsteps.estimate(asked(), lambda row: question.choose(row, row["order"]), 0, model)
    if question.reasoning:
        new = question.sampling.max_new_tokens
        thinking = textsteps.estimate(asked(), lambda row: question.think(row, row["order"]), new, model)
        for name in ("model_calls", "prompt_tokens_about", "new_tokens_at_most"):
            plan[name] += thinking[name]
    return plan


if __name__ == "__main__":
    main()
