"""The measurements of evaluate.py: responses, the principles of revised rows, choices, and a reward model on pairs.

    measurement = choose(options)          # the command's options by name, and reader, sampling and loading
    rates, counts = measurement.measure(claim)

Each is made without loading a model, so that bad input is refused first. Leaves out the options, and how figures are
printed: evaluate.py and measurement.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

from cai.base.errors import CaiError, InputError
from cai.base.hashing import identity
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import dialogue, kinds, outputs, preferences, rounds, sources
from cai.data.reading import AS_THEY_ARE, Reading
from cai.evaluate import benchmarks, classes, faults, habits, measurement, responding
from cai.evaluate.rates import rates_of_rows, without_clusters
from cai.models import loading, scorer
from cai.stats import calibration, intervals


def choose(options: SimpleNamespace) -> measurement.Measurement:
    """What the options ask for. InputError unless that is clear."""
    if options.choice:
        if options.inputs or options.responses or bool(options.model) == bool(options.reward_model):
            raise InputError(
                "--choice is not clear", expected="--choice FILE with --model or --reward-model, and no other input"
            )
        return measure_choices(options)
    sources = [bool(options.responses), bool(options.reward_model), bool(options.model)]
    if sources.count(True) != 1 or bool(options.inputs) == bool(options.responses):
        raise InputError(
            "what to measure is not clear",
            expected="--input with --model, --responses, --input with --reward-model, or --choice with a model",
        )
    for option, value, needed, remedy in (
        ("--faults", options.faults, "--responses", "Give rows of revise.py"),
        ("--round", options.round_ is not None, "--responses", "A round is picked from revised rows"),
        ("--drift-from", options.drift_from, "--model", "Name the policy that answers"),
    ):
        if value and not getattr(options, needed[2:]):
            raise InputError(f"{option} without {needed}", remedy=remedy)
    if options.reward_model:
        return measure_pairs(options)
    return measure_principles(options) if options.faults else measure_responses(options)


# --- classes of responses -----------------------------------------------------------------------------------


def measure_responses(options: SimpleNamespace) -> measurement.Measurement:
    """What the responses of a model, or those of a file, do."""
    if options.responses and (options.seeds > 1 or options.stress):
        raise InputError("--seeds or --stress with --responses", remedy="They ask a model: give --input and --model")
    reader, model = options.reader, options.model
    reader.check()
    for name in filter(None, (model, options.drift_from)):
        loading.check_model(loading.split_endpoint(name)[0])
    ways = responding.WAYS if "all" in options.stress else tuple(w for w in responding.WAYS if w in options.stress)
    files = [*options.inputs, *options.responses]
    source, by_kind = read_rows(
        files, options.limit, reader.check_row, answered=not model, round_=options.round_, reading=options.reading
    )
    under_stress = [source.count if way in responding.ALL_KINDS else by_kind["harmful"] for way in ways]
    calls = options.seeds * (source.count + sum(under_stress))
    responding_settings, settings = _settings(options, source, ways)

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        rows = source
        if model:
            answers = responding.plan(source, options.seed, options.seeds, ways)
            rows = responding.respond(answers, claim("responses", responding_settings), model, options)
        # A file's responses may hold the end token that a server did not take out.
        rows = [
            {**row, "response": dialogue.cut_at_end_token(rounds.text_of_round(row, options.round_))} for row in rows
        ]
        classified = reader.write_classes(rows, claim("classes", settings))
        rates, counts = rates_of_classes(classified, calls if model else source.count)
        if reader.by == "phrases":
            counts["notes"] = [classes.PHRASES_NOTE]
        if options.drift_from:
            harmless = [row for row in rows if row["kind"] != "harmful" and not row.get("stress")]
            policy, base = (loading.load_named_engine(m, (), options.loading) for m in (model, options.drift_from))
            rates |= habits.drift(policy, base, harmless)
        return rates, counts

    return measurement.Measurement(
        files,
        {
            "rows": source.count,
            **by_kind,
            "model_calls": calls if model else 0,
            "new_tokens_at_most": calls * options.max_new_tokens if model else 0,
            "judge_calls": calls if reader.judge else 0,
        },
        settings,
        measure,
    )


def _settings(options: SimpleNamespace, source: sources.Source, ways: Sequence[str]) -> tuple[dict, dict]:
    """(what decides the responses of a model, what decides their classes as well)."""
    reader = options.reader
    responding_settings = {
        "input": source.digest,
        "limit": options.limit,
        "model": identity(options.model) if options.model else None,
        "seed": options.seed,
        **({"seeds": options.seeds} if options.seeds > 1 else {}),
        **({"stress": ways, "stress_templates": responding.digest(ways)} if ways else {}),
        **asdict(options.sampling),
        "dtype": options.dtype,
    }
    return responding_settings, {
        **responding_settings,
        "reward_model": None,
        "round": options.round_,
        "by": reader.by,
        "judge": identity(reader.judge) if reader.judge else None,
        "template": load_template("classify").sha256,
        **({"classifier": identity(reader.classifier)} if reader.classifier else {}),
        **({"unsafe_label": reader.unsafe_labels} if reader.classifier else {}),
        **({"drift_from": identity(options.drift_from)} if options.drift_from else {}),
    }


def read_rows(
    files,
    limit: int | None,
    check_row,
    *,
    answered: bool = False,
    round_: int | None = None,
    reading: Reading = AS_THEY_ARE,
) -> tuple[sources.Source, dict[str, int]]:
    """(the rows, how many of each kind). InputError with file and line for one that can't be measured.

    Args:
        check_row: called with (row, file, line), such as `Reader.check_row`.
        answered: the rows have responses, and complete rounds if any. round_: they have as many as this.
    """
    counts = dict.fromkeys(kinds.KINDS, 0)

    def check(row: dict, where: str, line: int) -> None:
        check_row(row, where, line)
        if answered:
            rounds.check_rounds(row, where, line, critiqued=False)
            revisions = len(row.get("rounds") or ())
            if round_ is not None and round_ > revisions and not rounds.is_content(row):
                raise InputError(
                    f"no round {round_}, only {revisions}", where=where, line=line, remedy="Choose another --round"
                )
        counts[row["kind"]] += 1

    fields = ("prompt", "kind", "response") if answered else ("prompt", "kind")
    return sources.Source(files, require=fields, limit=limit, check=check, reading=reading), counts


def rates_of_classes(classified: Iterable[dict], rows: int) -> tuple[dict, dict]:
    """({metric: rate}, counts) of classified rows. A row without a class is failed, and in no rate."""
    known = [row for row in classified if row["class"] is not None]
    remedy = "take a larger judge, or read some rows of the classes file"
    mass = classes.mean_letter_mass((row.get("letter_mass") for row in known), remedy)
    counts = {"rows": rows, "failed": rows - len(known)}
    return rates_of_rows(known), counts if mass is None else {**counts, "mean_letter_mass": mass}


# --- the principles of revised rows -------------------------------------------------------------------------


def measure_principles(options: SimpleNamespace) -> measurement.Measurement:
    """What each principle did in revised rows; before and after where they have a kind and somebody reads them."""
    by, judge, constitution = options.by, options.judge, load_constitution(options.constitution)
    if judge:
        loading.check_model(loading.split_endpoint(judge)[0])
    # Beside the oracle, the judge reads critiques only.
    reader = replace(options.reader, by=by, judge=judge if by == "judge" else None)
    check, fields = partial(rounds.check_rounds, critiqued=False), ("prompt", "response", "rounds")
    source = sources.Source(
        options.responses, require=fields, limit=options.limit, check=check, reading=options.reading
    )
    critiques = sum(1 for _ in faults.critiques(source))
    is_read = by == "oracle" or bool(judge)
    has_kinds = is_read and all(row.get("kind") in kinds.KINDS for row in source)
    if has_kinds:
        for number, row in enumerate(source, 1):
            reader.check_row(row, ", ".join(options.responses), number)
    settings = {
        "input": source.digest,
        "limit": options.limit,
        "by": by if is_read else None,
        "judge": identity(judge) if judge else None,
        "constitution": constitution.sha256,
        "template": load_template("classify_critique").sha256,
        "dtype": options.dtype,
    }

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        classified, rows = [], list(faults.critiques(source))
        if has_kinds:
            output = claim("classes", settings | {"template": load_template("classify").sha256})
            classified = reader.write_classes(faults.steps(source), output)
        if judge:
            output = claim("faults", settings)
            find = partial(faults.find_faults, rows=rows, done=output.done)
            rows = measurement.fill(
                output, [row["id"] for row in rows], "read critiques", options.reader.load_judge, find
            )
        class_of = {row["id"]: row["class"] for row in classified}
        return faults.figures(rows, class_of, {row["id"]: row.get("kind") for row in source}, constitution)

    plan = {"rows": source.count, "critiques": critiques, "judge_calls": 3 * critiques + source.count if judge else 0}
    return measurement.Measurement(list(options.responses), plan, settings, measure)


# --- multiple choice ----------------------------------------------------------------------------------------


def measure_choices(options: SimpleNamespace) -> measurement.Measurement:
    """Which answer a language model, or which text a reward model, chooses."""
    model, reward_model = options.model, options.reward_model
    if reward_model:
        scorer.check_reward_model(reward_model)
        load = partial(scorer.load_scorer, reward_model, **options.loading)
    else:
        loading.check_model(model)
        load = partial(loading.load_engine, model, **options.loading)
    check = benchmarks.check_texts if reward_model else benchmarks.check
    source = sources.Source(
        [options.choice], require=benchmarks.FIELDS, limit=options.limit, check=check, reading=options.reading
    )
    settings = {
        "input": source.digest,
        "limit": options.limit,
        "model": identity(model) if model else None,
        "reward_model": identity(reward_model) if reward_model else None,
        "dtype": options.dtype,
        "choice_format": None if reward_model else options.choice_format,
    }

    def score(engine, output: outputs.Output) -> Iterator[dict | None]:
        """The scores of every row's answers; None for a row that is too long for the model."""
        rows = (row for row in source if row["id"] not in output.done)
        form, temperature = options.choice_format, getattr(engine, "temperature", None)  # of a reward model
        scored = benchmarks.by_reward_model(rows, engine) if temperature else benchmarks.by_model(rows, engine, form)
        for row, scores in scored:
            yield None if scores is None else benchmarks.result(row, scores, temperature)

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        output = claim("choices", settings)
        results = measurement.fill(output, source.ids, "choose", load, lambda engine: score(engine, output))
        if not results:
            raise CaiError(f"all {source.count} rows of {options.choice} are longer than the model's context")
        rates, counts = benchmarks.figures(results)
        return rates, {"rows": source.count, "failed": source.count - len(results), **counts}

    calls = 2 * source.count if reward_model else sum(len(benchmarks.answers(row)) for row in source)
    return measurement.Measurement([options.choice], {"rows": source.count, "model_calls": calls}, settings, measure)


