"""Texts with known labels, by which a model is qualified: the bundled set in plain English, and the bundled world's.

    rows = load_rows("judge", "english")

A model that was taught the bundled world alone (`tiny`, and what was trained from it) is asked about that world.
Leaves out how a model is asked and measured: qualification.py.
"""

import random
from collections.abc import Callable
from pathlib import Path

from cai.base.hashing import sha256_file
from cai.base.paths import QUALIFICATION, TINY
from cai.data import readers
from cai.data.dialogue import is_blank
from cai.models.folders import tokenizer_folder
from cai.models.gguf import resolve
from cai.world import language, oracle

FILES = {"reader": "responses.jsonl", "judge": "pairs.jsonl", "critic": "critics.jsonl"}

WORLD, ENGLISH = "world", "english"

WORLD_ROWS = 100  # per role

NO_FAULT = "No fault."  # how a critique of the bundled world ends that finds none

_KINDS = ("harmful", "harmful", "benign", "borderline")

_STYLES = {"harmful": ("comply", "good", "evasive", "preachy", "other"), "": ("comply", "good", "evasive", "other")}


def name_set(model: str) -> str:
    """The set for a model: the world's if its tokenizer is that of `tiny`, which has no words for anything else."""
    file = Path(tokenizer_folder(resolve(model))) / "tokenizer.json"
    return WORLD if file.is_file() and sha256_file(file) == sha256_file(TINY / "tokenizer.json") else ENGLISH


def load_rows(role: str, set_name: str) -> list[dict]:
    """The rows of a role, each with an id and the label `gold`.

    reader: {kind, prompt, response}; gold is a class of `rates.RATES`. Responses without words are left out: no model
    reads them. judge: {prompt, response_a, response_b, principle}; gold is a or b. critic: {prompt, response,
    critique_request}; gold says whether the response has a fault.
    """
    if set_name == WORLD:
        return _MAKERS[role](random.Random(f"qualification/{role}"))
    rows = [row for _, row in readers.read_jsonl(QUALIFICATION / FILES[role])]
    if role == "reader":
        return [{**row, "gold": row["class"]} for row in rows if not is_blank(row["response"])]
    return rows if role == "judge" else [{**row, "gold": row["fault"]} for row in rows]


def _draw(rng: random.Random, number: int) -> tuple[dict, Callable[[str], str]]:
    """(a held-out prompt, what responds to it in a style); `other` speaks of another act of its kind."""
    row = language.prompt_row(rng, rng.choice(_KINDS), "heldout", number)

    def respond(style: str) -> str:
        if style == "other":
            return language.respond(rng, language.draw_act(rng, row["kind"], held_out=True), "comply")
        return language.respond(rng, oracle.act_of(row), style)

    return row, respond


def _styles(row: dict) -> tuple[str, ...]:
    return _STYLES.get(row["kind"], _STYLES[""])


def _make_responses(rng: random.Random) -> list[dict]:
    """Responses in every style; help with another harmful act is left out, because two classes would fit."""
    rows: list[dict] = []
    while len(rows) < WORLD_ROWS:
        row, respond = _draw(rng, len(rows))
        style = rng.choice([name for name in _styles(row) if (row["kind"], name) != ("harmful", "other")])
        response = respond(style)
        rows.append({**row, "response": response, "gold": oracle.classify(row, response)})
    return rows


def _make_pairs(rng: random.Random) -> list[dict]:
    rows: list[dict] = []
    while len(rows) < WORLD_ROWS:
        row, respond = _draw(rng, len(rows))
        a, b = map(respond, rng.sample(_styles(row), 2))
        tiers = oracle.tier(row, a), oracle.tier(row, b)
        if tiers[0] != tiers[1]:
            gold = "ab"[len(rows) % 2]
            if (tiers[0] > tiers[1]) != (gold == "a"):
                a, b = b, a
            rows.append({**row, "response_a": a, "response_b": b, "gold": gold, "principle": None})
    return rows


def _make_faults(rng: random.Random) -> list[dict]:
    """Responses that help with harm, and ones without a fault: half each."""
    rows: list[dict] = []
    while len(rows) < WORLD_ROWS:
        row, respond = _draw(rng, len(rows))
        is_faulty = len(rows) % 2 == 0
        if row["kind"] == "harmful" or not is_faulty:
            response = respond("good" if row["kind"] == "harmful" and not is_faulty else "comply")
            rows.append({**row, "response": response, "critique_request": None, "gold": is_faulty})
    return rows


_MAKERS = {"reader": _make_responses, "judge": _make_pairs, "critic": _make_faults}
