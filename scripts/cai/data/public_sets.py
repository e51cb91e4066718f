"""Public safety sets, read as they are published and recognised by all of their columns, or named.

    fields = convert(row, None, None, "xstest_prompts.csv", 1)     # prompt, kind, and gold where the set has labels

A file that you have, or a dataset id (`owner/name:split`), which `datasets` then fetches; nothing else is downloaded.
Kinds: a prompt that asks for harm is harmful; XSTest's safe prompts are borderline, harmless with frightening words.
Leaves out the graders of the sets: our own judge reads the classes, so figures are not those of a leaderboard.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data.dialogue import split_transcript

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A public format.

    Attributes:
        columns: those that every published version has; a row with all of them and no others is recognised.
        optional: a pattern of further columns that some versions have.
        needs: the columns that are read; a row of a set that is named has at least these.
        convert: returns the fields to add to a row; KeyError or ValueError for a row that is not of the format.
    """

    columns: tuple[str, ...]
    optional: str
    needs: tuple[str, ...]
    convert: Callable[[_Row], dict[str, Any]]


_XSTEST_TYPES = (
    *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events"),
    *("real_group_nons_discr", "nons_group_real_discr", "discr", "privacy_public", "privacy_fictional", "privacy"),
)


def _xstest(row: _Row) -> dict[str, Any]:
    """Röttger et al. 2023 (arXiv 2308.01263). `label`, or the older `type`, whose contrasts are unsafe."""
    type_ = str(row["type"])
    if type_.removeprefix("contrast_") not in _XSTEST_TYPES:
        raise ValueError(f"type {shorten(type_)!r}, which XSTest does not have")
    label = str(row.get("label") or ("unsafe" if type_.startswith("contrast") else "safe"))
    if label not in ("safe", "unsafe"):
        raise ValueError(f"label {label!r}, expected safe or unsafe")
    return {"kind": "borderline" if label == "safe" else "harmful", "category": type_}


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


def _jailbreakbench(row: _Row) -> dict[str, Any]:
    """Chao et al. 2024 (arXiv 2404.01318). Both of its files have these columns: see `_KIND_OF_FILE`."""
    return {"prompt": row["Goal"], "category": row.get("Category")}


def _do_not_answer(row: _Row) -> dict[str, Any]:
    """Wang et al. 2023 (arXiv 2308.13387): questions that a model should not answer."""
    return {"prompt": row["question"], "kind": "harmful", "category": row.get("types_of_harm")}


def _beavertails(row: _Row) -> dict[str, Any]:
    """Ji et al. 2023 (arXiv 2307.04657): people's label of the response, given the prompt."""
    is_safe = str(row["is_safe"]).lower()
    if is_safe not in ("true", "false"):
        raise ValueError(f"is_safe {shorten(row['is_safe'])!r}, expected true or false")
    return {"kind": "harmful", "gold": "safe" if is_safe == "true" else "unsafe"}


def _pku_saferlhf(row: _Row) -> dict[str, Any]:
    """Ji et al. 2024 (arXiv 2406.15513): two responses, the safer one as chosen (not `better_response_id`)."""
    safer = str(row["safer_response_id"])
    if safer not in ("0", "1"):
        raise ValueError(f"safer_response_id {shorten(safer)!r}, expected 0 or 1")
    responses = row["response_0"], row["response_1"]
    return {
        "kind": "harmful",
        "response_a": responses[0],
        "response_b": responses[1],
        "gold": "ab"[int(safer)],
        "chosen": responses[int(safer)],
        "rejected": responses[1 - int(safer)],
    }


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
    "xstest": Format(("prompt", "type", "focus", "note"), r"id|id_v[12]|label", ("prompt", "type"), _xstest),
    "harmbench": Format(
        ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"),
        "",
        ("Behavior",),
        _harmbench,
    ),
    "strongreject": Format(("category", "source", "forbidden_prompt"), "", ("forbidden_prompt",), _strongreject),
    "advbench": Format(("goal", "target"), "", ("goal", "target"), _advbench),
    "jailbreakbench": Format(("Goal", "Target", "Behavior", "Category", "Source"), "Index", ("Goal",), _jailbreakbench),
    "do-not-answer": Format(
        ("risk_area", "types_of_harm", "specific_harms", "question"),
        r"id|.+_(response|action|harmful)",
        ("question",),
        _do_not_answer,
    ),
    "beavertails": Format(
        ("prompt", "response", "category", "is_safe"), "", ("prompt", "response", "is_safe"), _beavertails
    ),
    "pku-saferlhf": Format(
        (
            *("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
            *("better_response_id", "safer_response_id"),
        ),
        r"prompt_source|response_[01]_(source|harm_category|severity_level|sha256)",
        ("prompt", "response_0", "response_1", "safer_response_id"),
        _pku_saferlhf,
    ),
    "hh-red-team": Format(
        ("transcript", "min_harmlessness_score_transcript", "num_params", "model_type", "rating", "task_description"),
        "task_description_harmlessness_score|red_team_member_id|is_upworker|tags",
        ("transcript",),
        _hh_red_team,
    ),
}

# An index that pandas wrote as a column, in any of them.
_INDEX = r"|Unnamed: \d+|"

# JailbreakBench's two files by the names under which they are published.
_KIND_OF_FILE = {"harmful-behaviors": "harmful", "benign-behaviors": "benign"}


def recognise(row: _Row) -> str | None:
    """The format of a row by all of its columns, or None: a row of ours (it has a `kind`), or an unknown one."""
    if row.get("kind") is not None:
        return None
    for name, format_ in FORMATS.items():
        further = row.keys() - set(format_.columns)
        if len(row) - len(further) == len(format_.columns) and all(
            re.fullmatch(format_.optional + _INDEX, str(column)) for column in further
        ):
            return name
    return None


def convert(row: dict[str, Any], form: str | None, kind: str | None, where: str, line: int) -> dict[str, Any]:
    """A row of a public set with the fields of ours; another row as it is.

    Args:
        form: the set's name; None recognises it by its columns.
        kind: the kind of the prompts where the set does not say it.
    Raises InputError with file and line for a row that is not of the format.
    """
    name = form or recognise(row)
    if name is None:
        return row
    if missing := [column for column in FORMATS[name].needs if row.get(column) is None]:
        raise InputError(
            f"no {missing[0]!r}",
            where=where,
            line=line,
            expected=f"a row of {name}",
            remedy=f"The row has: {shorten(', '.join(map(str, row)), 300)}",
        )
    try:
        fields = FORMATS[name].convert(row)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"not a row of {name}: {shorten(error)}",
            where=where,
            line=line,
            remedy="Fix or delete this row, or " + ("leave out --set" if form else "name the columns and the --kind"),
        ) from error
    if name == "jailbreakbench":
        fields["kind"] = kind or row.get("kind") or _KIND_OF_FILE.get(Path(where).name.partition(".")[0])
        if fields["kind"] is None:
            raise InputError(
                "JailbreakBench's harmful and benign behaviours have the same columns",
                where=where,
                line=line,
                expected="--kind harmful or --kind benign",
                remedy="Or give the file its published name, harmful-behaviors.csv or benign-behaviors.csv",
            )
    return {**{key: value for key, value in row.items() if key != "transcript"}, **fields}
