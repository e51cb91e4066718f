"""Measure what a model's responses do: comply, refuse well, dodge, preach, help, over-refuse.

    python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl --model tiny --by oracle \
        --output evaluation.jsonl
    python scripts/evaluate.py --choice 438HHHEvaluations.jsonl --model runs/sft --output choice.jsonl
    python scripts/evaluate.py --input heldout.jsonl --model runs/sft --judge my-org/my-judge --output sft.jsonl \
        --against base.jsonl --gate

Every response is put into one class, by the bundled world's oracle (prompts made by tiny.py only), by a judge model's
forced choice between letters, or by a safety classifier. Besides: a language model or a reward model on multiple
choices (`--choice`), and a reward model on pairs whose better response is known. Leaves out any score of how good a
text is, and any rate over prompts whose kind is not stated.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import click

from cai import choice as choices
from cai import classes, cli, contest, gate, judging, metrics, responding, reward
from cai.constitution import load_constitution
from cai.engines import Sampling, check_model, load_engine
from cai.errors import CaiError, InputError
from cai.records import Output, Source, identity, read_jsonl, sha256_file
from cai.revision import check_rounds
from cai.templates import as_messages, load_template, prompt_text

WORSE = 4  # exit code of --gate

# Metrics that are no shares.
NUMBERS = ("log_loss", "ece", "length_correlation")


@dataclass
class Task:
    """What is to be measured. `plan`: what --dry-run says; `settings`: all that decides the figures; `measure`: makes
    ({metric: figure}, counts), given what claims a file of rows beside the output: claim(ending, settings)."""

    files: list[str]
    plan: dict
    settings: dict
    measure: Callable[[Callable[[str, dict], Output]], tuple[dict, dict]]


@click.command(cls=cli.Command)
@click.option("--input", "inputs", multiple=True, metavar="FILE",
              help="Prompts with their kind, or pairs with gold (with --reward-model). Repeatable.")
@cli.options("output")
@click.option("--model", metavar="MODEL", help="Answers the prompts: a folder, a hub id, `tiny`, or openai:NAME.")
@cli.options("endpoint")
@click.option("--responses", multiple=True, metavar="FILE",
              help="Instead of --input and --model: rows that have a response already. Repeatable.")
@click.option("--round", "round_", type=click.IntRange(min=0), default=None,
              help="Of revised rows, the revision of this round; 0 is the first response. Default: the last.")
@click.option("--by", type=click.Choice(["oracle", "judge"]), default="judge", show_default=True,
              help="Who reads the responses: the rules of the bundled world, or a judge model.")
@click.option("--judge", metavar="MODEL", help="The judge model: a folder, a hub id, `tiny`, or openai:NAME@URL. With "
              "--by oracle its classes are compared with the oracle's.")
@click.option("--classifier", metavar="MODEL", help="Instead of a judge: a sequence-classification model that knows "
              "safe from unsafe.")
@click.option("--unsafe-label", multiple=True, metavar="LABEL",
              help="The classifier's label for unsafe. Repeatable. Default: those whose name says so.")
@click.option("--stress", multiple=True, type=click.Choice([*responding.WAYS, "all"]),
              help="Ask harmful prompts also so: pushed again, with a begun answer, under a role or a system prompt "
                   "that drops all principles, under one that asks for care. Repeatable.")
@click.option("--policy", multiple=True, metavar="[NAME=]MODEL",
              help="Instead of --model: this one against the others, by --judge, harmlessness and helpfulness apart; "
                   "Elo points above the first. A model, or a file of its responses. Repeatable.")
@cli.options("constitution")
@click.option("--helpfulness", default="helpfulness", show_default=True, metavar="NAME|FILE",
              help="With --policy: the constitution that harmless prompts are judged by.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True,
              help="Sample so many times, with the seeds from --seed on, and give the spread.")
@click.option("--against", metavar="FILE", help="An earlier --output: say what changed since, with intervals.")
@click.option("--gate", "gated", is_flag=True, help="With --against: end with one line VERDICT, and with "
              "exit code 4 if it is worse.")
@click.option("--margin", type=click.FloatRange(0, 100), default=0.0, show_default=True,
              help="Points of a hundred that a figure may change without being called better or worse.")
@click.option("--reward-model", metavar="FOLDER",
              help="Measure this reward model: its accuracy on pairs with response_a, response_b and gold, on those "
                   "with chosen and rejected (HH-RLHF's too), or on the text_correct and text_incorrect of --choice.")
@click.option("--choice", metavar="FILE",
              help="Instead of --input: questions with `prompt`, `corrects` and `incorrects`, of which --model picks "
                   "the likeliest; the format of the paper's three evaluation sets.")
@click.option("--choice-format", type=click.Choice(choices.FORMS), default="chat", show_default=True,
              help="Ask as a user's turn with the answer begun, or go on from the plain text, as for a pretrained "
                   "model.")
@cli.options("temperature", "top_p", "max_new_tokens", "seed", "limit", "batch_size", "device", "dtype",
             "json", "dry_run", "overwrite")
def main(output, against, gated, margin, as_json, dry_run, overwrite, **options):
    """Measure responses: rates per kind of prompt, with 95 % intervals.

    Prompts need a `kind`: harmful, benign or borderline. The rates go to OUTPUT, one a line; the responses
    and their classes, or the scores of each choice, to files beside it.

    \b
    Example:
      python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl \\
          --model tiny --by oracle --output evaluation.jsonl
    """
    given = SimpleNamespace(**options)
    given.loading = {name: options[name] for name in ("batch_size", "device", "dtype")}
    if gated and not against:
        raise InputError("--gate without --against FILE", remedy="Name the evaluation to compare with")
    before = gate.load(against) if against else None
    task = pick(given)(given)
    claim = {"command": "evaluate", "overwrite": overwrite, "inputs": [*task.files, *([against] if against else [])]}
    final = Output(output, fingerprint=task.settings, **claim)
    if dry_run:
        cli.finish({**task.plan, "output": output}, as_json=as_json)
        return
    if not final.complete:
        stem = Path(output).with_suffix("")
        rates, counts = task.measure(
            lambda ending, settings: Output(f"{stem}.{ending}.jsonl", fingerprint=settings, **claim))
        write_rates(final, rates, counts)
    report(final, as_json, before, gated, margin / 100)


def pick(given) -> Callable[..., Task]:
    """What is to be measured; InputError unless that is clear."""
    if given.choice:
        if given.inputs or given.responses or bool(given.model) == bool(given.reward_model):
            raise InputError("--choice is not clear",
                             expected="--choice FILE with --model or --reward-model, and no other input")
        return choice_task
    asked = [bool(given.responses), bool(given.reward_model), bool(given.model), bool(given.policy)]
    if asked.count(True) != 1 or bool(given.inputs) == bool(given.responses):
        raise InputError(
            "what to measure is not clear",
            expected="--input with --model, --responses, --input with --reward-model or several --policy, or --choice "
                     "with a model",
        )
    return contest_task if given.policy else reward_task if given.reward_model else class_task


# --- classes of responses -----------------------------------------------------------------------------------


def class_task(given) -> Task:
    """What the responses of a model, or those of a file, do."""
    if given.round_ is not None and not given.responses:
        raise InputError("--round without --responses", remedy="A round is picked from revised rows")
    if given.responses and (given.seeds > 1 or given.stress):
        raise InputError("--seeds or --stress with --responses", remedy="They ask a model: give --input and --model")
    by = "classifier" if given.classifier else given.by
    classes.check_readers(by, given.judge, given.classifier)
    if given.model:
        check_model(classes.served(given.model)[0])
    ways = responding.WAYS if "all" in given.stress else tuple(way for way in responding.WAYS if way in given.stress)
    files = [*given.inputs, *given.responses]
    source, kinds = read_rows(files, given.limit, by, given.round_, answered=bool(given.responses))
    calls = given.seeds * (source.count + sum(kinds["harmful"] if way not in responding.ALL_KINDS else source.count
                                              for way in ways))
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p)
    asked = {"input": source.digest, "limit": given.limit,
             "model": identity(given.model) if given.model else None, "seed": given.seed,
             **({"seeds": given.seeds} if given.seeds > 1 else {}),
             **({"stress": ways, "stress_templates": responding.digest(ways)} if ways else {}),
             **asdict(sampling), "dtype": given.dtype}
    settings = {**asked, "reward_model": None, "round": given.round_, "by": by,
                "judge": identity(given.judge) if given.judge else None,
                "template": load_template("classify").sha256}
    if given.classifier:
        settings |= {"classifier": identity(given.classifier), "unsafe_label": given.unsafe_label}

    def measure(claim):
        rows = source
        if given.model:
            answered = claim("responses", asked)
            responding.respond(lambda: responding.plan(source, given.seed, given.seeds, ways), answered,
                               lambda: classes.load(given.model, given.endpoints, given.loading), sampling, given.model)
            rows = Source([answered.path], require=("prompt", "kind", "response"))
        read = claim("classes", settings)
        classify(rows, read, by, given)
        return class_figures(read.path, calls if given.model else source.count)

    return Task(files, {"rows": source.count, **kinds, "model_calls": calls if given.model else 0,
                        "new_tokens_at_most": calls * given.max_new_tokens if given.model else 0,
                        "judge_calls": calls if given.judge else 0}, settings, measure)


def read_rows(files, limit, by: str, round_: int | None, *, answered: bool) -> tuple[Source, dict[str, int]]:
    """(the rows, how many of each kind). InputError with file and line for one that can't be measured."""
    kinds = dict.fromkeys(metrics.KINDS, 0)

    def check(row, where, line):
        classes.check_kind(row, where, line)
        if by == "oracle":
            classes.check_oracle(row, where, line)
        if answered:
            check_rounds(row, where, line, critiqued=False)
            if round_ is not None and round_ > len(row.get("rounds") or ()):
                raise InputError(f"no round {round_}, only {len(row.get('rounds') or ())}", where=where,
                                 line=line, remedy="Pick another --round")
        kinds[row["kind"]] += 1

    fields = ("prompt", "kind", "response") if answered else ("prompt", "kind")
    return Source(files, require=fields, limit=limit, check=check), kinds


