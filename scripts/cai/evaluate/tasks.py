"""The tasks of evaluate.py: what each way of measuring reads, plans, and makes.

    task = pick(given)(given)          # given: the command's options by name
    rates, counts = task.measure(claim)

A task is made without loading a model, so that bad input is refused first. Leaves out the options, and how figures are
shown: evaluate.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.hashing import identity, sha256_file
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import preferences, rounds
from cai.data.dialogue import as_messages, prompt_text
from cai.data.kinds import KINDS
from cai.data.outputs import Output
from cai.data.public_sets import PublicSource
from cai.data.readers import read_jsonl
from cai.data.rounds import check_rounds
from cai.data.sources import Source
from cai.evaluate import benchmarks, classes, contest, faults, habits, responding
from cai.evaluate.rates import rates_of_rows
from cai.models import guards
from cai.models.engine import Sampling
from cai.models.loading import check_model, load_engine, load_named_engine, split_endpoint
from cai.models.local import fast_path
from cai.models.scorer import Scorer, check_reward_model, load_scorer
from cai.report import paper
from cai.stats import calibration, intervals
from cai.steps import judging


@dataclass
class Task:
    """What is to be measured. `plan`: what --dry-run says; `settings`: all that decides the figures; `measure`: makes
    ({metric: figure}, counts), given what claims a file of rows beside the output: claim(ending, settings)."""

    files: list[str]
    plan: dict
    settings: dict
    measure: Callable[[Callable[[str, dict], Output]], tuple[dict, dict]]


def pick(given) -> Callable[..., Task]:
    """What is to be measured; InputError unless that is clear."""
    if given.figure:
        if not given.run or given.inputs or given.responses or given.model or given.choice or given.policy:
            raise InputError("--figure is not clear", expected="--figure N with --run FOLDER, and no other input")
        return figure_task
    if given.run:
        raise InputError("--run without --figure N", remedy="Say which figure to make of it")
    if given.choice:
        if given.inputs or given.responses or bool(given.model) == bool(given.reward_model):
            raise InputError(
                "--choice is not clear", expected="--choice FILE with --model or --reward-model, and no other input"
            )
        return choice_task
    asked = [bool(given.responses), bool(given.reward_model), bool(given.model), bool(given.policy)]
    if asked.count(True) != 1 or bool(given.inputs) == bool(given.responses):
        raise InputError(
            "what to measure is not clear",
            expected="--input with --model, --responses, --input with --reward-model or several --policy, or --choice "
            "with a model",
        )
    if given.faults and not given.responses:
        raise InputError("--faults without --responses", remedy="Give rows of revise.py")
    if given.drift_from and not given.model:
        raise InputError("--drift-from without --model", remedy="Name the policy that answers")
    return (
        contest_task
        if given.policy
        else reward_task
        if given.reward_model
        else faults_task
        if given.faults
        else class_task
    )


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
        check_model(split_endpoint(given.model)[0])
    ways = responding.WAYS if "all" in given.stress else tuple(way for way in responding.WAYS if way in given.stress)
    files = [*given.inputs, *given.responses]
    source, kinds = read_rows(files, given.limit, by, given.round_, answered=bool(given.responses), form=given.form)
    calls = given.seeds * (
        source.count + sum(kinds["harmful"] if way not in responding.ALL_KINDS else source.count for way in ways)
    )
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p)
    asked = {
        "input": source.digest,
        "limit": given.limit,
        "model": identity(given.model) if given.model else None,
        "seed": given.seed,
        **({"seeds": given.seeds} if given.seeds > 1 else {}),
        **({"stress": ways, "stress_templates": responding.digest(ways)} if ways else {}),
        **asdict(sampling),
        "dtype": given.dtype,
    }
    if given.form:
        asked["set"] = given.form
    settings = {
        **asked,
        "reward_model": None,
        "round": given.round_,
        "by": by,
        "judge": identity(given.judge) if given.judge else None,
        "template": load_template("classify").sha256,
    }
    if given.drift_from:
        check_model(given.drift_from)
        settings["drift_from"] = identity(given.drift_from)
    if given.classifier:
        settings |= {"classifier": identity(given.classifier), "unsafe_label": given.unsafe_label}

    def measure(claim):
        rows = source
        if given.model:
            answered = claim("responses", asked)
            responding.respond(
                lambda: responding.plan(source, given.seed, given.seeds, ways),
                answered,
                lambda: load_named_engine(given.model, given.endpoints, given.loading),
                sampling,
                given.model,
            )
            rows = Source([answered.path], require=("prompt", "kind", "response"))
        read = claim("classes", settings)
        texts = (
            {**row, "response": rounds.text_of_round(row, given.round_)} for row in rows if row["id"] not in read.done
        )
        classify(texts, rows.ids, read, by, given, given.judge)
        rates, counts = class_figures(read.path, calls if given.model else source.count)
        if given.drift_from:
            harmless = [row for row in rows if row["kind"] != "harmful" and not row.get("stress")]
            engines = (load_named_engine(name, (), given.loading) for name in (given.model, given.drift_from))
            rates |= habits.drift(*engines, harmless)
        return rates, counts

    return Task(
        files,
        {
            "rows": source.count,
            **kinds,
            "model_calls": calls if given.model else 0,
            "new_tokens_at_most": calls * given.max_new_tokens if given.model else 0,
            "judge_calls": calls if given.judge else 0,
        },
        settings,
        measure,
    )


def read_rows(
    files, limit, by: str, round_: int | None, *, answered: bool, form: str | None
) -> tuple[Source, dict[str, int]]:
    """(the rows, how many of each kind). InputError with file and line for one that can't be measured."""
    kinds = dict.fromkeys(KINDS, 0)

    def check(row, where, line):
        classes.check_kind(row, where, line)
        if by == "oracle":
            classes.check_oracle(row, where, line)
        if answered:
            check_rounds(row, where, line, critiqued=False)
            if round_ is not None and round_ > len(row.get("rounds") or ()):
                raise InputError(
                    f"no round {round_}, only {len(row.get('rounds') or ())}",
                    where=where,
                    line=line,
                    remedy="Pick another --round",
                )
        kinds[row["kind"]] += 1

    fields = ("prompt", "kind", "response") if answered else ("prompt", "kind")
    return PublicSource(files, form=form, require=fields, limit=limit, check=check), kinds


