"""Critiques that find no fault: their rows are not revised, and no further round is spent on them.

    step = stop_when_content(Step("revise", model, source, source.ids, render, answer))

Whether a critique finds a fault is a forced choice of a model (templates/classify_critique.jinja); its prose is not
searched for words. Both orders of the options are asked, and a row is content only if neither finds a fault: in one
order alone, a model that was never taught the question can read every critique the wrong way round.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from cai.base import cli
from cai.constitution import templates
from cai.data import rounds
from cai.data.processes import Team
from cai.models import choice, estimate
from cai.models.engine import Engine, Generation, Message
from cai.stats import letters
from cai.steps.text import Step

LETTERS = ("A", "B")

FAULT = (True, False)  # the options of the template: a fault is found, or none is

TEMPLATE = "classify_critique"

stop_option = click.option(
    "--stop-when-content",
    "stops",
    is_flag=True,
    help="Spend no revision and no further round on a row whose critique finds no fault, as the model itself reads it.",
)

# Rate of critiques read differently in the two orders, above which the model can't read critiques.
UNDECIDED = 0.3


def find_faults(
    engine: Engine, critiques: Iterable[dict], done: Container[str] = ()
) -> Iterator[tuple[dict, choice.OptionChoice]]:
    """Each critique with the choice between the options `FAULT`, asked in both orders; not in order of the critiques.

    Args:
        critiques: {id, prompt, response, critique}; read lazily. done: ids to leave out.
    """
    template = templates.load_template(TEMPLATE)

    def render(critique: dict, order: letters.Order) -> Sequence[Message]:
        texts = {name: critique[name] for name in ("prompt", "response", "critique")}
        return template.render(**texts, order=order)

    remaining = (critique for critique in critiques if critique["id"] not in done)
    yield from choice.choose_options(engine, remaining, render, LETTERS, letters.cyclic_orders(2, 2))


def _fault_in_each_order(chosen: choice.OptionChoice) -> tuple[float, ...] | None:
    """The probability that a critique finds a fault with either option first; None where there was no choice."""
    return None if chosen.by_order is None else tuple(shares[0] for shares in chosen.by_order)


def stop_when_content(step: Step) -> Step:
    """The step with the critiques read first: a row whose critique finds no fault is settled without a revision.

    A resumed run reads all critiques again: one forward pass each, and the same batches as before. Rows of the step
    that await a revision have `p_fault` in their last round afterwards: the probability that the critique finds a fault
    in both orders of the options, or None where it could not be read.
    """
    p_fault: dict[str, tuple[float, ...] | None] = {}

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
        p_fault.update(
            (critique["id"], _fault_in_each_order(chosen)) for critique, chosen in find_faults(engine, critiques)
        )

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


def tally(rows: Iterable[Mapping[str, Any]], model: str, render: Callable[[Any], Sequence[Message]]) -> dict[str, int]:
    """Counts over the rows of a step that `stop_when_content` made, which may be iterated again and again.

    content: rows whose last critique finds no fault; content_unread: rows for which that could not be read, and
    content_undecided: for which the answer depends on the order of the options; both were revised.
    tokens_saved_about: of the revisions that were not made, as long as the responses.

    Args:
        render: the conversation about a row.
    """
    orders = [row["rounds"][-1]["p_fault"] for row in rows if "p_fault" in row["rounds"][-1]]
    undecided = sum(p is not None and min(p) < 0.5 <= max(p) for p in orders)
    if undecided > UNDECIDED * len(orders):
        cli.warn(
            f"{undecided} of {len(orders)} critiques read differently with the options in the other order: {model} "
            "can't tell whether a critique finds a fault, and such rows are revised"
        )
    return {
        **_count_saved(rows, model, render, rounds.text_of_round),
        "content_unread": orders.count(None),
        "content_undecided": undecided,
    }


def tally_passed_on(
    rows: Iterable[Mapping[str, Any]], model: str, render: Callable[[Any], Sequence[Message]]
) -> dict[str, int]:
    """{content: rows that were passed on, tokens_saved_about: of critiques that were not written, as long as the last}.

    Args:
        render: the conversation about a row.
    """
    return _count_saved(rows, model, render, lambda row: row["rounds"][-1]["critique"])


def _count_saved(
    rows: Iterable[Mapping[str, Any]],
    model: str,
    render: Callable[[Any], Sequence[Message]],
    answer_of: Callable[[Any], str],
) -> dict[str, int]:
    """answer_of: a text as long as the answer that was saved."""
    count = 0

    def saved_conversations() -> Iterator[Sequence[Message]]:
        nonlocal count
        for row in filter(rounds.is_content, rows):
            count += 1
            yield render(row)
            yield [{"role": "user", "content": answer_of(row)}]

    tokens, _, _ = estimate.count_tokens(saved_conversations(), model)
    return {"content": count, "tokens_saved_about": tokens}
