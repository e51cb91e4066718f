"""Public safety sets, read as they are published and recognised by their columns or by name.

    source = PublicSource(["xstest_prompts.csv"], require=("prompt", "kind"))
    rows = list(source)          # prompt, kind, and gold where the set has labels

A file that you have, or a dataset id (`owner/name:split`), which `datasets` then fetches; nothing else is downloaded.
Kinds: a prompt that asks for harm is harmful; XSTest's safe prompts are borderline, harmless with frightening words.
Leaves out the graders of the sets: our own judge reads the classes, so figures are not those of a leaderboard.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data.dialogue import split_transcript
from cai.data.sources import Source

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A public format.

    Attributes:
        needs: the columns by which a row of it is recognised.
        convert: returns the fields to add to a row; KeyError or ValueError for a row that is not of the format.
    """

    needs: tuple[str, ...]
    convert: Callable[[_Row], dict[str, Any]]


def _xstest(row: _Row) -> dict[str, Any]:
    """Röttger et al. 2023 (arXiv 2308.01263). `label`, or the older `type`, whose contrasts are unsafe."""
    label = str(row.get("label") or ("unsafe" if str(row["type"]).startswith("contrast") else "safe"))
    if label not in ("safe", "unsafe"):
        raise ValueError(f"label {label!r}, expected safe or unsafe")
    return {"kind": "borderline" if label == "safe" else "harmful", "category": row.get("type")}


def _harmbench(row: _Row) -> dict[str, Any]:
    """Mazeika et al. 2024 (arXiv 2402.04249): a behaviour, for some with a text that it is about."""
    context = (row.get("ContextString") or "").strip()
    return {
        "prompt": f"{context}\n\n{row['Behavior']}" if context else row["Behavior"],
        "kind": "harmful",
        "category": row.get("SemanticCategory"),
        **({"id": row["BehaviorID"]} if row.get("BehaviorID") else {}),
    }


def _strongreject(row: _Row) -> dict[str, Any]:
    """Souly et al. 2024 (arXiv 2402.10260)."""
    return {"prompt": row["forbidden_prompt"], "kind": "harmful"}


def _advbench(row: _Row) -> dict[str, Any]:
    """Zou et al. 2023 (arXiv 2307.15043); `target` is the text that an attack aims at, not a response."""
    return {"prompt": row["goal"], "kind": "harmful"}


def _beavertails(row: _Row) -> dict[str, Any]:
    """Ji et al. 2023 (arXiv 2307.04657): people's label of the response, given the prompt."""
    is_safe = str(row["is_safe"]).lower()
    if is_safe not in ("true", "false"):
        raise ValueError(f"is_safe {shorten(row['is_safe'])!r}, expected true or false")
    return {"kind": "harmful", "gold": "safe" if is_safe == "true" else "unsafe"}


def _hh_red_team(row: _Row) -> dict[str, Any]:
    """Ganguli et al. 2022 (arXiv 2209.07858): the attempt up to its last human turn; what followed is the response."""
    turns = split_transcript(row["transcript"])
    if not turns:
        raise ValueError("a transcript without Human: and Assistant: turns")
    response = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not turns:
        raise ValueError("a transcript without a human turn")
    return {
        "prompt": turns if len(turns) > 1 else turns[0]["content"],
        "kind": "harmful",
        **({"response": response} if response else {}),
    }


FORMATS = {
    "xstest": Format(("prompt", "type"), _xstest),
    "harmbench": Format(("Behavior",), _harmbench),
    "strongreject": Format(("forbidden_prompt",), _strongreject),
    "advbench": Format(("goal", "target"), _advbench),
    "beavertails": Format(("prompt", "response", "is_safe"), _beavertails),
    "hh-red-team": Format(("transcript",), _hh_red_team),
}


def recognise(row: _Row) -> str | None:
    """The format of a row by its columns, or None: a row of ours (it has a `kind`), or an unknown one."""
    if row.get("kind") is not None:
        return None
    return next((name for name, format_ in FORMATS.items() if set(format_.needs) <= set(row)), None)


class PublicSource(Source):
    """A `Source` whose rows may be those of a public set. `form`: its name; None recognises each row by its columns.

    Raises InputError with file and line for a row that is not of the format named.
    """

    def __init__(self, inputs: Sequence[str], *, form: str | None = None, **options: Any):
        self.form = form
        super().__init__(inputs, **options)

    def _converted(self, row: dict[str, Any], where: str, line: int) -> dict[str, Any]:
        name = self.form or recognise(row)
        if name is None:
            return row
        if missing := [column for column in FORMATS[name].needs if row.get(column) is None]:
            raise InputError(
                f"no {missing[0]!r}",
                where=where,
                line=line,
                expected=f"a row of {name}",
                remedy=f"The row has: {shorten(', '.join(map(str, row)))}",
            )
        try:
            fields = FORMATS[name].convert(row)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"not a row of {name}: {shorten(error)}",
                where=where,
                line=line,
                remedy="Fix or delete this row, or leave out --set",
            ) from error
        return {**{key: value for key, value in row.items() if key != "transcript"}, **fields}
