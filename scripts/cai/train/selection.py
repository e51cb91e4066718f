"""Which saved policy of a run to keep: the best on harmful and on other prompts, without a loss on either.

    candidates = Candidates(prompts, "runs/ppo", "runs/ppo/checkpoints")
    candidates.add(20, scores, model.trained_state)
    candidates.best()

Leaves out how the prompts are answered and scored (train/ppo.py).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cai.base import hashing, paths
from cai.base.errors import InputError, shorten
from cai.data import outputs, prefills, readers, sources
from cai.data.kinds import AXES, KINDS
from cai.train.prompts import Prompt

FROM_INPUT = "the input"  # what --select says without a file

MOST_FROM_INPUT = 64  # prompts of each axis

SELECTION = "selection.jsonl"


def read_prompts(select: str, source: sources.Source, seed: int) -> list[dict]:
    """The rows to choose by: those of a file, or some of the input's, drawn by hashing.

    Args:
        select: a file, or `FROM_INPUT`.
        source: the input.
    Raises:
        InputError: the bundled held-out prompts, an unknown kind, or no prompt for one of the axes.
    """
    if select == FROM_INPUT:
        where = ", ".join(source.inputs)
        rows = [row for row in source if row.get("kind") is not None]
        rows.sort(key=lambda row: hashing.hashed_seed("select", seed, row["id"]))
    elif Path(select).resolve() == (paths.TINY / "prompts" / "heldout.jsonl").resolve():
        raise InputError(
            "these prompts are for the evaluation",
            where=select,
            remedy="Choose by others, or the figures of the chosen policy flatter it",
        )
    else:
        where, rows = select, list(sources.Source([select], require=("prompt", "kind")))
    for row in rows:
        if row["kind"] not in KINDS:
            raise InputError(
                f"the kind {shorten(row['kind'])!r} of row {shorten(row['id'])}",
                where=where,
                expected=f"one of {', '.join(KINDS)}",
            )
    chosen = []
    for axis, kinds in AXES.items():
        of_axis = [row for row in rows if row["kind"] in kinds]
        if not of_axis:
            raise InputError(
                f"no prompt to measure {axis} on",
                where=where,
                expected=f"prompts of the kind {' or '.join(kinds)}",
                remedy="Give --select a FILE whose rows have a kind",
            )
        chosen += of_axis[:MOST_FROM_INPUT] if select == FROM_INPUT else of_axis
    return chosen


def digest(rows: Sequence[Mapping]) -> str:
    """What identifies the rows to choose by: other prompts, kinds or prefills are another choice."""
    read = [[row["id"], row["kind"], prefills.conversation_of(row)] for row in rows]
    return hashing.sha256_text(json.dumps(read, ensure_ascii=False))


def axis_means(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The mean score on each axis of `AXES`: over the harmful prompts, and over all others."""
    return {axis: _mean(_of_axis(axis, kinds, scores)) for axis in AXES}


def choose_update(kinds: Sequence[str], candidates: Mapping[int, Sequence[float]]) -> int:
    """The candidate with the largest sum of both axes among those that lost on neither.

    A candidate has lost on an axis if it is below the start by more than two standard errors of the paired
    difference: all candidates answer the same prompts. The start has lost nothing, so that one can always be chosen.

    Args:
        kinds: of the prompts.
        candidates: update -> a score for each prompt. The smallest update is the start.
    """
    start = candidates[min(candidates)]
    best, highest = min(candidates), -math.inf
    for update in sorted(candidates):
        has_lost, total = False, 0.0
        gains = [score - before for score, before in zip(candidates[update], start, strict=True)]
        for axis in AXES:
            of_axis = _of_axis(axis, kinds, gains)
            mean = _mean(of_axis)
            variance = sum((gain - mean) ** 2 for gain in of_axis) / max(len(of_axis) - 1, 1)
            has_lost |= mean < -2 * math.sqrt(variance / len(of_axis))
            total += mean
        if not has_lost and total > highest:
            best, highest = update, total
    return best


def _of_axis(axis: str, kinds: Sequence[str], numbers: Sequence[float]) -> list[float]:
    return [number for kind, number in zip(kinds, numbers, strict=True) if kind in AXES[axis]]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


class Candidates:
    """The policies of a run that may be chosen: the scores of each in selection.jsonl, the weights of the best.

    Args:
        prompts: with their kinds; each candidate answers all of them.
        output: folder of selection.jsonl.
        states: folder of the weights.
    """

    def __init__(self, prompts: Sequence[Prompt], output: str | Path, states: str | Path):
        self.prompts, self.states = list(prompts), Path(states)
        self.kinds = [prompt.kind for prompt in self.prompts]
        self.path = Path(output) / SELECTION

    def rows(self) -> list[dict]:
        """One row per candidate so far: update, a mean per axis, scores."""
        return [row for _, row in readers.read_jsonl(self.path)] if self.path.exists() else []

    def best(self, before: float = math.inf) -> int | None:
        """The update whose policy is chosen among those `before` an update; None without a candidate."""
        scores = {row["update"]: row["scores"] for row in self.rows() if row["update"] < before}
        return choose_update(self.kinds, scores) if scores else None

    def add(self, update: int, scores: Sequence[float], read_state: Callable[[], dict]) -> None:
        """Write a candidate's scores, and its weights if no candidate before it did better.

        Args:
            update: a candidate of this update and those after it are replaced.
            scores: one for each prompt.
            read_state: () -> the weights to save.
        """
        from safetensors.torch import save_file

        before = self.best(update)
        new = {"update": update, **axis_means(self.kinds, scores), "scores": scores}
        outputs.write_jsonl(self.path, [*(row for row in self.rows() if row["update"] < update), new])
        best = self.best()
        self.states.mkdir(parents=True, exist_ok=True)
        if best == update:
            save_file(read_state(), self.weights(update), metadata={"format": "pt"})
        # The best of the state before stays until this one is saved: a killed run continues from there.
        for file in {*self.states.glob("candidate-*.safetensors")} - {self.weights(best), self.weights(before)}:
            file.unlink()

    def weights(self, update: int | None) -> Path:
        return self.states / f"candidate-{update}.safetensors"