def classify(source: Source, output: Output, by: str, given) -> None:
    """Write {id, kind, prompt, response, class} of every row (resumable). An unreadable class is null."""
    if output.complete:
        return
    kept = ("id", "kind", "prompt", "response", "prompt_id", "seed", "stress", "gold")
    with output:
        rows = ({**row, "response": classes.text_of(row, given.round_)} for row in source
                if row["id"] not in output.done)
        with cli.progress(source.count - len(output.done), "classify") as bar:
            for row, found in readings(rows, by, given):
                output.write({name: row[name] for name in kept if row.get(name) is not None} | found)
                bar.update()
        output.finish(source.ids, {"rows": source.count})


def readings(rows: Iterable[dict], by: str, given) -> Iterable[tuple[dict, dict]]:
    """Each row with its class; by the oracle with a judge, also with `class_by_judge`."""
    if by == "classifier":
        return classes.Classifier(given.classifier, given.unsafe_label, **given.loading)(rows)
    if by == "oracle" and not given.judge:
        return classes.by_oracle(rows)
    read = classes.by_judge(rows, classes.load(given.judge, given.endpoints, given.loading))
    if by == "judge":
        return read
    return ((row, {**true, "class_by_judge": found["class"], "letter_mass": found["letter_mass"]})
            for row, found in read for _, true in classes.by_oracle([row]))


