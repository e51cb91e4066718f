"""Signs of life: what a run over a handful of rows must show before a costly one is begun.

    signs = look([("critique", "runs/smoke/02-critique-1.jsonl"), ("sft", "runs/smoke/sft")])
    dead = [sign for sign in signs if not sign.alive]

`run.py --smoke` runs every step with the real models and settings on a few rows, and then asks here. Each check
reads what a step wrote and says what it saw. A sign that is missing is a reason to read the rows, no proof of a
fault; and all of them together say nothing of how good the result will be.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai.base.errors import CaiError
from cai.data.dialogue import as_messages, prompt_text
from cai.data.readers import read_jsonl
from cai.data.rounds import text_of_round
from cai.models.chat import encode
from cai.models.engine import Sampling
from cai.models.loading import load_engine, release_engines

# Prompts that a smoke run reads: enough to see a difference, few enough for a minute.
LIMIT = 8

# Words that stand in any text, and name nothing.
_SMALL = frozenset(
    [
        "about",
        "also",
        "because",
        "being",
        "could",
        "does",
        "from",
        "have",
        "here",
        "into",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "what",
        "when",
        "which",
        "will",
        "with",
        "would",
        "your",
        "response",
    ]
)


@dataclass(frozen=True)
class Sign:
    """One check: of which step, whether it is as a living step's would be, and what was seen."""

    step: str
    name: str
    alive: bool
    seen: str


def look(steps: Iterable[tuple[str, str]], device: str | None = None) -> list[Sign]:
    """The signs of every step that has any.

    Args:
        steps: (command, what it wrote), such as ("sft", "runs/smoke/sft").
        device: where checkpoints are loaded.
    """
    found = []
    for command, output in steps:
        if command in _OF_ROWS:
            rows = [row for _, row in read_jsonl(output)]
            checks = _OF_ROWS[command] if rows else [_rows]
            found += [Sign(command, *check(rows)) for check in checks]
        elif command in _OF_FOLDERS:
            found.append(Sign(command, *losses(output)))
            found.append(Sign(command, *_OF_FOLDERS[command](output, device)))
    return found


# --- text ---------------------------------------------------------------------------------------------------


def _rows(rows: Sequence[dict]) -> tuple[str, bool, str]:
    return "rows", bool(rows), f"{len(rows)} rows"


