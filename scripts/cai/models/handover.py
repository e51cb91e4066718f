"""What is handed over to an engine: rows, ledger, launch files and the reward model, in one folder.

    handover = Handover("openrlhf", "ppo", terms, export)
    handover.write(Path("handover"))

Leaves out the claim of the folder (data/outputs.py), and what each of the files is like: data/engine_rows.py,
models/launch.py, models/reward_folders.py.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cai.base import cli
from cai.base.errors import InputError
from cai.base.paths import model_path
from cai.data import engine_rows
from cai.data.exports import Export
from cai.data.outputs import write_jsonl
from cai.models import launch, reward_folders, score_check

# What engines lose of our rows and models, and what differs from our own training.
SOFT_LABELS = "The engine trains on chosen and rejected alone: the judge's probabilities (`p_chosen`) are not used."

NOT_IMITATED = (
    "NeMo-RL's reward environment renders a prompt that is rendered already; its scores are not among those that "
    "--check compares."
)


class Handover:
    """The files of one engine and stage.

    Args:
        terms: machines, models, sizes. export: the rows in the engine's format.

    Attributes:
        faults: of the reward model's folder, which the copy does not have.
        summary: counts of this hand-over.
    """

    def __init__(self, engine: str, stage: str, terms: launch.Terms, export: Export):
        self.engine, self.stage, self.terms, self.export = engine, stage, terms, export
        self.faults = reward_folders.find_faults(self._scorer) if terms.reward_model else []
        for fault in self.faults:
            cli.note(f"{terms.reward_model}: {fault.cause}: {fault.detail}")
        self.summary: dict[str, Any] = {"faults": [fault.cause for fault in self.faults]} if terms.reward_model else {}

    @property
    def _scorer(self) -> str:
        return model_path(str(self.terms.reward_model))

    def _notes(self) -> list[str]:
        notes = [SOFT_LABELS] if engine_rows.BASES[self.stage] == "trl-preference" else []
        notes += [f"The reward model had: {fault.cause} ({fault.detail})." for fault in self.faults]
        return [*notes, NOT_IMITATED] if self.engine == "nemo-rl" and launch.is_rl(self.stage) else notes

    def write(self, folder: Path) -> None:
        """Fill an empty folder."""
        engine_rows.write_rows(folder / launch.rows_file(self.engine, self.stage), self.export.records)
        write_jsonl(folder / "ledger.jsonl", self.export.ledger)
        for name, text in launch.launch_files(
            self.engine, self.stage, self.terms, self.export.texts, self._notes()
        ).items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.terms.reward_model:
            is_factory = self.engine == "llamafactory"
            reward_folders.write_folder(self._scorer, folder / "reward", self.faults, value_head=is_factory)

    def check_scores(
        self,
        responses: Sequence[score_check.Response],
        are_pairs: bool,
        *,
        device: str | None,
        dtype: str,
        is_refused: bool,
    ) -> dict[str, Any]:
        """Scores of responses as each engine reads them, from the reward model as it is and as it is exported.

        Args:
            are_pairs: responses alternate as chosen and rejected.
            device, dtype: as the options of the commands.
            is_refused: whether a difference of this engine is an error, or only reported.
        Returns:
            {before, after: as `score_check.check_scores`, engine by engine; and for pairs `prefers_chosen`, a share}.
        Raises:
            InputError: the engine of this hand-over reads other scores from the exported folder.
        """
        check = partial(
            score_check.check_scores, responses=responses, policy=self.terms.model, device=device, dtype=dtype
        )
        before = check(self._scorer)
        bias = reward_folders.read_head(self._scorer).score_row()[1]
        reference = [None if score is None else score - bias for score in before["scores"]]
        with tempfile.TemporaryDirectory(prefix="reward-") as temporary:
            copy = Path(temporary) / "reward"
            reward_folders.write_folder(self._scorer, copy, self.faults, is_temporary=True)
            after = check(str(copy), reference=reference)
        for line in score_check.show_report(before["engines"]):
            cli.note(f"as it is: {line}")
        for line in score_check.show_report(after["engines"]):
            cli.warn(f"as exported: {line}")
        figures: dict[str, Any] = {"before": before["engines"], "after": after["engines"]}
        if are_pairs:
            figures["prefers_chosen"] = share = _share_of_chosen(before["scores"])
            if share is not None and share < 0.5:
                cli.warn(
                    f"the reward model prefers the rejected response in {1 - share:.0%} of the pairs: its label order "
                    "is swapped, or it has learned nothing"
                )
        way = score_check.WAYS.get(self.engine)
        if way and after["engines"][way]["beyond"] and is_refused:
            raise InputError(
                f"{self.engine} reads other scores from it: {score_check.show_report({way: after['engines'][way]})[0]}",
                where=self.terms.reward_model,
                remedy="Look up the cause in references/handover.md, or take an engine that agrees",
            )
        return figures


def _share_of_chosen(scores: Sequence[float | None]) -> float | None:
    """How often the first of two scores is the higher one."""
    pairs = [pair for pair in zip(scores[::2], scores[1::2], strict=False) if None not in pair]
    return sum(chosen > rejected for chosen, rejected in pairs) / len(pairs) if pairs else None  # type: ignore[operator]
