"""What PPO and GRPO share: rows of metrics.jsonl, alarms that stop a run, samples, curves, counts, the dry run.

    log = UpdateLog("runs/ppo", "ppo", settings, watch)
    stopping = log.check(figures, prompts, responses)

`FIGURES` says what a row of metrics.jsonl holds. Leaves out how an update is computed: PPO's is in train/ppo.py,
GRPO's and RLOO's is TRL's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from cai.base import cli, files
from cai.base.errors import CaiError, InputError
from cai.data import outputs, readers
from cai.models import estimate, loading
from cai.stats import drawing
from cai.train import alarms, common

SAMPLES, CURVES, ALARMS = "samples.jsonl", "curves.png", "alarms.json"

SAMPLES_PER_UPDATE = 4

# What a row of metrics.jsonl says of an update; a name is left out where the trainer or the run does not have it. The
# row after the last update holds the Trainer's own figures of the whole run.
FIGURES = {
    "step": "optimizer steps so far",
    "seconds": "since the command was started",
    "update": "number of the update, from 1",
    "episodes": "responses so far",
    "score": "mean score of a response, without the penalty for a missing end",
    "score_std": "standard deviation of the scores (GRPO, RLOO: of the rewards)",
    "score_scale": "what scores are divided by (--scale-scores)",
    "score_NAME": "mean score by one of several rewards, before its weight",
    "overlong": "responses too long for a reward model's or a judge's context; left out if there are none. PPO gives "
    "them the lowest score of the update, GRPO and RLOO leave them out of their group",
    "judge": "mean score by --judge, which rewards nothing (PPO)",
    "judge_std": "its standard deviation",
    "label_mass": "probability that a judge gives to the labels together (GRPO, RLOO with --judge)",
    "kl": "KL to the reference in nats per response: summed over its tokens, averaged over responses",
    "kl_coef": "weight of the KL",
    "reward": "mean reward of a response: its score, the penalty for a missing end, and (PPO) the KL penalty",
    "entropy": "nats per token, estimated from the sampled tokens",
    "response_length": "tokens per response",
    "eos_rate": "share of the responses that came to their end",
    "groups_alike": "share of the groups whose rewards are all the same (GRPO, RLOO)",
    "duplicates": "share of the responses that repeat the response to another prompt",
    "boilerplate": "growth since the start of the share of responses with one phrase, of the phrase that grew most",
    "value": "mean value of a token (PPO)",
    "return": "mean return of a token (PPO)",
    "explained_variance": "of the returns by the values: 1 is perfect, 0 no better than a constant (PPO)",
    "policy_loss": "mean over tokens and epochs (PPO)",
    "value_loss": "mean over tokens and epochs (PPO)",
    "clip_fraction": "share of the tokens whose ratio is outside the clip range",
    "ratio": "mean ratio of the policy to the one that sampled (PPO)",
    "update_kl": "KL to the policy that sampled, nats per token (PPO)",
    "loss": "the Trainer's loss",
    "grad_norm": "of the last optimizer step",
    "learning_rate": "of the last optimizer step",
    "alarms": "names of the alarms raised in this update; left out if there are none",
    "seconds_sampling": "of the update (PPO), as are the following",
    "seconds_scoring": "by the rewards and the judge",
    "seconds_forward": "log-probabilities, values and reference",
    "seconds_training": "forward and backward passes, optimizer steps",
}

# What the manifest and the summary repeat from the last row.
LAST_FIGURES = ("score", "kl", "response_length", "eos_rate", "entropy")


@dataclass(frozen=True)
class Settings:
    """The settings that PPO and GRPO share, and every count that follows from them.

    Attributes:
        rows_per_update: responses of an update, over all processes.
        rows_per_step: rows of an optimizer step, on each process; rows_per_pass: of a forward pass.
        accumulation: forward passes per optimizer step, on each process.
        steps, episodes: optimizer steps and responses of the run.
    """

    updates: int = 100
    prompts_per_update: int = 16
    epochs: int = 1
    minibatches: int = 1
    batch_size: int = 8
    processes: int = 1
    learning_rate: float = 1e-6
    kl_coef: float = 0.04
    temperature: float = 0.7
    max_new_tokens: int = 256
    missing_eos_penalty: float = 1.0
    samples_every: int = 10
    seed: int = 0

    samples = 1  # responses per prompt; no field, for PPO has no other number

    def __post_init__(self):
        parts = self.minibatches * self.processes
        if self.rows_per_update % parts:
            raise InputError(
                f"{self.rows_per_update} responses per update do not divide by {parts} (minibatches and processes)",
                where="--prompts-per-update",
                expected=f"with {self.samples} per prompt, a multiple of {parts} responses",
            )

    @property
    def rows_per_update(self) -> int:
        return self.prompts_per_update * self.samples

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_update // self.minibatches // self.processes

    @property
    def rows_per_pass(self) -> int:
        return self.batch_size

    @property
    def accumulation(self) -> int:
        return math.ceil(self.rows_per_step / self.rows_per_pass)

    @property
    def steps_per_update(self) -> int:
        return self.epochs * self.minibatches

    @property
    def steps(self) -> int:
        return self.updates * self.steps_per_update

    @property
    def episodes(self) -> int:
        return self.updates * self.rows_per_update


class Stopped(CaiError):
    """An alarm named by --stop-on has stopped the run."""


class UpdateLog(common.MetricsLog):
    """metrics.jsonl with one row per update, alarms, and score, KL and length beside the progress bar.

    It runs in every process, so that all of them stop where an alarm stops the run.

    Args:
        output, label: see `MetricsLog`.
        settings: has `updates` and `steps_per_update`.
        watch: raises the alarms, and says which of them stop the run.
    Attributes:
        alarms: of the newest update.
        raised: alarm -> the update in which it was first raised.
    """

    def __init__(self, output: str | Path, label: str, settings, watch: alarms.Watch):
        super().__init__(output, label)
        self.settings, self.watch = settings, watch
        self.alarms: list[alarms.Alarm] = []
        self.raised: dict[str, int] = {}

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / ALARMS
        if state.global_step and saved.exists():
            self.watch.restore(json.loads(saved.read_text(encoding="utf-8")))

    def is_current(self, row: dict, step: int) -> bool:
        # A run that an alarm stopped wrote the row of an update before its steps were made.
        return super().is_current(row, step) and row.get("update", 0) <= step // self.settings.steps_per_update

    def on_log(self, args, state, control, logs=None, **_):
        is_update = bool(logs) and "score" in logs
        if is_update and self.alarms:  # added here, because the trackers take numbers only
            logs = {**logs, "alarms": [alarm.name for alarm in self.alarms]}
        super().on_log(args, state, control, logs)
        if is_update and self.bar is not None:
            names = {"score": "score", "kl": "kl", "length": "response_length"}
            postfix = {short: f"{logs[name]:.3g}" for short, name in names.items() if name in logs}
            self.bar.set_postfix(postfix, refresh=self.bar.fp.isatty())

    def check(self, figures: dict, prompts: Sequence, responses: Sequence[str]) -> alarms.Alarm | None:
        """Raise the alarms of an update, each with a warning the first time.

        Args:
            figures: of the row; what the watch counts in the texts is added.
            prompts, responses: of the update, in the same order.
        Returns:
            The alarm that stops the run, or None.
        """
        self.alarms = self.watch.look(figures, prompts, responses)
        figures |= self.watch.figures
        for alarm in self.alarms:
            if alarm.name not in self.raised and loading.is_main_process():
                cli.warn(f"alarm in update {figures['update']}: {alarm.message}.")
            self.raised.setdefault(alarm.name, figures["update"])
        return self.watch.stops(self.alarms)

    def stop(self, alarm: alarms.Alarm, update: int, states: str | Path) -> NoReturn:
        """Raise `Stopped`, which names the newest saved policy in the folder `states`."""
        if self.bar is not None:
            self.bar.close()
        raise Stopped(
            f"stopped in update {update} of {self.settings.updates} by --stop-on {alarm.name}: {alarm.message}. "
            f"{common.describe_last_state(states)}"
        )

    def save_alarms(self, state: str | Path) -> None:
        """Write into a saved state what a resumed run's alarms compare with."""
        files.write_text(Path(state) / ALARMS, json.dumps(self.watch.state()))


