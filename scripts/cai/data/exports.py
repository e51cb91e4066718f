"""Rows of the steps in the formats that trainers read, with a ledger of what became of every input row.

    export = Export(["revised.jsonl"], "trl-sft", rounds="last", keep=frozenset({"copy"}))
    export.records, export.ledger, export.counts

Which texts are used is decided as in sft.py (selection.py), and which pairs as in dpo.py (preferences.py). Leaves out
tokenizing, and any change of a text.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from cai.base.errors import InputError
from cai.base.hashing import sha256_text
from cai.data import lineage
from cai.data.dialogue import as_messages, prompt_text
from cai.data.preferences import check_sides, find_fault, is_pair
from cai.data.prefills import prefill_of
from cai.data.readers import Row
from cai.data.reading import AS_THEY_ARE, Reading
from cai.data.selection import Selection, check_revised, choose_response, choose_revisions
from cai.data.sources import Source, first_row

Message = dict[str, str]

Record = tuple[Row, list[str]]  # a row of the output, and its texts except the prompt

Convert = Callable[[Row], Row | str]  # from a record to an engine's row, or to why there is none

# {target: the kinds of rows that it is made from}
TARGETS = {
    "trl-sft": ("revised", "answered"),
    "trl-preference": ("judged",),
    "trl-prompt": ("revised", "answered", "judged", "prompts"),
    "openai": ("revised", "answered"),
    "sharegpt": ("revised", "answered"),
}

# {kind: (how an error names its rows, the fields that they have)}
KINDS = {
    "judged": ("pairs of judge.py", ("prompt", "chosen", "rejected")),
    "revised": ("rows of revise.py", ("prompt", "rounds")),
    "answered": ("rows with a response", ("prompt", "response")),
    "prompts": ("prompts", ("prompt",)),
}

KEPT, DUPLICATE = "kept", "duplicate"

# Why a prompt or an answer with a prefill is left out: other trainers would train on the prefill, or answer without it.
PREFILLED = "prefilled: the format has no beginning that is given"

OUTCOMES = (KEPT, lineage.LEFT_OUT, DUPLICATE, lineage.FAILED, lineage.INVALID)

SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of a row: a key of `KINDS`."""
    if is_pair(row):
        return "judged"
    if "rounds" in row:
        return "revised"
    return "answered" if row.get("response") is not None else "prompts"


def read_source(inputs: Sequence[str], target: str, limit: int | None, reading: Reading) -> tuple[Source, str]:
    """(the rows to export, their kind). InputError for rows that the target is not made from."""
    row = first_row(inputs, reading)
    kind = kind_of(row) if row else TARGETS[target][0]  # without a good row, the source reports the bad ones
    if kind == "judged" and "response_a" in row and "chosen" not in row:
        raise InputError("pairs without a preference", where=", ".join(inputs), remedy="Run judge.py on them first")
    if kind not in TARGETS[target]:
        others = [name for name, kinds in TARGETS.items() if kind in kinds]
        first_step = {"judged": "judge.py", "revised": "revise.py"}.get(TARGETS[target][0])
        raise InputError(
            f"{KINDS[kind][0]}, and --to {target}",
            where=", ".join(inputs),
            expected=" or ".join(KINDS[name][0] for name in TARGETS[target]),
            remedy=f"For these rows: --to {' or '.join(others)}; for this format, run {first_step} on them first",
        )
    checks = {"judged": check_sides, "revised": check_revised}
    return Source(inputs, require=KINDS[kind][1], limit=limit, check=checks.get(kind), reading=reading), kind


# --- formats ------------------------------------------------------------------------------------------------


def _messages(prompt: str | list[Message]) -> list[Message]:
    """The prompt's messages with their role and content alone."""
    return [{"role": message["role"], "content": message["content"]} for message in as_messages(prompt)]


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _as_sharegpt(messages: list[Message]) -> Row:
    return {"conversations": [{"from": SHAREGPT_NAMES[m["role"]], "value": m["content"]} for m in messages]}


_CONVERSATIONS: dict[str, Callable[[list[Message], list[Message]], Row]] = {
    "trl-sft": lambda prompt, answer: {"prompt": prompt, "completion": answer},
    "openai": lambda prompt, answer: {"messages": prompt + answer},
    "sharegpt": lambda prompt, answer: _as_sharegpt(prompt + answer),
}


