"""The transcripts in the report's browser: one per prompt, within a limit of bytes.

    payload = embed(transcripts(run), max_bytes=4_000_000)

A transcript is a training prompt with its response, rounds and pairs, or a held-out prompt with each model's
response. Each text is stored once and referred to by number. Leaves out how they are shown (templates/report/).
"""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

from cai.base.hashing import hashed_seed
from cai.data import dialogue, preferences
from cai.data.rounds import UNCHANGED, is_changed
from cai.evaluate import framed
from cai.report.run_folder import Run, p_a, same_position

MAX_CHARACTERS = 60_000  # of one text; a longer one is cut, with a note

MAX_WORDS = 2_000  # of a text whose changes are marked: comparing takes time with the product of both lengths

_WORDS = re.compile(r"\S+\s*|\s+")


def transcripts(run: Run) -> list[dict]:
    """All transcripts of a run, the training rows first.

    {id, set: "training" | "held-out", kind, category, prompt: messages, responses: [(label, text, class)],
    rounds: [{principle, critique, before, revision, flags, class, skipped, refused}],
    pairs: [{a, b, p, principle, same_position}], outcomes: labels to filter by}
    """
    pairs = defaultdict(list)
    for row in run.preferences:
        if not row.get("tie"):
            pairs[preferences.prompt_key(row)].append(row)
    heldout: dict[str, dict] = {}
    for stage in run.stages:
        heldout |= {row_id: row for row_id, row in stage.responses.items() if row_id not in heldout}
    return [
        *(_describe_training(run, row, pairs[preferences.prompt_key(row)]) for row in run.rows),
        *(_describe_heldout(run, row_id, row) for row_id, row in heldout.items() if "prompt" in row),
    ]


def _transcript(
    row: dict, set_: str, responses: list, rounds: Iterable = (), pairs: Iterable = (), *, outcomes
) -> dict:
    return {
        "id": str(row["id"]),
        "set": set_,
        "kind": row.get("kind"),
        "category": row.get("category"),
        "prompt": dialogue.as_messages(row["prompt"]),
        "responses": responses,
        "rounds": rounds,
        "pairs": pairs,
        "outcomes": list(dict.fromkeys(outcomes)),
    }


def _describe_training(run: Run, row: dict, pairs: list[dict]) -> dict:
    rounds, response, first = [], row["response"], run.classes.get((row["id"], 0))
    for number, entry in enumerate(row.get("rounds") or (), 1):
        rounds.append(
            {
                "principle": entry["principle"],
                "critique": entry["critique"],
                "before": response,
                "revision": entry.get("revision"),
                "class": run.classes.get((row["id"], number)),
                "flags": [flag for flag in entry.get("flags", ()) if flag != UNCHANGED],
                "skipped": entry.get("skipped"),
                "refused": entry.get("refused"),
            }
        )
        response = response if entry.get("revision") is None else entry["revision"]
    compared = [
        {
            "a": pair["response_a"],
            "b": pair["response_b"],
            "p": p_a(pair),
            "principle": pair.get("principle"),
            "same_position": same_position(pair),
        }
        for pair in pairs
    ]
    outcomes = [f"flag: {flag}" for entry in rounds for flag in entry["flags"]]
    outcomes += [f"skipped: {entry['skipped']}" for entry in rounds if entry["skipped"]]
    if rounds:
        revised = any(map(is_changed, row["rounds"]))
        outcomes.insert(0, "revised" if revised else "left as it was")
    last = next((entry["class"] for entry in reversed(rounds) if entry["class"]), None)
    outcomes += [f"{when}: {name}" for when, name in (("first response", first), ("last revision", last)) if name]
    if any(pair["same_position"] for pair in compared):
        outcomes.append("judge: same place in both orders")
    if any(pair["p"] in (None, 0.5) for pair in compared):
        outcomes.append("judge: undecided")
    outcomes += _frame_of(row)
    return _transcript(row, "training", [("response", row["response"], first)], rounds, compared, outcomes=outcomes)