def classify(rows: Iterable[dict], ids: list[str], output: Output, by: str, given, judge: str | None) -> None:
    """Write {id, kind, prompt, response, class} of every row (resumable). An unreadable class is null."""
    if output.complete:
        return
    kept = ("id", "kind", "prompt", "response", "prompt_id", "seed", "stress", "gold")
    with output, cli.progress(len(ids) - len(output.done), "classify") as bar:
        read, engine = readings(rows, by, given, judge)
        for row, found in read:
            output.write({name: row[name] for name in kept if row.get(name) is not None} | found)
            bar.update()
        output.finish(ids, {"rows": len(ids)}, **fast_path(engine))


def readings(rows: Iterable[dict], by: str, given, judge: str | None) -> tuple[Iterable[tuple[dict, dict]], object]:
    """(each row with its class, the engine that reads or None); by the oracle with a judge, also `class_by_judge`."""
    if by == "classifier":
        reader = guards.safety_reader(given.classifier, given.unsafe_label, **given.loading)
        return reader(rows), getattr(reader, "engine", None)
    if by == "oracle" and not judge:
        return classes.by_oracle(rows), None
    engine = load_named_engine(judge, given.endpoints, given.loading)
    read = classes.by_judge(rows, engine)
    if by == "judge":
        return read, engine
    both = (
        (row, {**true, "class_by_judge": found["class"], "letter_mass": found["letter_mass"]})
        for row, found in read
        for _, true in classes.by_oracle([row])
    )
    return both, engine


def class_figures(path: str | Path, rows: int) -> tuple[dict, dict]:
    """({metric: rate}, counts) from the rows of `classify`. What has no class is failed, and in no rate."""
    read = [row for _, row in read_jsonl(path)]
    known = [row for row in read if row["class"] is not None]
    masses = [row["letter_mass"] for row in known if row.get("letter_mass") is not None]
    counts = {"rows": rows, "failed": rows - len(known)}
    if masses:
        mass = counts["mean_letter_mass"] = round(intervals.mean(masses)["value"], 4)
        if mass < 0.5:
            cli.warn(
                f"the judge would rather not answer with a letter (they have {mass:.0%} of its "
                "probability): take a larger judge, or read some rows of the classes file"
            )
    return rates_of_rows(known), counts


