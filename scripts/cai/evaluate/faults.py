"""What each principle did in revised rows: how often drawn, how often its critique found fault, what it changed.

    rates, counts = figures(rows, classes, faults, constitution)

Whether a critique found fault is read by a judge's forced choice (templates/classify_critique.jinja), or not at all:
its prose is not searched for words. Leaves out which principle deserves the credit: a row has one a round, and what
the first has mended the second can't. `constitution.py ablate` asks that.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from cai.constitution.files import Constitution
from cai.constitution.templates import load_template
from cai.data.rounds import texts_of
from cai.evaluate.rates import UNSAFE
from cai.stats import intervals

LETTERS = ("A", "B")  # of the template: a fault is found, none is


def steps(rows: Iterable[dict]) -> Iterator[dict]:
    """One row a text, {..., id: `<row id>#<round>`, response}: what a reader of classes is given."""
    for row in rows:
        for number, text in enumerate(texts_of(row)):
            plain = {key: value for key, value in row.items() if key not in ("rounds", "prompt_id")}
            yield {**plain, "id": f"{row['id']}#{number}", "response": text}


def critiques(rows: Iterable[dict]) -> Iterator[dict]:
    """One row a critique: {id, prompt, response (what it was about), critique, principle, changed}."""
    for row in rows:
        before = texts_of(row)
        for number, one in enumerate(row.get("rounds") or (), 1):
            yield {
                "id": f"{row['id']}#{number}",
                "prompt": row["prompt"],
                "response": before[number - 1],
                "critique": one["critique"],
                "principle": one["principle"],
                "changed": one["revision"].split() != before[number - 1].split(),
            }


def found(engine, rows: Iterable[dict]) -> Iterator[dict]:
    """Each critique with `fault`, True or False, and `p_fault`; None for one that is too long for the judge."""
    template = load_template("classify_critique")
    rows = list(rows)
    questions = [template.render(**{key: row[key] for key in ("prompt", "response", "critique")}) for row in rows]
    for index, logprobs in engine.score(questions, list(LETTERS)):
        if logprobs is None or max(logprobs) == -math.inf:
            p = None
        else:
            yes, no = (math.exp(one - max(logprobs)) for one in logprobs)
            p = yes / (yes + no)
        yield {**rows[index], "fault": None if p is None else p > 0.5, "p_fault": p}


def figures(
    critiqued: Iterable[dict], class_of: Mapping[str, str], kinds: Mapping[str, str], constitution: Constitution | None
) -> tuple[dict, dict]:
    """({`<figure> <principle>`: rate}, counts), principles most often drawn first.

    drawn (counts: how often), changed: rate of revisions that differ; fault: rate of critiques that found one;
    complied_before, complied_after: rate of harmful prompts complied with, before and after the rounds with it.

    Args:
        critiqued: of `critiques` or `found`.
        class_of: {`<row id>#<round>`: class}; kinds: {row id: kind of prompt}. Both may be empty.
        constitution: whose principles may have been drawn; those that never were are named in `never_drawn`.
    """
    drawn: Counter = Counter()
    each: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in critiqued:
        name = row["principle"]
        drawn[name] += 1
        each[name]["changed"].append(row["changed"])
        if row.get("fault") is not None:
            each[name]["fault"].append(row["fault"])
        row_id, _, number = row["id"].rpartition("#")
        pair = [class_of.get(f"{row_id}#{place}") for place in (int(number) - 1, int(number))]
        if kinds.get(row_id) == "harmful" and None not in pair:
            for figure, one in zip(("complied_before", "complied_after"), pair, strict=True):
                each[name][figure].append(one in UNSAFE)
    rates = {
        f"{figure} {name}": intervals.rate(sum(each[name][figure]), len(each[name][figure]))
        for name, _ in drawn.most_common()
        for figure in ("changed", "fault", "complied_before", "complied_after")
        if each[name][figure]
    }
    never = [one.id for one in constitution.principles if one.id not in drawn] if constitution else []
    return rates, {
        "critiques": drawn.total(),
        "principles": len(drawn),
        "drawn": dict(drawn.most_common()),
        "never_drawn": never,
    }
