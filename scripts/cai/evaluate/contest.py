"""Policies against each other: every one's response against every other's, harmlessness and helpfulness apart.

    comparisons = pairs(answers, prompts)             # answers: {policy: {prompt id: response}}
    rates, counts = scores(rows, policies)            # rows: what the judge said of them

Harmful prompts are compared by the principles of a constitution, harmless ones by how much a response helps; the judge
is asked as judge.py asks it, both orders. The scores are those of cai/stats/elo.py. Leaves out the length of a response:
a judge may like long ones, and `judge.py --audit` says whether it does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from cai.base.errors import InputError
from cai.data import preferences
from cai.data.kinds import AXES, axis_of
from cai.data.sources import Source
from cai.models import loading
from cai.models.loading import check_model
from cai.stats import elo
from cai.steps import judging


def policies(given: Sequence[str]) -> dict[str, str]:
    """{name: model or file of responses} from `NAME=MODEL` or MODEL, which is then called by its last part.

    InputError for fewer than two, a name twice, or a model that can't be.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, model = one.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            name, model = re.sub(r"[^\w.-]+", "-", one.rstrip("/").rpartition("/")[2]), one
        if name in found:
            raise InputError(
                f"the policy {name!r} twice", where="--policy", expected="NAME=MODEL with names that differ"
            )
        if not model.endswith(".jsonl"):
            check_model(loading.split_endpoint(model)[0])
        found[name] = model
    if len(found) < 2:
        raise InputError("one policy", where="--policy", expected="two or more", remedy="Name another --policy")
    return found


def answered(path: str, prompts: Source) -> dict[str, str]:
    """{prompt id: response} of a file of responses. InputError if none is to one of these prompts."""
    rows = Source([path], require=("prompt", "response"))
    wanted = {row["id"]: row["prompt"] for row in prompts}
    found = {row["id"]: row["response"] for row in rows if wanted.get(row["id"]) == row["prompt"]}
    if not found:
        raise InputError(
            "no response to any of the prompts",
            where=path,
            expected="rows with the ids and prompts of --input",
            remedy="Check the two files",
        )
    return found


def pairs(answers: Mapping[str, Mapping[str, str]], prompts: Iterable[dict]) -> Iterator[dict]:
    """A comparison for each prompt and each two policies that answered it."""
    for row in prompts:
        for a, b in combinations(answers, 2):
            if row["id"] in answers[a] and row["id"] in answers[b]:
                yield {
                    "id": f"{row['id']}: {a} vs {b}",
                    "prompt_id": row["id"],
                    "prompt": row["prompt"],
                    "kind": row["kind"],
                    "axis": axis_of(row["kind"]),
                    "policy_a": a,
                    "policy_b": b,
                    "response_a": answers[a][row["id"]],
                    "response_b": answers[b][row["id"]],
                }


def judged(engine, comparisons: Iterable[dict], questions: Mapping[str, judging.Question], done) -> Iterator[dict]:
    """Each comparison with what the judge said of it, as judge.py writes it; one that could not be asked has p_a None.

    Identical responses are a tie that nobody is asked about.
    """
    left = [one for one in comparisons if one["id"] not in done]
    for one in left:
        if preferences.is_tie(one):
            yield judging.tie(one)
    for axis, question in questions.items():
        asked = [one for one in left if one["axis"] == axis and not preferences.is_tie(one)]
        for one, verdicts in judging.judge(engine, asked, question):
            p = None if verdicts is None else judging.soft_label(verdicts, question.weights)
            principle = question.principles(one)[0].id
            yield judging.preference(one, principle, verdicts or [], p, (0.0, 1.0))


def scores(rows: Sequence[dict], names: Sequence[str]) -> tuple[dict, dict]:
    """({`harmlessness_elo <policy>`: {value, low, high, n, axis, policy, ...}}, counts).

    Elo points above the first policy, 95 % intervals by prompt. `notes` in the counts: what the scores can't say.
    """
    rates: dict[str, dict] = {}
    counts: Counter = Counter(failed=0)
    notes = []
    for axis in AXES:
        ones = [row for row in rows if row["axis"] == axis]
        known = [row for row in ones if row["p_a"] is not None]
        counts["failed"] += len(ones) - len(known)
        counts["comparisons"] += len(known)
        counts["identical"] += sum(row.get("tie", False) for row in known)
        if not known:
            notes.append(f"No comparison for {axis}: no {' or '.join(AXES[axis])} prompt.")
            continue
        compared = [elo.Comparison(row["policy_a"], row["policy_b"], row["p_a"], row["prompt_id"]) for row in known]
        anchor = next(name for name in names if any(name in (one.a, one.b) for one in compared))
        found, said = elo.rate(compared, anchor=anchor)
        notes += [f"{axis}: {note}" for note in said]
        for one in sorted(found, key=lambda one: names.index(one.policy)):
            rates[f"{axis}_elo {one.policy}"] = {
                "value": one.score,
                "low": one.low,
                "high": one.high,
                "n": one.wins + one.losses + one.ties,
                "axis": axis,
                "policy": one.policy,
                "wins": one.wins,
                "losses": one.losses,
                "ties": one.ties,
                "group": one.group,
            }
    return rates, {**counts, "notes": notes}