def make_records(
    row: Row, target: str, kind: str, rounds: str, keep: Set[str], convert: Convert | None = None
) -> tuple[dict[int, Record], Selection]:
    """({round: record}, why others are left out); round 0 is a response, a pair or a prompt.

    convert: from a record to an engine's row, or to the reason for which there is none.
    """
    records, selection = _make_records(row, target, kind, rounds, keep)
    if convert is None:
        return records, selection
    rows = {number: (convert(record), texts) for number, (record, texts) in records.items()}
    reasons = [line for line, _ in rows.values() if isinstance(line, str)]
    kept = {number: (line, texts) for number, (line, texts) in rows.items() if not isinstance(line, str)}
    return kept, replace(selection, left_out=[*selection.left_out, *reasons])


def _make_records(row: Row, target: str, kind: str, rounds: str, keep: Set[str]) -> tuple[dict[int, Record], Selection]:
    prompt = _messages(row["prompt"])
    if prefill_of(row) and target != "trl-preference":  # its pairs hold the prefill on both sides
        return {}, Selection(left_out=[PREFILLED])
    if target == "trl-prompt":
        return {0: ({"prompt": prompt}, [])}, Selection()
    if kind == "judged":
        if fault := find_fault(row):
            return {}, Selection(left_out=[fault])
        sides = {side: _answer(row[side]) for side in ("chosen", "rejected")}
        label = {"p_chosen": row["p_chosen"]} if "p_chosen" in row else {}
        return {0: ({"prompt": prompt, **sides, **label}, [row["chosen"], row["rejected"]])}, Selection()
    selection = choose_revisions(row, rounds, keep) if kind == "revised" else choose_response(row, keep)
    record = _CONVERSATIONS[target]
    return {n: (record(prompt, _answer(text)), [text]) for n, text in selection.texts.items()}, selection


# --- duplicates ---------------------------------------------------------------------------------------------


def _key(parts: Any) -> str:
    return sha256_text(json.dumps(parts, sort_keys=True))


class _Duplicates:
    """What was exported before: texts, and prompts with the input row that they came from."""

    def __init__(self, keep_repeats: bool):
        self._keep_repeats = keep_repeats
        self._texts: dict[str, str] = {}  # {prompt and texts: id of the row}
        self._prompts: dict[str, tuple[str | None, str]] = {}  # {prompt: (prompt_id, id of the row)}
        self.same_prompt = 0

    def find(self, row: Row, texts: list[str]) -> str | None:
        """Why a record is a duplicate of an earlier one; None for a new one, which is then remembered.

        White space counts as one space. The same prompt in two input rows of generate.py (two `prompt_id`) is a
        duplicate too; several samples of one input row are not.
        """
        prompt = [[message["role"], " ".join(message["content"].split())] for message in as_messages(row["prompt"])]
        prompt_key, text_key = _key(prompt), _key([prompt, [" ".join(text.split()) for text in texts]])
        if text_key in self._texts:
            return f"the same as {self._texts[text_key]}"
        if prompt_key in self._prompts:
            prompt_id, row_id = self._prompts[prompt_key]
            if not self._keep_repeats and prompt_id is not None and row.get("prompt_id") not in (None, prompt_id):
                return f"the same prompt as {row_id}"
            self.same_prompt += row_id != row["id"]
        else:
            self._prompts[prompt_key] = (row.get("prompt_id"), row["id"])
        self._texts[text_key] = row["id"]
        return None


# --- the whole ----------------------------------------------------------------------------------------------


