"""Rows of metrics.jsonl, one per update, and how a run ends early."""

import json
from pathlib import Path

from cai.base.errors import CaiError
from cai.data import outputs, readers
from cai.train import common

SAMPLES = "samples.jsonl"

ALARMS = "alarms.json"


class Stopped(CaiError):
    """An alarm has stopped the run, as it was told to."""


class UpdateLog(common.MetricsLog):
    """metrics.jsonl with the names of an update's alarms, and score, KL and length beside the progress bar.

    Attributes:
        alarms: names of the newest update's alarms.
    """

    def __init__(self, output, label: str, steps_per_update: int):
        super().__init__(output, label)
        self.steps_per_update, self.alarms = steps_per_update, []

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        # A run that an alarm stopped wrote the row of an update before its steps were made.
        if state.is_world_process_zero and state.global_step:
            done = state.global_step // self.steps_per_update
            rows = [row for _, row in readers.read_jsonl(self.path) if row.get("update", 0) <= done]
            outputs.write_jsonl(self.path, rows)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "score" in logs and self.alarms:  # here, because the trackers take numbers only
            logs = {**logs, "alarms": self.alarms}
        super().on_log(args, state, control, logs)
        if self.bar is not None and logs and "score" in logs:
            shown = {"score": "score", "kl": "kl", "length": "response_length"}
            said = {short: f"{logs[name]:.3g}" for short, name in shown.items()}
            self.bar.set_postfix(said, refresh=self.bar.fp.isatty())


def figures_of(output: str | Path) -> list[dict]:
    """The rows of metrics.jsonl that stand for an update."""
    path = Path(output) / common.METRICS
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return [row for row in rows if "update" in row]
