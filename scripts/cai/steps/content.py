"""Critiques that find no fault: their rows are not revised, and no further round is spent on them.

    step = stop_when_content(Step("revise", model, source, source.ids, render, answer))

Whether a critique finds a fault is a forced choice of a model (templates/classify_critique.jinja); its prose is not
searched for words. Both orders of the options are asked, and a row is content only if neither finds a fault: in one
order alone, a model that was never taught the question can read every critique the wrong way round.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from cai.base import cli
from cai.constitution import templates
from cai.data import rounds
from cai.data.processes import Team
from cai.models import choice, estimate
from cai.models.engine import Engine, Generation, Message, RowRequest
from cai.steps.text import Step

LETTERS = ("A", "B")  # of the template: a fault is found, or none is

TEMPLATE = "classify_critique"

stop_option = click.option(
    "--stop-when-content",
    is_flag=True,
    help="Spend no revision and no further round on a row whose critique finds no fault, as the model itself reads it.",
)

# Rate of critiques read differently in the two orders, above which the model can't read critiques.
UNDECIDED = 0.3


def find_faults(
    engine: Engine, critiques: Iterable[dict], done: Container[str] = ()
) -> Iterator[tuple[dict, tuple[float, float] | None]]:
    """(critique, probability that it finds a fault with either option first), not in order.

    The probabilities are None where the model made no choice in one of the orders.

    Args:
        critiques: {id, prompt, response, critique}; read lazily. done: ids to leave out.
    """
    template = templates.load_template(TEMPLATE)
    requests = (
        RowRequest(
            (row["id"], swapped),
            template.render(**{name: row[name] for name in ("prompt", "response", "critique")}, swapped=swapped),
            row=row,
        )
        for row in critiques
        if row["id"] not in done
        for swapped in (False, True)
    )
    waiting: dict[str, dict[bool, float | None]] = {}
    for request, logprobs in choice.choose(engine, requests, LETTERS):
        row_id, swapped = request.key
        orders = waiting.setdefault(row_id, {})
        orders[swapped] = None if logprobs is None else choice.probabilities(logprobs)[swapped]
        if len(orders) == 2:
            del waiting[row_id]
            p, p_swapped = orders[False], orders[True]
            yield request.row, None if p is None or p_swapped is None else (p, p_swapped)


def stop_when_content(step: Step) -> Step:
    """The step with the critiques read first: a row whose critique finds no fault is settled without a revision.

    A resumed run reads all critiques again: one forward pass each, and the same batches as before. Rows of the step
    that await a revision have `p_fault` in their last round afterwards: the probability that the critique finds a fault
    in both orders of the options, or None where it could not be read.
    """
    p_fault: dict[str, tuple[float, float] | None] = {}

    def read_critiques(team: Team, engine: Engine) -> None:
        step.prepare(team, engine)
        critiques = (
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "response": rounds.text_of_round(row),
                "critique": row["rounds"][-1]["critique"],
            }
            for row in team.share(step.rows)
            if step.settle(row) is None
        )
        p_fault.update((critique["id"], p) for critique, p in find_faults(engine, critiques))

    def settle(row: dict) -> dict | None:
        if (settled := step.settle(row)) is not None:
            return settled
        p = p_fault.get(row["id"])
        return None if p is None or max(p) >= 0.5 else _extend_round(row, p_fault=p, skipped=rounds.CONTENT)

    def answer(row: dict, generation: Generation) -> dict:
        return _extend_round(step.answer(row, generation), p_fault=p_fault[row["id"]])

    def plan() -> dict[str, Any]:
        return {**step.plan(), "fault_calls": 2 * sum(step.settle(row) is None for row in step.rows)}

    return replace(step, prepare=read_critiques, settle=settle, answer=answer, plan=plan)


def fingerprint() -> dict[str, str]:
    """What decides whether a critique finds a fault, beside the model."""
    return {"stop_when_content": templates.load_template(TEMPLATE).sha256}


def _extend_round(row: dict, **more: Any) -> dict:
    """The row with further fields in its last round."""
    *earlier, last = row["rounds"]
    return {**row, "rounds": [*earlier, {**last, **more}]}


def tally(
    rows: Iterable[Mapping[str, Any]],
    model: str,
    render: Callable[[Any], Sequence[Message]],
    answer_of: Callable[[Any], str],
) -> dict[str, int]:
    """Counts over the rows of a step that skips rows that are content; `rows` may be iterated again and again.

    content: rows whose last critique finds no fault; content_unread: rows for which that could not be read, and
    content_undecided: for which the answer depends on the order of the options; both were revised.
    tokens_saved_about: of the conversations that were not held, with answers as long as `answer_of`.

    Args:
        render: the conversation that the step would have held about a row. answer_of: a text of its answer's length.
    """
    counts = Counter(content=0, content_unread=0, content_undecided=0)
    critiques = 0

    def saved_conversations() -> Iterator[Sequence[Message]]:
        nonlocal critiques
        for row in rows:
            p = row["rounds"][-1].get("p_fault", ())
            critiques += p != ()
            counts["content_unread"] += p is None
            counts["content_undecided"] += bool(p) and min(p) < 0.5 <= max(p)
            if rounds.is_content(row):
                counts["content"] += 1
                yield render(row)
                yield [{"role": "user", "content": answer_of(row)}]

    tokens, _, _ = estimate.count_tokens(saved_conversations(), model)
    if counts["content_undecided"] > UNDECIDED * critiques:
        cli.warn(
            f"{counts['content_undecided']} of {critiques} critiques read differently with the options in the other "
            f"order: {model} can't tell whether a critique finds a fault, and such rows are revised"
        )
    return {**counts, "tokens_saved_about": tokens}