class Export:
    """The records of one output and its ledger, held in memory.

    Args:
        inputs, limit, reading: as `Source` takes them.
        target: a key of `TARGETS`.
        rounds, keep: as `choose_revisions` takes them.
        keep_repeats: keep a prompt that a later input row repeats, with its different answer.
        convert: as `make_records` takes it.

    Attributes:
        records: rows of the output. texts: of each, its prompt and the responses in it.
        ledger: one row per input row, in the order of the input.
        counts: for the summary; the outcomes add up to `lines`, the length of the ledger.
        origins, notes: see `lineage.Lineage`.
        digest: of the input and of what the ledger says of earlier steps.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        target: str,
        *,
        rounds: str = "last",
        keep: Set[str] = frozenset(),
        keep_repeats: bool = False,
        limit: int | None = None,
        reading: Reading = AS_THEY_ARE,
        convert: Convert | None = None,
    ):
        source, self.kind = read_source(inputs, target, limit, reading)
        rows = lineage.trace(source, "export")
        self.origins, self.notes = rows.origins, rows.notes
        self.records: list[Row] = []
        self.texts: list[tuple[list[Message], list[str]]] = []
        self._kept_flags: Counter[str] = Counter()
        self._fallbacks = 0
        entries = [vars(entry).copy() for entry in rows.entries]
        self.digest = sha256_text(json.dumps([source.digest, entries]))
        duplicates = _Duplicates(keep_repeats)
        used: dict[str, Row] = {}
        for row in source:
            records, selection = make_records(row, target, self.kind, rounds, keep, convert)
            used[row["id"]] = self._take(row, records, selection, duplicates)
        self.ledger = [
            _ledger_row(entry, used.get(entry["id"]) if entry["step"] is None else None) for entry in entries
        ]
        self.counts = self._count(duplicates)
        if not self.records:
            raise InputError(
                f"nothing to export ({self.counts})",
                where=", ".join(inputs),
                remedy="Look at the rows, or keep flagged ones with --keep REASON" if self.kind == "revised" else None,
            )

    def _take(self, row: Row, records: Mapping[int, Record], selection: Selection, duplicates: _Duplicates) -> Row:
        """Add the records of a row that are not duplicates; returns what the ledger says of the row."""
        kept: dict[int, int] = {}
        outcome, reason = lineage.LEFT_OUT, ", ".join(dict.fromkeys(selection.left_out))
        for number, (record, texts) in records.items():
            if duplicate := duplicates.find(row, texts):
                outcome, reason = DUPLICATE, duplicate
                continue
            self.records.append(record)
            self.texts.append((_messages(row["prompt"]), texts))
            kept[number] = len(self.records)
        ended = {"outcome": KEPT, "reason": None} if kept else {"outcome": outcome, "reason": reason}
        flags = [flag for number in kept for flag in selection.flags.get(number, ())]
        self._kept_flags.update(flags)
        self._fallbacks += bool(kept) and selection.falls_back
        prompt, written = prompt_text(row["prompt"]), list(kept.values())
        unmatched = [n for n, round_ in enumerate(row.get("rounds") or (), 1) if round_.get("speaks", 0) is None]
        return {
            "prompt": prompt,
            **ended,
            "flags": flags,
            "unmatched": unmatched,
            "rounds": list(kept),
            "output_lines": written,
        }

    def _count(self, duplicates: _Duplicates) -> dict[str, Any]:
        outcomes = Counter(line["outcome"] for line in self.ledger)
        output_lines = {number for line in self.ledger for number in line["output_lines"]}
        adds_up = sum(outcomes[name] for name in OUTCOMES) == len(self.ledger)
        if not adds_up or output_lines != set(range(1, len(self.records) + 1)):
            raise AssertionError(f"the ledger does not add up: {dict(outcomes)}, {len(self.records)} records")
        reasons = Counter(line["reason"] for line in self.ledger if line["outcome"] == lineage.LEFT_OUT)
        of_rounds = {"kept_flags": dict(self._kept_flags.most_common()), "fallbacks": self._fallbacks}
        return {
            "rows": len({(line["file"], line["line"]) for line in self.ledger}),
            "lines": len(self.ledger),
            **{name: outcomes[name] for name in OUTCOMES},
            "left_out_by": dict(reasons.most_common()),
            **(of_rounds if self.kind == "revised" else {}),
            "same_prompt": duplicates.same_prompt,
            "written": len(self.records),
        }


def _ledger_row(entry: Row, used: Row | None) -> Row:
    ended = {"prompt": None, "outcome": entry["outcome"], "reason": entry["reason"]}
    ended |= {name: [] for name in ("flags", "unmatched", "rounds", "output_lines")}
    position = {name: entry[name] for name in ("file", "line", "id")}
    return {**position, "step": entry["step"] or "export", **(ended if used is None else used)}