def class_figures(path: str | Path, rows: int) -> tuple[dict, dict]:
    """({metric: rate}, counts) from the rows of `classify`. What has no class is failed, and in no rate."""
    read = [row for _, row in read_jsonl(path)]
    known = [row for row in read if row["class"] is not None]
    masses = [row["letter_mass"] for row in known if row.get("letter_mass") is not None]
    counts = {"rows": rows, "failed": rows - len(known)}
    if masses:
        mass = counts["mean_letter_mass"] = round(metrics.mean(masses)["value"], 4)
        if mass < 0.5:
            cli.warn(f"the judge would rather not answer with a letter (they have {mass:.0%} of its "
                     "probability): take a larger judge, or read some rows of the classes file")
    return classes.rates(known), counts


# --- policies against each other ----------------------------------------------------------------------------


def contest_task(given) -> Task:
    """Every policy against every other, judged on harmlessness and on helpfulness."""
    policies = contest.policies(given.policy)
    if not given.judge:
        raise InputError("--policy without --judge MODEL", remedy="Name the judge, best none of the policies")
    check_model(classes.served(given.judge)[0])
    source, kinds = read_rows(given.inputs, given.limit, "judge", None, answered=False)
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p)
    template, written = load_template("preference"), load_template("preference_answer")
    questions = {axis: judging.Question(load_constitution(name), template, seed=given.seed, written=written)
                 for axis, name in zip(contest.AXES, (given.constitution, given.helpfulness), strict=True)}
    ready = {name: contest.answered(model, source) for name, model in policies.items() if model.endswith(".jsonl")}
    models = {name: model for name, model in policies.items() if name not in ready}
    asked = {"input": source.digest, "limit": given.limit, "seed": given.seed, **asdict(sampling),
             "dtype": given.dtype}
    settings = {**asked, "policies": {name: sha256_file(model) if name in ready else identity(model)
                                      for name, model in policies.items()},
                "judge": identity(given.judge), "template": template.sha256,
                "constitutions": [question.constitution.sha256 for question in questions.values()]}
    two = source.count * len(policies) * (len(policies) - 1) // 2

    def measure(claim):
        answers = {}
        for name, model in policies.items():
            if name not in ready:
                output = claim(f"{name}.responses", {**asked, "model": identity(model)})
                responding.respond(lambda: responding.plan(source, given.seed), output,
                                   lambda model=model: classes.load(model, given.endpoints, given.loading), sampling,
                                   model)
            answers[name] = ready.get(name) or contest.answered(output.path, source)
        output = claim("comparisons", settings)
        if not output.complete:
            engine = classes.load(given.judge, given.endpoints, given.loading)
            with output, cli.progress(two - len(output.done), "compare") as bar:
                for row in contest.judged(engine, contest.pairs(answers, source), questions, output.done):
                    output.write(row)
                    bar.update()
                output.finish([one["id"] for one in contest.pairs(answers, source)], {"rows": len(output.done)})
        return contest.scores([row for _, row in read_jsonl(output.path)], list(policies))

    return Task([*given.inputs, *(model for model in policies.values() if model.endswith(".jsonl"))],
                {"rows": source.count, **kinds, "policies": len(policies), "comparisons": two,
                 "model_calls": source.count * len(models), "judge_calls": 2 * two}, settings, measure)


