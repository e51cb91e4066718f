"""Forced choices: the log-probability of each letter as the answer to a template."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from cai.constitution.templates import Template
from cai.models.engine import Sampling

_ANSWER_TOKENS = 8


def choose_letter(
    engine, template: Template, rows: Iterable[dict], letters: Sequence[str], **more
) -> Iterator[tuple[dict, list[float] | None]]:
    """Each row with the log-probability of every letter as the answer to the template, not in order.

    None: the row is too long, or the answer of a judge that writes could not be read.

    Args:
        engine: of `load_engine`. One without log-probabilities writes: then the template must end without a prefill.
        rows: with prompt and response.
        more: further variables of the template.
    """
    rows = list(rows)
    questions = [template.render(prompt=row["prompt"], response=row["response"], **more) for row in rows]
    if getattr(engine, "scores_choices", True):
        for index, logprobs in engine.score(questions, list(letters)):
            yield rows[index], logprobs
        return
    for index, made in engine.generate(questions, Sampling(_ANSWER_TOKENS, 0.0), [0] * len(rows)):
        said = re.fullmatch(r"[\s(\[*\"'`]*([A-Z])[\s)\]*\"'`.]*", made.text)
        known = not made.lost and said and said[1] in letters
        yield rows[index], [0.0 if one == said[1] else -math.inf for one in letters] if known else None
