"""What a person reads in the report's browser: one transcript a prompt, within a given size.

    payload = embed(transcripts(run), most_bytes=4_000_000)

A transcript is a training prompt with its response, rounds and pairs, or a held-out prompt with each model's
response. Each text is stored once and referred to by number. Leaves out how they are shown (templates/report/).
"""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable

from cai.base.hashing import hashed_seed
from cai.data import preferences
from cai.data.dialogue import as_messages
from cai.data.rounds import UNCHANGED, is_changed
from cai.report.run_folder import Run, p_a, same_position

MOST_CHARACTERS = 60_000  # of one text; what is longer is cut, and says so

MOST_WORDS = 2_000  # of a text whose changes are marked: comparing takes time with the product of both lengths

_WORDS = re.compile(r"\S+\s*|\s+")


def transcripts(run: Run) -> list[dict]:
    """All transcripts of a run, the training rows first.

    {id, set: "training" | "held-out", kind, category, prompt: messages, responses: [(label, text, class)],
    rounds: [{principle, critique, before, revision, flags, class}], pairs: [{a, b, p, principle, same_position}],
    outcomes: labels to filter by}
    """
    pairs = defaultdict(list)
    for row in run.preferences:
        pairs[preferences.prompt_key(row)].append(row)
    made = [_training(run, row, pairs) for row in run.rows]
    return made + _heldout(run)


def _training(run: Run, row: dict, pairs: dict) -> dict:
    rounds, before, outcomes = [], row["response"], []
    for number, one in enumerate(row.get("rounds") or (), 1):
        found = run.classes.get((row["id"], number))
        rounds.append(
            {
                "principle": one["principle"],
                "critique": one["critique"],
                "before": before,
                "revision": one.get("revision"),
                "class": found,
                "flags": [flag for flag in one.get("flags", ()) if flag != UNCHANGED],
            }
        )
        outcomes += [f"flag: {flag}" for flag in rounds[-1]["flags"]]
        before = one["revision"] if one.get("revision") is not None else before
    if rounds:
        revised = any(one.get("revision") is not None and is_changed(one) for one in row["rounds"])
        outcomes.insert(0, "revised" if revised else "left as it was")
    first = run.classes.get((row["id"], 0))
    last = next((one["class"] for one in reversed(rounds) if one["class"]), None)
    outcomes += [f"{when}: {found}" for when, found in (("first response", first), ("last revision", last)) if found]
    compared = [
        {
            "a": pair["response_a"],
            "b": pair["response_b"],
            "p": p_a(pair),
            "principle": pair.get("principle"),
            "same_position": same_position(pair),
        }
        for pair in pairs.get(preferences.prompt_key(row), ())
        if not pair.get("tie")
    ]
    if any(pair["same_position"] for pair in compared):
        outcomes.append("judge: same place in both orders")
    if any(pair["p"] in (None, 0.5) for pair in compared):
        outcomes.append("judge: undecided")
    return {
        "id": str(row["id"]),
        "set": "training",
        "kind": row.get("kind"),
        "category": row.get("category"),
        "prompt": as_messages(row["prompt"]),
        "responses": [("response", row["response"], first)],
        "rounds": rounds,
        "pairs": compared,
        "outcomes": list(dict.fromkeys(outcomes)),
    }


def _heldout(run: Run) -> list[dict]:
    """One transcript for each prompt that any stage answered."""
    rows: dict[str, dict] = {}
    for stage in run.stages:
        for row_id, row in stage.responses.items():
            rows.setdefault(row_id, row)
    result = []
    for row_id, row in rows.items():
        if "prompt" not in row:
            continue
        answers = [
            (stage.label, stage.responses[row_id].get("response", ""), stage.responses[row_id].get("class"))
            for stage in run.stages
            if row_id in stage.responses
        ]
        result.append(
            {
                "id": row_id,
                "set": "held-out",
                "kind": row.get("kind"),
                "category": row.get("category"),
                "prompt": as_messages(row["prompt"]),
                "responses": answers,
                "rounds": [],
                "pairs": [],
                "outcomes": [f"{label}: {found}" for label, _, found in answers if found],
            }
        )
    return result


def embed(items: Iterable[dict], most_bytes: int) -> dict:
    """{texts, items, total, shown}: the transcripts as compact JSON of about `most_bytes` at most.

    Where not all fit, they are taken in turn from each group of equal set, kind and category, in an order drawn by
    hashing: every group is there, and the same run shows the same ones.
    """
    items = list(items)
    groups = defaultdict(list)
    for place, item in enumerate(items):
        groups[item["set"], str(item["kind"]), str(item["category"])].append(place)
    for places in groups.values():
        places.sort(key=lambda place: hashed_seed("transcript", items[place]["id"]))
    waiting = [iter(places) for _, places in sorted(groups.items())]
    texts, size, chosen = _Texts(), 0, {}
    while waiting:
        for one in list(waiting):
            place = next(one, None)
            if place is None:
                waiting.remove(one)
                continue
            mark = len(texts.all)
            packed = _pack(items[place], texts)
            new = _size(packed) + sum(map(_size, texts.all[mark:]))
            if size + new > most_bytes:
                texts.forget(mark)
                waiting.remove(one)
                continue
            size += new
            chosen[place] = packed
    return {
        "texts": texts.all,
        "items": [chosen[place] for place in sorted(chosen)],
        "total": len(items),
        "shown": len(chosen),
    }


def _size(value) -> int:
    """Bytes in the page: JSON in UTF-8, where five characters are written out (see report.py)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode()) + 5 * sum(map(text.count, "<>&'")) + 1


class _Texts:
    """Each text once, by number."""

    def __init__(self):
        self.all: list[str] = []
        self.places: dict[str, int] = {}

    def __call__(self, text: str | None) -> int | None:
        if text is None:
            return None
        if len(text) > MOST_CHARACTERS:
            text = f"{text[:MOST_CHARACTERS]}\n[cut here: {len(text) - MOST_CHARACTERS:,} more characters in the file]"
        if text not in self.places:
            self.places[text] = len(self.all)
            self.all.append(text)
        return self.places[text]

    def forget(self, mark: int) -> None:
        for text in self.all[mark:]:
            del self.places[text]
        del self.all[mark:]


def _pack(item: dict, texts: _Texts) -> dict:
    rounds = []
    for one in item["rounds"]:
        packed = {
            "principle": one["principle"],
            "critique": texts(one["critique"]),
            "class": one["class"],
            "flags": one["flags"],
            "before": texts(one["before"]),
            "revision": texts(one["revision"]),
        }
        if one["revision"] is not None:
            packed["changes"] = changes(texts.all[packed["before"]], texts.all[packed["revision"]])
        rounds.append(packed)
    return {
        **item,
        "rounds": rounds,
        "prompt": [(message["role"], texts(message["content"])) for message in item["prompt"]],
        "responses": [(label, texts(text), found) for label, text, found in item["responses"]],
        "pairs": [{**pair, "a": texts(pair["a"]), "b": texts(pair["b"])} for pair in item["pairs"]],
    }


def changes(before: str, after: str) -> list[list[int]] | None:
    """The words that differ, as [[kept, deleted, inserted], ...] in characters (code points) from the beginning.

    By difflib, word by word. [] if the texts are the same; None if they are too long to compare.
    """
    if before == after:
        return []
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(old), len(new)) > MOST_WORDS:
        return None
    result = []
    kept = 0
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new).get_opcodes():
        deleted, inserted = sum(map(len, old[i:j])), sum(map(len, new[k:m]))
        if tag == "equal":
            kept = deleted
        else:
            result.append([kept, deleted, inserted])
            kept = 0
    return result