def texts(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """Responses that say something, and not the same thing to every prompt."""
    return _varied("responses", [row["response"] for row in rows])


def critiques(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """Critiques that say something, and not the same of every response."""
    return _varied("critiques", [row["rounds"][-1]["critique"] for row in rows])


def naming(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """Half of the critiques or more take up a word of the prompt or the response they are about."""
    named = [
        _words(row["rounds"][-1]["critique"]) & _words(f"{prompt_text(row['prompt'])} {text_of_round(row)}")
        for row in rows
    ]
    count = sum(map(bool, named))
    often = Counter(word for words in named for word in words)
    such = f", such as {', '.join(word for word, _ in often.most_common(3))}" if often else ""
    return "critiques name something", 2 * count >= len(rows), f"{count} of {len(rows)} take up a word{such}"


def revisions(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """Revisions of which one differs from what it revised, at least, and not all are the same."""
    changed, made = 0, []
    for row in rows:
        *before, last = row["rounds"]
        made.append(last["revision"])
        changed += last["revision"].split() != text_of_round({**row, "rounds": before}).split()
    same = len(rows) > 1 and len(set(made)) == 1
    return (
        "revisions differ",
        changed > 0 and not same,
        (f"{changed} of {len(rows)} differ from what they revise" + (", and all are the same" if same else "")),
    )


def form(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """Revisions of which half or fewer are flagged (a copy is no fault of form)."""
    flagged = [set(row["rounds"][-1]["flags"]) - {"copy"} for row in rows]
    count = sum(map(bool, flagged))
    reasons = Counter(reason for one in flagged for reason in one)
    said = f" ({', '.join(f'{reason} {n}' for reason, n in reasons.most_common())})" if reasons else ""
    return "revisions in form", 2 * count <= len(rows), f"{count} of {len(rows)} flagged{said}"


def _varied(name: str, found: Sequence[str]) -> tuple[str, bool, str]:
    written = [text for text in found if text.strip()]
    different = len(set(written))
    alive = 2 * len(written) >= len(found) > 0 and (different > 1 or len(found) == 1)
    return name, alive, f"{len(written)} of {len(found)} not empty, {different} different"


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]{4,}", text.lower()) if word not in _SMALL}


# --- the judge ----------------------------------------------------------------------------------------------


def letters(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """A judge that answers with the first letter sometimes and with the second sometimes."""
    chosen = Counter()
    for row in rows:
        for one in row["verdicts"]:
            if one.get("p_a") is not None:
                first = one["p_a"] if one["order"] == "ab" else 1 - one["p_a"]
                chosen["A" if first > 0.5 else "B"] += 1
    return (
        "judge not stuck on a letter",
        min(chosen["A"], chosen["B"]) > 0,
        (f"A {chosen['A']} times, B {chosen['B']} times"),
    )


def mass(rows: Sequence[dict]) -> tuple[str, bool, str]:
    """A judge whose next token is one of the labels with a tenth of its probability or more."""
    masses = [one["mass"] for row in rows for one in row["verdicts"] if one.get("mass") is not None]
    if not masses:
        return "labels expected", True, "no probabilities to look at"
    mean = math.fsum(masses) / len(masses)
    return "labels expected", mean >= 0.1, f"the labels have {mean:.0%} of the probability"


# --- training -----------------------------------------------------------------------------------------------


def losses(folder: str | Path) -> tuple[str, bool, str]:
    """metrics.jsonl has a loss or more, and every number in it is finite."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return "loss finite", False, f"no {path}"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wrong = sorted(
        {
            name
            for row in rows
            for name, value in row.items()
            if isinstance(value, int | float) and not math.isfinite(value)
        }
    )
    found = [value for row in rows for name, value in row.items() if name.endswith("loss")]
    if wrong:
        return "loss finite", False, f"not finite: {', '.join(wrong)}"
    return "loss finite", bool(found), f"{len(found)} of them, the last {found[-1]:.4g}" if found else "none logged"


def speaks(folder: str | Path, device: str | None = None) -> tuple[str, bool, str]:
    """The checkpoint loads back as a language model and answers."""
    name = "checkpoint loads back"
    talk = [{"role": "user", "content": "Hello. How are you?"}]
    try:
        [(_, made)] = load_engine(str(folder), device=device).generate([talk], Sampling(16, 0), [0])
    except CaiError as error:
        return name, False, str(error)
    finally:
        release_engines()
    return name, made.tokens > 0, f"{made.tokens} tokens: {made.text[:40]!r}"


def scores(folder: str | Path, device: str | None = None) -> tuple[str, bool, str]:
    """The checkpoint loads back as a reward model whose score is a number and depends on the response."""
    from cai.models import chat, loading, scorer

    name, prompt = "checkpoint loads back", as_messages("Hello. How are you?")
    try:
        chat = loading.load_chat(str(folder))
        model = loading.load_reward_model(str(folder), device).to(loading.best_device(device))
    except CaiError as error:
        return name, False, str(error)
    pad = model.config.pad_token_id = chat.tokenizer.pad_token_id
    encoded = [encode(chat, prompt, answer) for answer in ("Well, thank you.", "No. No. No.")]
    sequences = [before + answer for before, answer in encoded]
    one, other = scorer.score_sequences(model, pad, sequences, 2)
    alive = math.isfinite(one) and math.isfinite(other) and one != other
    return name, alive, f"scores {one:.3g} and {other:.3g}"


_Check = Callable[[Sequence[dict]], tuple[str, bool, str]]

_OF_ROWS: dict[str, list[_Check]] = {
    "generate": [texts],
    "critique": [critiques, naming],
    "revise": [revisions, form],
    "judge": [letters, mass],
}

_OF_FOLDERS = {"sft": speaks, "reward_model": scores, "ppo": speaks, "dpo": speaks, "grpo": speaks}