def faults_task(given) -> Task:
    """What each principle did in revised rows; before and after where they have a kind and somebody reads them."""
    if given.judge:
        check_model(split_endpoint(given.judge)[0])
    constitution = load_constitution(given.constitution)

    def check(row, where, line):
        check_rounds(row, where, line, critiqued=False)

    source = Source(given.responses, require=("prompt", "response", "rounds"), limit=given.limit, check=check)
    steps = sum(len(row["rounds"]) for row in source)
    reads = given.by == "oracle" or bool(given.judge)
    sorted_ = reads and all(row.get("kind") in KINDS for row in source)
    if sorted_ and given.by == "oracle":
        for number, row in enumerate(source, 1):
            classes.check_oracle(row, ", ".join(given.responses), number)
    settings = {
        "input": source.digest,
        "limit": given.limit,
        "by": given.by if reads else None,
        "judge": identity(given.judge) if given.judge else None,
        "constitution": constitution.sha256,
        "template": load_template("classify_critique").sha256,
        "dtype": given.dtype,
    }

    def measure(claim):
        class_of, critiqued = {}, faults.critiques(source)
        if sorted_:
            read = claim("classes", {**settings, "template": load_template("classify").sha256})
            texts = list(faults.steps(source))
            left = (row for row in texts if row["id"] not in read.done)
            classify(
                left, [row["id"] for row in texts], read, given.by, given, given.judge if given.by == "judge" else None
            )
            class_of = {row["id"]: row["class"] for _, row in read_jsonl(read.path)}
        if given.judge:
            output = claim("faults", settings)
            if not output.complete:
                engine = load_named_engine(given.judge, given.endpoints, given.loading)
                left = [row for row in critiqued if row["id"] not in output.done]
                with output, cli.progress(len(left), "read critiques") as bar:
                    for row in faults.found(engine, left):
                        output.write(row)
                        bar.update()
                    output.finish([row["id"] for row in faults.critiques(source)], {"rows": steps}, **fast_path(engine))
            critiqued = [row for _, row in read_jsonl(output.path)]
        return faults.figures(critiqued, class_of, {row["id"]: row.get("kind") for row in source}, constitution)

    return Task(
        list(given.responses),
        {"rows": source.count, "critiques": steps, "judge_calls": (2 * steps + source.count) if given.judge else 0},
        settings,
        measure,
    )


# --- policies against each other ----------------------------------------------------------------------------


def contest_task(given) -> Task:
    """Every policy against every other, judged on harmlessness and on helpfulness."""
    policies = contest.policies(given.policy)
    if not given.judge:
        raise InputError("--policy without --judge MODEL", remedy="Name the judge, best none of the policies")
    check_model(split_endpoint(given.judge)[0])
    source, kinds = read_rows(given.inputs, given.limit, "judge", None, answered=False, form=given.form)
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p)
    template, written = load_template("preference"), load_template("preference_answer")
    questions = {
        axis: judging.Question(load_constitution(name), template, seed=given.seed, written=written)
        for axis, name in zip(contest.AXES, (given.constitution, given.helpfulness), strict=True)
    }
    ready = {name: contest.answered(model, source) for name, model in policies.items() if model.endswith(".jsonl")}
    models = {name: model for name, model in policies.items() if name not in ready}
    asked = {"input": source.digest, "limit": given.limit, "seed": given.seed, **asdict(sampling), "dtype": given.dtype}
    settings = {
        **asked,
        "policies": {
            name: sha256_file(model) if name in ready else identity(model) for name, model in policies.items()
        },
        "judge": identity(given.judge),
        "template": template.sha256,
        "constitutions": [question.constitution.sha256 for question in questions.values()],
    }
    two = source.count * len(policies) * (len(policies) - 1) // 2

    def measure(claim):
        answers = {}
        for name, model in policies.items():
            if name not in ready:
                output = claim(f"{name}.responses", {**asked, "model": identity(model)})
                responding.respond(
                    lambda: responding.plan(source, given.seed),
                    output,
                    lambda model=model: load_named_engine(model, given.endpoints, given.loading),
                    sampling,
                    model,
                )
            answers[name] = ready.get(name) or contest.answered(output.path, source)
        output = claim("comparisons", settings)
        if not output.complete:
            engine = load_named_engine(given.judge, given.endpoints, given.loading)
            with output, cli.progress(two - len(output.done), "compare") as bar:
                for row in contest.judged(engine, contest.pairs(answers, source), questions, output.done):
                    output.write(row)
                    bar.update()
                output.finish(
                    [one["id"] for one in contest.pairs(answers, source)],
                    {"rows": len(output.done)},
                    **fast_path(engine),
                )
        return contest.scores([row for _, row in read_jsonl(output.path)], list(policies))

    return Task(
        [*given.inputs, *(model for model in policies.values() if model.endswith(".jsonl"))],
        {
            "rows": source.count,
            **kinds,
            "policies": len(policies),
            "comparisons": two,
            "model_calls": source.count * len(models),
            "judge_calls": 2 * two,
        },
        settings,
        measure,
    )


# --- multiple choice ----------------------------------------------------------------------------------------


def choice_task(given) -> Task:
    """Which answer a language model, or which text a reward model, picks."""
    check = benchmarks.check_texts if given.reward_model else benchmarks.check
    if given.reward_model:
        check_reward_model(given.reward_model)
    else:
        check_model(given.model)
    source = Source([given.choice], require=benchmarks.FIELDS, limit=given.limit, check=check)
    calls = 2 * source.count if given.reward_model else sum(len(benchmarks.answers(row)) for row in source)
    settings = {
        "input": source.digest,
        "limit": given.limit,
        "model": identity(given.model) if given.model else None,
        "reward_model": identity(given.reward_model) if given.reward_model else None,
        "dtype": given.dtype,
        "choice_format": None if given.reward_model else given.choice_format,
    }

    def measure(claim):
        return choice_figures(
            source, claim("choices", settings), given.model, given.reward_model, given.choice_format, given.loading
        )

    return Task([given.choice], {"rows": source.count, "model_calls": calls}, settings, measure)