def _describe_heldout(run: Run, row_id: str, row: dict) -> dict:
    """The responses of all stages to one prompt."""
    answers = [(stage.label, stage.responses[row_id]) for stage in run.stages if row_id in stage.responses]
    responses = [(label, answer.get("response", ""), answer.get("class")) for label, answer in answers]
    outcomes = [f"{label}: {name}" for label, _, name in responses if name]
    if framed.is_framed(row):  # shown is what the models read
        row = {**row, "prompt": row.get("conversation", row["prompt"])}
    return _transcript({**row, "id": row_id}, "held-out", responses, outcomes=outcomes + _frame_of(row))


def _frame_of(row: dict) -> list[str]:
    """The frame that a row was asked in, as an outcome to filter by."""
    return [f"frame: {row['frame_kind'].replace('_', ' ')}"] if framed.is_framed(row) else []


def embed(items: Iterable[dict], max_bytes: int) -> dict:
    """{texts, items, total, shown}: the transcripts as compact JSON of about `max_bytes` at most.

    Where not all fit, they are taken in turn from each group of equal set, kind and category, in an order drawn by
    hashing: every group is there, and the same run shows the same ones.
    """
    items, groups = list(items), defaultdict(list)
    order = sorted(range(len(items)), key=lambda index: hashed_seed("transcript", items[index]["id"]))
    for index in order:
        item = items[index]
        groups[item["set"], str(item["kind"]), str(item["category"])].append(index)
    waiting = [iter(group) for _, group in sorted(groups.items())]
    texts: dict[str, int] = {}  # each text with its number, in the order of the numbers
    size, chosen = 0, {}
    while waiting:
        for group in list(waiting):
            index, count = next(group, None), len(texts)
            packed = None if index is None else _pack(items[index], texts)
            new = list(islice(reversed(texts), len(texts) - count))
            added = _size(packed) + sum(map(_size, new))
            if index is None or size + added > max_bytes:
                for text in new:
                    del texts[text]
                waiting.remove(group)
            else:
                size += added
                chosen[index] = packed
    return {
        "texts": list(texts),
        "items": [chosen[index] for index in sorted(chosen)],
        "total": len(items),
        "shown": len(chosen),
    }


def _size(value) -> int:
    """Bytes in the page: JSON in UTF-8, where five characters are written as escapes (see escaping.py)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode()) + 5 * sum(map(text.count, "<>&'")) + 1


def _pack(item: dict, texts: dict[str, int]) -> dict:
    """The transcript with numbers instead of texts, which are added to `texts`, and with each revision's changes."""

    def number(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(_cut(text), len(texts))

    def pack_round(entry: dict) -> dict:
        packed = {**entry, **{name: number(entry[name]) for name in ("critique", "before", "revision", "refused")}}
        if entry["revision"] is not None:
            packed["changes"] = changes(_cut(entry["before"]), _cut(entry["revision"]))
        return packed

    return {
        **item,
        "rounds": [pack_round(entry) for entry in item["rounds"]],
        "prompt": [(message["role"], number(message["content"])) for message in item["prompt"]],
        "responses": [(label, number(text), name) for label, text, name in item["responses"]],
        "pairs": [{**pair, "a": number(pair["a"]), "b": number(pair["b"])} for pair in item["pairs"]],
    }


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]}\n[cut here: {more:,} more characters in the file]"


def changes(before: str, after: str) -> list[list[int]] | None:
    """The words that differ, as [[kept, deleted, inserted], ...] in characters (code points) from the beginning.

    By difflib, word by word. [] if the texts are the same; None if they are too long to compare.
    """
    if before == after:
        return []
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(old), len(new)) > MAX_WORDS:
        return None
    result, kept = [], 0
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new).get_opcodes():
        deleted, inserted = sum(map(len, old[i:j])), sum(map(len, new[k:m]))
        if tag == "equal":
            kept = deleted
        else:
            result.append([kept, deleted, inserted])
            kept = 0
    return result