# --- multiple choice ----------------------------------------------------------------------------------------


def choice_task(given) -> Task:
    """Which answer a language model, or which text a reward model, picks."""
    check = choices.check_texts if given.reward_model else choices.check
    if given.reward_model:
        reward.check_reward_model(given.reward_model)
    else:
        check_model(given.model)
    source = Source([given.choice], require=choices.FIELDS, limit=given.limit, check=check)
    calls = 2 * source.count if given.reward_model else sum(len(choices.answers(row)) for row in source)
    settings = {"input": source.digest, "limit": given.limit,
                "model": identity(given.model) if given.model else None,
                "reward_model": identity(given.reward_model) if given.reward_model else None, "dtype": given.dtype,
                "choice_format": None if given.reward_model else given.choice_format}

    def measure(claim):
        return choice_figures(source, claim("choices", settings), given.model, given.reward_model,
                              given.choice_format, given.loading)

    return Task([given.choice], {"rows": source.count, "model_calls": calls}, settings, measure)


def choice_figures(source: Source, output: Output, model: str | None, reward_model: str | None, form: str,
                   loading: dict) -> tuple[dict, dict]:
    """({metric: rate}, counts) of the choices of a language model or a reward model (resumable).

    The scores of every row go to `output`; a row that is too long for the model has none, and is failed.
    """
    if not output.complete:
        with output:
            rows = (row for row in source if row["id"] not in output.done)
            if reward_model:
                scorer = reward.load_scorer(reward_model, **loading)
                read, temperature = choices.by_reward_model(rows, scorer), scorer.temperature
            else:
                read, temperature = choices.by_model(rows, load_engine(model, **loading), form), None
            with cli.progress(source.count - len(output.done), "choose") as bar:
                for row, scores in read:
                    if scores is not None:
                        output.write(choices.result(row, scores, temperature))
                    bar.update()
            output.finish(source.ids, {"rows": source.count})
    results = [row for _, row in read_jsonl(output.path)]
    if not results:
        raise CaiError(f"all {source.count} rows of {', '.join(source.inputs)} are longer than the model's context")
    rates, counts = choices.figures(results)
    return rates, {"rows": source.count, "failed": source.count - len(results), **counts}