# --- a reward model on pairs --------------------------------------------------------------------------------


def measure_pairs(options: SimpleNamespace) -> measurement.Measurement:
    """How often a reward model prefers the response that is known to be better."""
    scorer.check_reward_model(options.reward_model)
    files = list(options.inputs)
    source = preferences.GivenPairs(files, options.limit, options.reading)
    settings = {
        "input": source.digest,
        "limit": options.limit,
        "model": None,
        "seed": options.seed,
        **asdict(options.sampling),
        "dtype": options.dtype,
        "reward_model": identity(options.reward_model),
        "round": None,
        "by": options.by,
        "judge": None,
        "template": load_template("classify").sha256,
    }

    return measurement.Measurement(
        files,
        {"rows": len(source.ids), "reward_model_calls": 2 * len(source.ids)},
        settings,
        lambda _claim: pair_figures(list(source), scorer.load_scorer(options.reward_model, **options.loading)),
    )


def pair_figures(rows: list[dict], reward_model: scorer.Scorer) -> tuple[dict, dict]:
    """({metric: figure}, counts) of a reward model on pairs with gold; pairs without gold are counted.

    A tie of the two scores is not a right answer. Beside the accuracy stand two baselines that need no model:
    always `a`, and the longer response. Log-loss and ECE are of the probabilities by the model's temperature;
    intervals count the pairs of one prompt as alike. A pair that is too long for the model is failed.
    """
    pairs = [row for row in rows if row.get("gold")]
    if not pairs:
        raise InputError(f"none of {len(rows)} pairs has a gold label", expected='gold: "a" or "b"')
    texts = [(dialogue.as_messages(row["prompt"]), row[side]) for row in pairs for side in ("response_a", "response_b")]
    scores = reward_model.scores(texts)
    scored = [(row, a, b) for row, a, b in zip(pairs, scores[::2], scores[1::2], strict=True) if None not in (a, b)]
    if not scored:
        raise CaiError(f"all {len(pairs)} pairs with a gold label are longer than the model's context")
    prompts = [dialogue.prompt_text(row["prompt"]) for row, _, _ in scored]
    signs = [1 if row["gold"] == "a" else -1 for row, _, _ in scored]
    margins = [a - b for _, a, b in scored]
    lengths = [len(row["response_a"]) - len(row["response_b"]) for row, _, _ in scored]
    log_odds = [sign * margin / reward_model.temperature for sign, margin in zip(signs, margins, strict=True)]
    losses = [calibration.soft_loss(d, 1.0) for d in log_odds]

    def share(differences: Iterable[float]) -> dict:
        """The rate of pairs in which the difference is for the better side."""
        is_right = [sign * difference > 0 for sign, difference in zip(signs, differences, strict=True)]
        return without_clusters(intervals.clustered_rate(is_right, prompts))

    rates = {
        "accuracy": share(margins),
        "baseline_longer": share(lengths),
        "baseline_always_a": share([1] * len(scored)),
        "log_loss": without_clusters(intervals.clustered_mean(losses, prompts)),
        "ece": calibration.calibrate_margins(log_odds, [1.0] * len(scored))["ece"],
        "length_correlation": intervals.correlation(margins, lengths),
    }
    counts = {
        "pairs": len(pairs),
        "no_gold": len(rows) - len(pairs),
        "ties": margins.count(0),
        "failed": len(pairs) - len(scored),
    }
    return rates, counts
