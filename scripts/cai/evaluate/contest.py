"""Policies against each other: every one's response against every other's, harmlessness and helpfulness apart.

    measurement = measure_policies(options)      # the options of compare.py by name
    rates, counts = measurement.measure(claim)

Harmful prompts are compared by the principles of a constitution, harmless ones by how much a response helps; the judge
is asked as judge.py asks it, in both orders. The scores are those of cai/stats/elo.py. Leaves out the length of a
response: a judge may prefer long ones, which `judge.py --audit` measures.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from types import SimpleNamespace

from cai.base import files, hashing
from cai.base.errors import InputError
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import kinds, preferences, sources
from cai.evaluate import classes, measurement, responding, tasks
from cai.models import loading
from cai.stats import elo
from cai.steps import judging


def measure_policies(options: SimpleNamespace) -> measurement.Measurement:
    """Every policy against every other, judged on harmlessness and on helpfulness."""
    policies = name_policies(options.policy)
    loading.check_model(loading.split_endpoint(options.judge)[0])
    source, by_kind = tasks.read_rows(options.inputs, options.limit, classes.check_kind, reading=options.reading)
    template, written = load_template("preference"), load_template("preference_answer")
    questions = {
        axis: judging.Question(load_constitution(name), template, seed=options.seed, written=written)
        for axis, name in zip(kinds.AXES, (options.constitution, options.helpfulness), strict=True)
    }
    files = {name: model for name, model in policies.items() if model.endswith(".jsonl")}
    answers = {name: read_answers(path, source) for name, path in files.items()}
    response_settings = {
        "input": source.digest,
        "limit": options.limit,
        "seed": options.seed,
        **asdict(options.sampling),
        "dtype": options.dtype,
    }
    settings = {
        **response_settings,
        "policies": {name: hashing.identity(model) for name, model in policies.items()}
        | {name: hashing.sha256_file(path) for name, path in files.items()},
        "judge": hashing.identity(options.judge),
        "template": template.sha256,
        "constitutions": [question.constitution.sha256 for question in questions.values()],
    }

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        for name, model in policies.items():
            if name not in files:
                output = claim(f"{name}.responses", {**response_settings, "model": hashing.identity(model)})
                rows = responding.respond(responding.plan(source, options.seed), output, model, options)
                answers[name] = {row["id"]: row["response"] for row in rows}
        output = claim("comparisons", settings)
        comparisons = list(pairs({name: answers[name] for name in policies}, source))
        rows = measurement.fill(
            output,
            [comparison["id"] for comparison in comparisons],
            "compare",
            partial(loading.load_named_engine, options.judge, options.endpoints, options.loading),
            lambda engine: judge_comparisons(engine, comparisons, questions, frozenset(output.done)),
        )
        return scores(rows, list(policies))

    count = source.count * len(policies) * (len(policies) - 1) // 2
    return measurement.Measurement(
        [*options.inputs, *files.values()],
        {
            "rows": source.count,
            **by_kind,
            "policies": len(policies),
            "comparisons": count,
            "model_calls": source.count * (len(policies) - len(files)),
            "judge_calls": 2 * count,
        },
        settings,
        measure,
    )


def name_policies(arguments: Sequence[str]) -> dict[str, str]:
    """{name: model or file of responses} from `NAME=MODEL` or MODEL, whose name is then its last part.

    InputError for fewer than two, a name twice, or a model that can't be one.
    """
    policies: dict[str, str] = {}
    for argument in arguments:
        name, equals, model = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            name, model = files.file_name(argument.rstrip("/").rpartition("/")[2]), argument
        if name in policies:
            raise InputError(
                f"the policy {name!r} twice", where="--policy", expected="NAME=MODEL with names that differ"
            )
        if not model.endswith(".jsonl"):
            loading.check_model(loading.split_endpoint(model)[0])
        policies[name] = model
    if len(policies) < 2:
        raise InputError("one policy", where="--policy", expected="two or more", remedy="Name another --policy")
    return policies


def read_answers(path: str, prompts: sources.Source) -> dict[str, str]:
    """{prompt id: response} of a file of responses. InputError if none is to one of these prompts."""
    prompt_of = {row["id"]: row["prompt"] for row in prompts}
    rows = sources.Source([path], require=("prompt", "response"))
    answers = {row["id"]: row["response"] for row in rows if prompt_of.get(row["id"]) == row["prompt"]}
    if not answers:
        raise InputError(
            "no response to any of the prompts",
            where=path,
            expected="rows with the ids and prompts of --input",
            remedy="Check the two files",
        )
    return answers


def pairs(answers: Mapping[str, Mapping[str, str]], prompts: Iterable[dict]) -> Iterator[dict]:
    """One comparison per prompt and two policies that answered it."""
    for row in prompts:
        for a, b in combinations(answers, 2):
            if row["id"] in answers[a] and row["id"] in answers[b]:
                yield {
                    "id": f"{row['id']}: {a} vs {b}",
                    "prompt_id": row["id"],
                    "prompt": row["prompt"],
                    "kind": row["kind"],
                    "axis": kinds.axis_of(row["kind"]),
                    "policy_a": a,
                    "policy_b": b,
                    "response_a": answers[a][row["id"]],
                    "response_b": answers[b][row["id"]],
                }


def judge_comparisons(
    engine, comparisons: Iterable[dict], questions: Mapping[str, judging.Question], done: Container[str]
) -> Iterator[dict]:
    """Each comparison as judge.py writes it; one that could not be asked has p_a None.

    Identical responses are a tie, and the judge is not asked.
    """
    remaining = [comparison for comparison in comparisons if comparison["id"] not in done]
    yield from (judging.tie(comparison) for comparison in remaining if preferences.is_tie(comparison))
    for axis, question in questions.items():
        comparable = [row for row in remaining if row["axis"] == axis and not preferences.is_tie(row)]
        for comparison, verdicts in judging.judge(engine, comparable, question):
            p = judging.soft_label(verdicts or [], question.weights)
            principle = question.principles(comparison)[0].id
            yield judging.preference(comparison, principle, verdicts or [], p, (0.0, 1.0))


def scores(rows: Sequence[dict], names: Sequence[str]) -> tuple[dict, dict]:
    """({`harmlessness_elo <policy>`: {value, low, high, n, axis, policy, ...}}, counts).

    Elo points above the first policy, 95 % intervals by prompt. `notes` in the counts: what the scores can't say.
    """
    rates: dict[str, dict] = {}
    known = [row for row in rows if row["p_a"] is not None]
    counts = {
        "failed": len(rows) - len(known),
        "comparisons": len(known),
        "identical": sum(row.get("tie", False) for row in known),
        "notes": [],
    }
    for axis, kinds_of_axis in kinds.AXES.items():
        on_axis = [row for row in known if row["axis"] == axis]
        if not on_axis:
            counts["notes"].append(f"No comparison for {axis}: no {' or '.join(kinds_of_axis)} prompt.")
            continue
        compared = [elo.Comparison(row["policy_a"], row["policy_b"], row["p_a"], row["prompt_id"]) for row in on_axis]
        players = {name for comparison in compared for name in (comparison.a, comparison.b)}
        ratings, notes = elo.rate(compared, anchor=next(name for name in names if name in players))
        counts["notes"] += [f"{axis}: {note}" for note in notes]
        for rating in sorted(ratings, key=lambda rating: names.index(rating.policy)):
            rates[f"{axis}_elo {rating.policy}"] = {
                "value": rating.score,
                "low": rating.low,
                "high": rating.high,
                "n": rating.wins + rating.losses + rating.ties,
                "axis": axis,
                "policy": rating.policy,
                "wins": rating.wins,
                "losses": rating.losses,
                "ties": rating.ties,
                "group": rating.group,
            }
    return rates, counts