def choice_figures(
    source: Source, output: Output, model: str | None, reward_model: str | None, form: str, loading: dict
) -> tuple[dict, dict]:
    """({metric: rate}, counts) of the choices of a language model or a reward model (resumable).

    The scores of every row go to `output`; a row that is too long for the model has none, and is failed.
    """
    if not output.complete:
        with output:
            rows = (row for row in source if row["id"] not in output.done)
            if reward_model:
                engine, scorer = None, load_scorer(reward_model, **loading)
                read, temperature = benchmarks.by_reward_model(rows, scorer), scorer.temperature
            else:
                engine = load_engine(model, **loading)
                read, temperature = benchmarks.by_model(rows, engine, form), None
            with cli.progress(source.count - len(output.done), "choose") as bar:
                for row, scores in read:
                    if scores is not None:
                        output.write(benchmarks.result(row, scores, temperature))
                    bar.update()
            output.finish(source.ids, {"rows": source.count}, **fast_path(engine))
    results = [row for _, row in read_jsonl(output.path)]
    if not results:
        raise CaiError(f"all {source.count} rows of {', '.join(source.inputs)} are longer than the model's context")
    rates, counts = benchmarks.figures(results)
    return rates, {"rows": source.count, "failed": source.count - len(results), **counts}


# --- a reward model on pairs --------------------------------------------------------------------------------


def reward_task(given) -> Task:
    """How often a reward model prefers the response that is known to be better."""
    check_reward_model(given.reward_model)
    files = list(given.inputs)
    source = preferences.GivenPairs(files, given.limit)
    settings = {
        "input": source.digest,
        "limit": given.limit,
        "model": None,
        "seed": given.seed,
        **asdict(Sampling(given.max_new_tokens, given.temperature, given.top_p)),
        "dtype": given.dtype,
        "reward_model": identity(given.reward_model),
        "round": None,
        "by": given.by,
        "judge": None,
        "template": load_template("classify").sha256,
    }
    return Task(
        files,
        {"rows": len(source.ids), "reward_model_calls": 2 * len(source.ids)},
        settings,
        lambda claim: pair_figures(list(source), load_scorer(given.reward_model, **given.loading)),
    )


def pair_figures(rows: list[dict], scorer: Scorer) -> tuple[dict, dict]:
    """({metric: figure}, counts) of a reward model on pairs with gold; pairs without gold are counted.

    A tie of the two scores is not a right answer. Beside the accuracy stand two baselines that need no model:
    always `a`, and the longer response. Log-loss and ECE are of the probabilities by the model's temperature;
    intervals count the pairs of one prompt as alike. A pair that is too long for the model is failed.
    """
    pairs = [row for row in rows if row.get("gold")]
    if not pairs:
        raise InputError(f"none of {len(rows)} pairs has a gold label", expected='gold: "a" or "b"')
    texts = [(as_messages(row["prompt"]), row[side]) for row in pairs for side in ("response_a", "response_b")]
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
        return plain(intervals.clustered_rate(list(values), prompts))

    rates = {
        "accuracy": share((a > b if row["gold"] == "a" else b > a) for row, a, b in scored),
        "baseline_longer": share(
            (d > 0 if row["gold"] == "a" else d < 0) for d, (row, _, _) in zip(longer, scored, strict=True)
        ),
        "baseline_always_a": share(row["gold"] == "a" for row, _, _ in scored),
        "log_loss": plain(intervals.clustered_mean([-math.log(max(p, 1e-300)) for p in p_gold], prompts)),
        "ece": calibration.calibration([max(p, 1 - p) for p in p_gold], [p > 0.5 for p in p_gold])["ece"],
        "length_correlation": intervals.correlation([a - b for _, a, b in scored], longer),
    }
    counts = {
        "pairs": len(pairs),
        "no_gold": len(rows) - len(pairs),
        "ties": sum(a == b for _, a, b in scored),
        "failed": len(pairs) - len(scored),
    }
    return rates, counts


# --- figures of the paper -----------------------------------------------------------------------------------


def figure_task(given) -> Task:
    """The points of one of the paper's figures, from run folders."""
    settings, make = paper.FIGURES[given.figure].points(given.run, given)

    def measure(claim):
        rows = make()
        return {paper.name_of(row): row for row in rows}, {"points": len(rows)}

    return Task([], {"figure": given.figure, "runs": len(given.run)}, {"figure": given.figure, **settings}, measure)