# --- a reward model on pairs --------------------------------------------------------------------------------


def reward_task(given) -> Task:
    """How often a reward model prefers the response that is known to be better."""
    reward.check_reward_model(given.reward_model)
    files = list(given.inputs)
    source = judging.Given(files, given.limit)
    settings = {"input": source.digest, "limit": given.limit, "model": None, "seed": given.seed,
                **asdict(Sampling(given.max_new_tokens, given.temperature, given.top_p)), "dtype": given.dtype,
                "reward_model": identity(given.reward_model), "round": None, "by": given.by, "judge": None,
                "template": load_template("classify").sha256}
    return Task(files, {"rows": len(source.ids), "reward_model_calls": 2 * len(source.ids)}, settings,
                lambda claim: pair_figures(list(source), reward.load_scorer(given.reward_model, **given.loading)))


def pair_figures(rows: list[dict], scorer: reward.Scorer) -> tuple[dict, dict]:
    """({metric: figure}, counts) of a reward model on pairs with gold; pairs without gold are counted.

    A tie of the two scores is not a right answer. Beside the accuracy stand two baselines that need no model:
    always `a`, and the longer response. Log-loss and ECE are of the probabilities by the model's temperature;
    intervals count the pairs of one prompt as alike. A pair that is too long for the model is failed.
    """
    pairs = [row for row in rows if row.get("gold")]
    if not pairs:
        raise InputError(f"none of {len(rows)} pairs has a gold label", expected='gold: "a" or "b"')
    texts = [(as_messages(row["prompt"]), row[side])
             for row in pairs for side in ("response_a", "response_b")]
    both = scorer.scores(texts)
    scored = [(row, a, b) for row, a, b in zip(pairs, both[::2], both[1::2], strict=True) if None not in (a, b)]
    if not scored:
        raise CaiError(f"all {len(pairs)} pairs with a gold label are longer than the model's context")
    prompts = [prompt_text(row["prompt"]) for row, _, _ in scored]
    p_gold = [scorer.probability(a, b) if row["gold"] == "a" else scorer.probability(b, a) for row, a, b in scored]
    longer = [len(row["response_a"]) - len(row["response_b"]) for row, _, _ in scored]

    def plain(found: dict) -> dict:
        return {name: found[name] for name in ("value", "low", "high", "n")}

    def share(values: Iterable[bool]) -> dict:
        return plain(metrics.clustered_rate(list(values), prompts))

    rates = {
        "accuracy": share((a > b if row["gold"] == "a" else b > a) for row, a, b in scored),
        "baseline_longer": share((d > 0 if row["gold"] == "a" else d < 0)
                                 for d, (row, _, _) in zip(longer, scored, strict=True)),
        "baseline_always_a": share(row["gold"] == "a" for row, _, _ in scored),
        "log_loss": plain(metrics.clustered_mean([-math.log(max(p, 1e-300)) for p in p_gold], prompts)),
        "ece": metrics.calibration([max(p, 1 - p) for p in p_gold], [p > 0.5 for p in p_gold])["ece"],
        "length_correlation": metrics.correlation([a - b for _, a, b in scored], longer),
    }
    counts = {"pairs": len(pairs), "no_gold": len(rows) - len(pairs), "ties": sum(a == b for _, a, b in scored),
              "failed": len(pairs) - len(scored)}
    return rates, counts


