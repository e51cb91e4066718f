"""The measurements of evaluate.py: responses, the principles of revised rows, choices, and pairs.

    measurement = choose(options)          # the command's options by name, and reader, sampling and loading
    rates, counts = measurement.measure(claim)

Each is made without loading a model, so that bad input is refused first. Leaves out the options, and how figures are
printed: evaluate.py and measurement.py.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

from cai.base.engine_options import engine_choice
from cai.base.errors import CaiError, InputError, shorten
from cai.base.hashing import identity
from cai.constitution.files import load_constitution
from cai.constitution.frames import Frame, load_frames
from cai.constitution.templates import load_template
from cai.data import dialogue, kinds, outputs, preferences, rounds, sources
from cai.data.reading import AS_THEY_ARE, Reading
from cai.data.selection import check_revised
from cai.evaluate import benchmarks, classes, faults, framed, habits, measurement, pairs, qualification, responding
from cai.evaluate.rates import rates_of_rows, without_clusters
from cai.models import loading, scorer
from cai.stats import calibration, intervals, refusals


def choose(options: SimpleNamespace) -> measurement.Measurement:
    """What the options ask for. InputError unless that is clear."""
    if options.frames and not (options.inputs and options.model):
        raise InputError("--frames without prompts to ask", expected="--input and --model", remedy="Leave it out")
    others = [options.inputs, options.responses, options.reward_model, options.choice]
    if options.pairs:
        if any(others) or not options.model:
            raise InputError(
                "--pairs is not clear",
                expected="--pairs FILE with --model, and no other input",
                remedy="For a reward model give --input FILE",
            )
        return measure_preference(options)
    for option, value in (("--reference", options.reference), ("--samples", options.samples is not None)):
        if value:
            raise InputError(f"{option} without --pairs", remedy="Give --pairs FILE")
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
        ("--every-round", options.every_round, "--responses", "Give rows of revise.py"),
        ("--drift-from", options.drift_from, "--model", "Name the policy that answers"),
    ):
        if value and not getattr(options, needed[2:]):
            raise InputError(f"{option} without {needed}", remedy=remedy)
    if options.reward_model:
        return measure_pairs(options)
    if options.every_round:
        return measure_rounds(options)
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
    frames = _read_frames(options, source)
    calls = options.seeds * (source.count + sum(under_stress) + sum(map(len, frames.values())))
    responding_settings, settings = _settings(options, source, ways)

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        is_fit = qualify_reader(reader)
        rows = source
        if model:
            answers = responding.plan(source, options.seed, options.seeds, ways, frames)
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
            plain = (row for row in rows if not row.get("stress") and not framed.is_framed(row))
            harmless = [row for row in plain if row["kind"] != "harmful"]
            models = (model, options.drift_from)
            policy, base = (loading.load_named_engine(m, (), options.loading, in_process=True) for m in models)
            rates |= habits.drift(policy, base, harmless)
        return rates if is_fit else {name: {**rate, "unqualified": True} for name, rate in rates.items()}, counts

    return measurement.Measurement(
        files,
        {
            "rows": source.count,
            **by_kind,
            "model_calls": calls if model else 0,
            "new_tokens_at_most": calls * options.max_new_tokens if model else 0,
            "judge_calls": calls * reader.orders if reader.judge else 0,
            **(responding.conversations_in_frames(responding.plan(source, 0, frames=frames)) if frames else {}),
        },
        settings,
        measure,
    )


def qualify_reader(reader: classes.Reader) -> bool:
    """Whether the reader is fit, or nothing is known of it: the judge is measured if it reads alone."""
    if reader.by != "judge":
        return True
    name, servers = loading.split_endpoint(reader.judge, reader.endpoints)
    task, dtype = qualification.Task("reader", orders=reader.orders), reader.loading["dtype"]
    result = qualification.report(name, task, reader.load_judge, endpoints=servers, dtype=dtype)
    return result is None or result["fit"]


def _read_frames(options: SimpleNamespace, source: sources.Source) -> dict[str, list[Frame]]:
    """{prompt id: the frames of --frames that it is asked in}; {} without. InputError for a row that has a frame."""
    if not options.frames:
        return {}
    if row := next((row for row in source if row.get("frame") is not None or row.get("prefill") is not None), None):
        raise InputError(f"row {shorten(row['id'])!r} has a frame already", where="--frames", expected="plain prompts")
    frames = load_frames(options.frames).of_split(options.frame_split)
    return framed.assign(((row["id"], row["kind"]) for row in source), frames, options.frame_prompts)


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
        **(
            {
                "frames": load_frames(options.frames).sha256,
                "frame_split": options.frame_split,
                "frame_prompts": options.frame_prompts,
            }
            if options.frames
            else {}
        ),
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
        **({"orders": reader.orders} if reader.judge else {}),
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
    classified = list(classified)
    known = [row for row in classified if row["class"] is not None]
    remedy = "take a larger judge, or read some rows of the classes file"
    counts = {"rows": rows, "failed": rows - len(known), **classes.letter_figures(classified, remedy)}
    return rates_of_rows(known), counts


# --- the rounds of revised rows -----------------------------------------------------------------------------


def measure_rounds(options: SimpleNamespace) -> measurement.Measurement:
    """Flags and refusals of revised rows round by round, by their phrases: no model is needed."""
    if options.reader.by != "phrases" or options.reader.judge or options.faults or options.round_ is not None:
        raise InputError(
            "--every-round is not clear",
            expected="--by phrases, and no --judge, --faults or --round",
            remedy="To have a judge read one round, give --round N instead",
        )

    def check(row: dict, where: str, line: int) -> None:
        options.reader.check_row(row, where, line)
        check_revised(row, where, line)

    fields = ("prompt", "kind", "response", "rounds")
    source = sources.Source(
        options.responses, require=fields, limit=options.limit, check=check, reading=options.reading
    )
    settings = {"input": source.digest, "limit": options.limit, "by": "phrases", "every_round": True}
    return measurement.Measurement(
        list(options.responses),
        {"rows": source.count, "model_calls": 0},
        settings,
        lambda _claim: round_figures(list(source)),
    )


def round_figures(rows: Sequence[dict]) -> tuple[dict, dict]:
    """({`round_<n>_<figure>`: rate}, counts) of revised rows; round 0 is the first response.

    Figures: `flag_<flag>` and `skipped_<reason>`, the share of the round's rows; and for each kind of prompt
    `<kind>_declined` and `<kind>_partly_declined`, told by phrases. The counts of every round are exact.
    """
    rates, rounds_ = {}, {}
    for number in range(1 + max(len(row["rounds"]) for row in rows)):
        having = [row for row in rows if len(row["rounds"]) >= number]
        entries = [row["rounds"][number - 1] for row in having] if number else []
        flags = Counter(flag for entry in entries for flag in entry.get("flags", ()))
        skipped = Counter(entry["skipped"] for entry in entries if "skipped" in entry)
        rounds_[f"round {number}"] = {"rows": len(having), "flags": dict(flags), "skipped": dict(skipped)}
        figures = {f"flag_{flag}": intervals.rate(count, len(having)) for flag, count in flags.most_common()}
        figures |= {f"skipped_{why}": intervals.rate(count, len(having)) for why, count in skipped.most_common()}
        texts = [(row, rounds.text_of_round(row, number)) for row in having]
        classified = [{**row, "class": refusals.read(dialogue.prompt_text(row["prompt"]), text)} for row, text in texts]
        figures |= {name: rate for name, rate in rates_of_rows(classified).items() if name.endswith("_declined")}
        rates |= {f"round_{number}_{name}": rate for name, rate in figures.items()}
    return rates, {"rows": len(rows), **rounds_, "notes": [classes.PHRASES_NOTE]}


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
    faults.check_constitution(constitution, options.responses, source)
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
            in_orders = {"orders": reader.orders} if reader.judge else {}
            output = claim("classes", settings | {"template": load_template("classify").sha256} | in_orders)
            classified = reader.write_classes(faults.steps(source), output)
        if judge:
            output = claim("faults", settings)
            find = partial(faults.find_faults, rows=rows, done=output.done)
            rows = measurement.fill(
                output, [row["id"] for row in rows], "read critiques", options.reader.load_judge, find
            )
        class_of = {row["id"]: row["class"] for row in classified}
        return faults.figures(rows, class_of, {row["id"]: row.get("kind") for row in source}, constitution)

    class_calls = reader.orders * (critiques + source.count) if reader.judge and has_kinds else 0
    calls = 2 * critiques + class_calls if judge else 0
    plan = {"rows": source.count, "critiques": critiques, "judge_calls": calls}
    return measurement.Measurement(list(options.responses), plan, settings, measure)


# --- multiple choice ----------------------------------------------------------------------------------------


def measure_choices(options: SimpleNamespace) -> measurement.Measurement:
    """Which answer a language model, or which text a reward model, chooses."""
    model, reward_model = options.model, options.reward_model
    if reward_model:
        scorer.check_reward_model(reward_model)
        load = partial(scorer.load_scorer, reward_model, **options.loading)
    else:
        load = _load_here(model, options)
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


def _load_here(model: str, options: SimpleNamespace) -> partial:
    """Loads a model in this process. InputError for a server, which gives no log-probabilities of a given text."""
    if engine_choice():
        raise InputError(
            "it gives no log-probabilities of a given text",
            where="--engine",
            remedy="Leave it out: --choice and --pairs need the model in this process",
        )
    if model.startswith("openai:"):
        raise InputError(
            f"{model} is on a server, which gives no log-probabilities of a given text",
            where="--model",
            expected="a folder or a hub id",
            remedy="Name the model's folder or hub id",
        )
    loading.check_model(model)
    return partial(loading.load_engine, model, **options.loading)


# --- pairs --------------------------------------------------------------------------------------------------


def measure_preference(options: SimpleNamespace) -> measurement.Measurement:
    """Which response of each pair a policy makes likelier, outright and relative to a reference, and what it writes."""
    samples = 1 if options.samples is None else options.samples
    source = pairs.Pairs(options.pairs, options.limit, options.reading)
    names = {"reference": options.reference, "pairs": options.model}
    loads = {ending: _load_here(model, options) for ending, model in names.items() if model}
    settings = {
        "input": source.digest,
        "limit": options.limit,
        "samples": samples,
        **({"seed": options.seed, **asdict(options.sampling)} if samples else {}),
        "dtype": options.dtype,
    }
    reference = identity(options.reference) if options.reference else None
    of_policy = {**settings, "model": identity(options.model), "reference": reference}

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        rows: list[dict] = []  # the reference's, then the policy's
        for ending, load in loads.items():
            output = claim(ending, of_policy if ending == "pairs" else {**settings, "model": reference})
            before = {row["id"]: row for row in rows}
            if ending == "pairs" and reference and not rows:
                break

            def produce(engine, output=output, before=before) -> Iterator[dict | None]:
                remaining = (pair for pair in source if pair["id"] not in output.done)
                return pairs.score(remaining, engine, source.first_ids, samples, options.sampling, options.seed, before)

            rows = measurement.fill(output, source.ids, ending, load, produce)
        return pairs.figures(rows, source)

    plan = {
        **source.counts,
        "pairs": len(source.ids),
        "model_calls": 2 * len(loads) * len(source.ids),
        "new_tokens_at_most": samples * len(loads) * len(source.first_ids) * options.max_new_tokens,
    }
    return measurement.Measurement([options.pairs], plan, of_policy, measure)


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