def read_figures(output: str | Path) -> list[dict]:
    """The rows of metrics.jsonl that stand for an update."""
    path = Path(output) / common.METRICS
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return [row for row in rows if "update" in row]


def write_samples(output: str | Path, update: int, rows: Sequence[dict]) -> None:
    """Write rows of one update to samples.jsonl, in place of any that a stopped run wrote from this update on."""
    path = Path(output) / SAMPLES
    kept = [row for _, row in readers.read_jsonl(path) if row["update"] < update] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_jsonl(path, kept + [{"update": update, **row} for row in rows])


def draw_curves(output: str | Path) -> None:
    """Draw the figures of the run as curves.png, beside metrics.jsonl."""
    if loading.is_main_process():
        drawing.curves(Path(output) / CURVES, read_figures(output), Path(output).name)


def summarise(output: str | Path, steps: int) -> dict:
    """The counts of the manifest, from the rows of metrics.jsonl."""
    rows = read_figures(output)
    return {
        "updates": rows[-1]["update"],
        "episodes": rows[-1]["episodes"],
        "steps": steps,
        "score_at_first": rows[0]["score"],
        **{name: rows[-1][name] for name in LAST_FIGURES if name in rows[-1]},
        "alarms": sorted({name for row in rows for name in row.get("alarms", ())}),
    }


def read_settings(kind: type[Settings], options) -> Settings:
    """The settings of PPO or of GRPO that the options of a command give."""
    names = kind.__dataclass_fields__.keys() & vars(options).keys()
    return kind(**{name: getattr(options, name) for name in names}, processes=common.count_processes())


def identify_settings(settings: Settings, options) -> dict:
    """The options that decide the result: a run that ran out of memory may continue in smaller batches."""
    names = asdict(settings).keys() & vars(options).keys()
    return {name: getattr(options, name) for name in names if not name.endswith("batch_size")}


def plan(options, settings: Settings, prompts: Sequence[list[dict]], **more) -> dict:
    """What `--dry-run` reports: updates, optimizer steps, and `estimate.rl_plan`.

    Args:
        options: of the command.
        more: sampled, value_model and frozen, see `estimate.rl_plan`.
    """
    return {
        "prompts": len(prompts),
        "updates": settings.updates,
        "episodes": settings.episodes,
        "steps": settings.steps,
        **estimate.rl_plan(
            options.model,
            prompts,
            episodes=settings.episodes,
            batch_size=settings.rows_per_pass,
            new_tokens=settings.max_new_tokens,
            epochs=settings.epochs,
            lora_rank=options.lora_rank if options.lora else None,
            gpu=options.gpu,
            device=options.device,
            **more,
        ),
    }