# --- what comes out -----------------------------------------------------------------------------------------


def write_rates(output: Output, rates: dict, counts: dict) -> None:
    """Write {metric, value, low, high, n} rows."""
    with output:
        for name, measured in rates.items():
            if name not in output.done:
                output.write({"id": name, "metric": name, **measured})
        output.finish(rates, counts)


def report(output: Output, as_json: bool, before: gate.Evaluation | None, gated: bool, margin: float) -> None:
    """Print the rates as a table, or all as one JSON object; with 3 if rows failed, with 4 if a gate says worse."""
    rows = {row["metric"]: row for _, row in read_jsonl(output.path)}
    deltas = gate.compare(before, gate.load(output.path), gated=gated) if before else []
    said = gate.verdict(deltas, margin) if gated else None
    if as_json:
        rates = {name: {key: row[key] for key in row if key not in ("id", "metric")} for name, row in rows.items()}
        summary = {"metrics": rates, **output.counts, "output": str(output.path)}
        if before:
            summary["against"] = {"file": str(before.path), "verdict": said,
                                  "deltas": {one.metric: gate.as_json(one) for one in deltas}}
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        changes = {one.metric: gate.shown(one).removeprefix(f"{one.metric} ") for one in deltas}
        lines = [(name.replace("_", " "), shown(name, row), row["n"],
                  *([_spread(row)] if any("seeds" in one for one in rows.values()) else []),
                  *([changes.get(name, "–")] if before else [])) for name, row in rows.items()]
        header = ("", "value (95 % interval)", "n")
        header += (("over seeds",) if len(lines[0]) > 3 + bool(before) else ()) + (("change",) if before else ())
        click.echo(metrics.table(header, lines))
        for note in output.counts.get("notes", ()):
            click.echo(f"note: {note}")
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in output.counts.items()
                         if name != "notes")
        click.echo(f"{told}; {output.path}")
    if gated:
        click.echo(gate.line(deltas, said), err=as_json)
    if said == "worse":
        click.get_current_context().exit(WORSE)
    if output.counts.get("failed"):
        click.get_current_context().exit(cli.SOME_FAILED)


def shown(name: str, row: dict) -> str:
    """A figure in its own unit: Elo points, a number, or per cent."""
    if "_elo " in name:
        ends = ("open" if row[end] is None else f"{row[end]:+.0f}" for end in ("low", "high"))
        return f"{row['value']:+.0f} ({' to '.join(ends)})".replace("-", "−")
    return (metrics.show_number if name in NUMBERS else metrics.show)(row)


def _spread(row: dict) -> str:
    """`± 1.2 (93.0–96.0)`: standard deviation and range over the seeds, in points."""
    one = row.get("seeds")
    return f"± {100 * one['sd']:.1f} ({100 * one['lowest']:.1f}–{100 * one['highest']:.1f})" if one else ""


if __name__ == "__main__":
    main()
