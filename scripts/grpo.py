"""Train a policy by comparing its own responses to one prompt: GRPO or RLOO, on TRL's trainers.

    python scripts/grpo.py --input prompts.jsonl --model runs/sft --reward-model runs/reward --output runs/grpo

Neither needs a value model: the other responses of the group are the baseline (GRPO: arXiv 2402.03300; RLOO:
2402.14740). The reward is a reward model's score, or a judge's verdict on the spot, without a reward model
(direct RLAIF, arXiv 2309.00267): the log-odds that a response is better than another one to the same prompt.
Leaves out rewards that are code, and a reference other than --model as it is now.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import os
import shlex
from pathlib import Path

import click

from cai.base import cli, hashing
from cai.base.errors import CaiError, InputError, shorten
from cai.base.hashing import hashed_seed
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import outputs, preferences, readers, sources
from cai.data.dialogue import as_messages
from cai.data.rounds import text_of_round
from cai.models import estimate, loading, local
from cai.models.scorer import Scorer, check_reward_model
from cai.report import hub
from cai.stats import drawing
from cai.steps import judging
from cai.train import alarms, common, updates

_positive = click.IntRange(min=1)
_above_0 = click.FloatRange(min=0, min_open=True)
_from_0 = click.FloatRange(min=0)

# Of the judge's probability: beyond it the log-odds say little more, and one of them would outweigh its group.
CERTAIN = 0.995
SAMPLES, CURVES, ALARMS = "samples.jsonl", "curves.png", "alarms.json"

# TRL's names for what a row of metrics.jsonl says, after ours, which are those of ppo.py.
FIGURES = {
    "score": "score",
    "score_std": "reward_std",
    "reward": "reward",
    "label_mass": "label_mass",
    "kl": "kl",
    "entropy": "entropy",
    "response_length": "completions/mean_length",
    "eos_rate": "completions/clipped_ratio",
    "groups_alike": "frac_reward_zero_std",
    "clip_fraction": "clip_ratio/region_mean",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--algorithm",
    type=click.Choice(["grpo", "rloo"]),
    default="grpo",
    show_default=True,
    help="grpo: rewards scaled within the group, KL in the loss. rloo: leave-one-out, KL in the reward.",
)
@click.option("--reward-model", metavar="MODEL", default=None, help="A reward model, from reward_model.py.")
@click.option(
    "--judge",
    metavar="MODEL",
    default=None,
    help="Instead: the judge model whose verdicts are the reward: a folder, a hub id, or `tiny`.",
)
@click.option(
    "--against",
    metavar="FILE",
    default=None,
    help="Responses to the same prompts that the judge compares with, from generate.py (with --judge).",
)
@cli.options("constitution")
@click.option(
    "--template",
    default="preference",
    show_default=True,
    metavar="NAME|FILE",
    help="Template of the judge's forced choice.",
)
@click.option("--updates", type=_positive, default=100, show_default=True, help="Rounds of sampling and training.")
@click.option(
    "--prompts-per-update", type=_positive, default=16, show_default=True, help="Prompts drawn for an update."
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Responses to each prompt: the group that is compared.",
)
@click.option("--epochs", type=_positive, default=1, show_default=True, help="Passes over the rows of an update.")
@click.option("--minibatches", type=_positive, default=1, show_default=True, help="Optimizer steps in a pass.")
@click.option(
    "--batch-size",
    type=_positive,
    default=8,
    show_default=True,
    help="Rows in one forward pass, on each process; made smaller until it divides a minibatch.",
)
@click.option("--learning-rate", type=_above_0, default=1e-6, show_default=True, help="At the start; falls to 0.")
@click.option(
    "--kl-coef",
    type=_from_0,
    default=0.04,
    show_default=True,
    help="Weight of the KL to the reference; 0 does without, which is TRL's default for GRPO.",
)
@click.option(
    "--temperature",
    type=_above_0,
    default=0.7,
    show_default=True,
    help="Of the sampling. It is the policy at this temperature that is trained.",
)
@click.option("--max-new-tokens", type=_positive, default=256, show_default=True, help="Longest response, in tokens.")
@click.option(
    "--missing-eos-penalty",
    type=_from_0,
    default=1.0,
    show_default=True,
    help="Taken off the score of a response that did not end.",
)
@click.option(
    "--trl",
    default="",
    metavar="FLAGS",
    help="TRL's own flags of GRPOConfig or RLOOConfig, in quotes: '--use_vllm true --vllm_mode colocate'.",
)
@click.option(
    "--lora/--full", "lora", default=False, show_default=True, help="Train low-rank adapters, or all weights."
)
@click.option("--lora-rank", type=_positive, default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Updates between two saved states to resume from; 0: none.",
)
@click.option(
    "--samples-every",
    type=_positive,
    default=10,
    show_default=True,
    help="Updates between two looks at the responses, in samples.jsonl.",
)
@alarms.options
@hub.option
@estimate.gpu_option
@cli.options("seed", "limit", "device", "dtype", "json", "dry_run", "overwrite")
def main(
    inputs,
    output,
    model,
    algorithm,
    reward_model,
    judge,
    against,
    constitution,
    template,
    trl,
    lora,
    lora_rank,
    save_every,
    alarm,
    stop_on,
    gpu,
    limit,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
    **chosen,
):
    """Train a policy by comparing its own responses to one prompt: GRPO or RLOO.

    \b
    Example:
      python scripts/grpo.py --input scripts/cai/tiny/prompts/train.jsonl --model runs/sft \\
          --reward-model runs/reward --output runs/grpo --updates 20 --learning-rate 1e-4
    """
    check_usage(reward_model, judge, against)
    loading.check_model(model)
    source = sources.Source(inputs, limit=limit)
    sizes, watch = batch_sizes(chosen), alarms.Watch(alarms.limits(alarm), stop_on)
    asked = {"reward_model": hashing.identity(reward_model)} if reward_model else {}
    question = references = None
    if judge:
        question = GroupQuestion(load_constitution(constitution), load_template(template), seed=chosen["seed"])
        references, digest = read_references(against, source)
        asked = {
            "judge": hashing.identity(judge),
            "against": digest,
            "constitution": question.constitution.sha256,
            "template": question.template.sha256,
        }
    fingerprint = {
        "model": hashing.identity(model),
        "input": source.digest,
        "algorithm": algorithm,
        **asked,
        "trl": trl,
        "lora_rank": lora_rank if lora else None,
        "dtype": dtype,
        # A run stopped for want of memory may go on in smaller batches, and one stopped by an alarm without it.
        **{name: value for name, value in chosen.items() if name != "batch_size"},
    }
    folder = outputs.claim_folder(
        output, command="grpo", fingerprint=fingerprint, overwrite=overwrite, inputs=[*inputs, *filter(None, [against])]
    )
    following = f"python scripts/evaluate.py --model {output} --input PROMPTS --output FIGURES"
    if dry_run:
        found = plan(
            model,
            reward_model or judge,
            [as_messages(row["prompt"]) for row in source],
            chosen,
            sizes,
            lora_rank=lora_rank if lora else None,
            gpu=gpu,
            device=device,
        )
        cli.finish({"output": output, **found, **hub.planned()}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts, **hub.push(output)}, as_json=as_json, next_command=following)
        return

    loading.choose_device(device)
    kind, config = make_config(
        algorithm,
        trl,
        common.trainer_arguments(
            output,
            learning_rate=chosen["learning_rate"],
            batch_size=sizes["batch"],
            gradient_accumulation=sizes["accumulation"],
            save_steps=save_every * sizes["per_update"],
            seed=chosen["seed"],
            device=device,
            dtype=dtype,
            lora=lora,
            **sampling_arguments(chosen, sizes),
        ),
    )
    chat = loading.load_chat(model)
    policy = loading.load_policy(model, device, dtype, lora=lora, dropout=False)
    from cai.train.prompts import encode_prompts

    prompts = encode_prompts([as_messages(row["prompt"]) for row in source], chat, policy, chosen["max_new_tokens"])
    if judge:
        engine = loading.load_engine(judge, batch_size=4 * chosen["batch_size"], device=device, dtype=dtype)
        scorer = JudgeReward(engine, question, references)
    else:
        engine = None
        scorer = ModelReward(reward_model, chat, device, dtype, 4 * chosen["batch_size"])
    order = common.training_order([1] * len(prompts), 1, sizes["prompts"] / len(prompts), chosen["seed"])
    with folder:
        trainer = make_trainer(
            kind,
            config,
            policy,
            chat,
            prompts,
            order,
            scorer,
            output,
            chosen,
            sizes,
            watch,
            common.lora_config(lora_rank) if lora else None,
        )
        try:
            common.run_trainer(trainer, output)
        finally:
            draw_curves(output)
        policy.generation_config = trainer.own_generation_config
        common.save_trained(trainer, chat.tokenizer, output)
        if loading.is_main_process():
            counts = {"prompts": source.count, **summary(output, trainer.state.global_step)}
            manifest = folder.finish(counts, **local.fast_path(engine))
    if loading.is_main_process():
        cli.finish(
            {"output": output, **counts, "seconds": manifest["seconds"], **hub.push(output)},
            as_json=as_json,
            next_command=following,
        )


# --- before the start ------------------------------------------------------------------------------------


def check_usage(reward_model, judge, against) -> None:
    """InputError unless it is clear what rewards."""
    if bool(reward_model) == bool(judge):
        raise InputError("what rewards is not clear", expected="one of: --reward-model MODEL; --judge MODEL")
    if bool(judge) != bool(against):
        raise InputError(
            "--judge goes with --against FILE, the responses it compares with",
            where="--against",
            remedy="Make them: python scripts/generate.py --model MODEL --input PROMPTS --output FILE",
        )
    if judge:
        loading.check_model(judge)
    else:
        check_reward_model(reward_model)


def batch_sizes(chosen: dict) -> dict:
    """Every count that follows from the settings.

    rows: of an update, over all processes. accumulation: forward passes to an optimizer step on each process,
    of `batch` rows. generations: forward passes to a round of sampling (TRL's steps_per_generation).
    per_update: optimizer steps. prompts: drawn in the whole run.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, parts = chosen["prompts_per_update"] * chosen["samples"], chosen["minibatches"] * processes
    if rows % parts:
        raise InputError(
            f"{rows} responses an update do not divide by {parts} (minibatches and processes)",
            where="--prompts-per-update",
            expected=f"with --samples, a multiple of {parts}",
        )
    share = rows // parts
    batch = max(size for size in range(1, min(share, chosen["batch_size"]) + 1) if share % size == 0)
    return {
        "rows": rows,
        "batch": batch,
        "accumulation": share // batch,
        "generations": rows // processes // batch,
        "per_update": chosen["epochs"] * chosen["minibatches"],
        "prompts": chosen["updates"] * chosen["prompts_per_update"],
    }


def plan(model: str, rewarding: str, prompts: list, chosen: dict, sizes: dict, **sizing) -> dict:
    """What `--dry-run` says: updates, optimizer steps, and `estimate.rl_plan`."""
    episodes = chosen["updates"] * sizes["rows"]
    # Under LoRA the policy without its adapters is the reference.
    reference = [] if sizing["lora_rank"] or not chosen["kl_coef"] else [model]
    return {
        "prompts": len(prompts),
        "updates": chosen["updates"],
        "episodes": episodes,
        "steps": chosen["updates"] * sizes["per_update"],
        **estimate.rl_plan(
            model,
            prompts,
            episodes=episodes,
            new_tokens=chosen["max_new_tokens"],
            epochs=chosen["epochs"],
            batch_size=sizes["batch"],
            sampled=sizes["batch"] * sizes["generations"],
            frozen=[rewarding, *reference],
            **sizing,
        ),
    }


def sampling_arguments(chosen: dict, sizes: dict) -> dict:
    """What TRL is told beyond any trainer's arguments."""
    return {
        "max_steps": chosen["updates"] * sizes["per_update"],
        "num_generations": chosen["samples"],
        "steps_per_generation": sizes["generations"],
        "num_iterations": chosen["epochs"],
        "max_completion_length": chosen["max_new_tokens"],
        "temperature": chosen["temperature"],
        "beta": chosen["kl_coef"],
        "shuffle_dataset": False,  # the prompts are laid out in their order
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        # One row of metrics an update, and checkpoints between updates only.
        "logging_steps": sizes["per_update"],
        "logging_first_step": False,
        "logging_nan_inf_filter": False,
    }


def make_config(algorithm: str, flags: str, arguments: dict):
    """(TRL's trainer class, its config): ours, and what TRL's own flags add.

    Raises InputError for a flag that TRL does not know, that an option here decides, or that TRL refuses.
    """
    import trl
    from transformers import HfArgumentParser

    name = algorithm.upper()
    config_class = getattr(trl, f"{name}Config")

    def wrong(message: str) -> InputError:
        return InputError(shorten(message, 300), where="--trl", expected=f"flags of TRL's {name}Config")

    class Parser(HfArgumentParser):
        def error(self, message):
            raise wrong(message)

    unset = object()
    namespace = argparse.Namespace(**{field.name: unset for field in dataclasses.fields(config_class)})
    try:
        words = shlex.split(flags)
        parsed = vars(Parser(config_class, add_help=False, allow_abbrev=False).parse_args(words, namespace))
        given = {key: value for key, value in parsed.items() if value is not unset}
        if taken := sorted(given.keys() & arguments.keys()):
            raise wrong(f"{', '.join(taken)}: decided by the options of this command")
        config = config_class(**arguments, **given)
    except ValueError as error:
        raise wrong(str(error)) from error
    if config.use_vllm and importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed", where="--trl", remedy="pip install 'trl[vllm]', or leave it out")
    return getattr(trl, f"{name}Trainer"), config


# --- what is rewarded ------------------------------------------------------------------------------------


class ModelReward:
    """The score of a reward model. InputError unless it reads the policy's tokens."""

    def __init__(self, path: str, policy_chat, device, dtype, batch_size: int):
        chat = loading.load_chat(path)
        if chat.tokenizer.get_vocab() != policy_chat.tokenizer.get_vocab():
            raise InputError(
                "another tokenizer than the policy's",
                where=path,
                expected=f"the tokenizer of {policy_chat.name}",
                remedy="Train it from the policy's own checkpoint",
            )
        # What is frozen needs no float32 where the device has bfloat16, which is what `lora` says of a base.
        model = loading.load_reward_model(path, device, dtype, lora=True).to(loading.best_device(device))
        model.config.get_text_config().pad_token_id = chat.tokenizer.pad_token_id
        self.scorer = Scorer(chat, model.eval(), batch_size, 1.0)

    def __call__(self, rows, update, conversations, responses) -> tuple[list[float | None], dict[str, float]]:
        """(a score each, None where its context is too short; no further figures)."""
        return self.scorer.scores(list(zip(conversations, responses, strict=True))), {}


class GroupQuestion(judging.Question):
    """One principle for a group: responses that compete with each other are judged by the same one."""

    def principles(self, comparison: dict):
        return super().principles({"id": comparison["group"]})


class JudgeReward:
    """The log-odds that a response is better than another one to its prompt, by a judge in both orders.

    p is what judge.py writes as the soft label, so log p/(1−p) is the difference of scores that a reward model
    would be trained to (Bradley and Terry), without one. The other response is the same for a whole group and
    cancels out of its baseline; the mean reward is how far the policy has come to surpass those responses.

    Args:
        engine: has `score`.
        question: constitution, template and seed.
        references: for each prompt, the responses to compare with, one of which is drawn for a group.
    """

    def __init__(self, engine, question: GroupQuestion, references: list[list[str]]):
        self.engine, self.question, self.references = engine, question, references

    def __call__(self, rows, update, conversations, responses) -> tuple[list[float | None], dict[str, float]]:
        """(a reward each, None where the judge's context is too short; {label_mass: what the labels have of
        the probability: near 0, the judge was about to say something else})."""
        rewards: list[float | None] = [None] * len(rows)
        comparisons, masses = [], []
        for place, (row, prompt, response) in enumerate(zip(rows, conversations, responses, strict=True)):
            others = self.references[row]
            other = others[hashed_seed("reference", self.question.seed, row, update) % len(others)]
            comparison = {
                "id": str(place),
                "group": f"{row}/{update}",
                "prompt": prompt,
                "response_a": response,
                "response_b": other,
            }
            if preferences.is_tie(comparison):
                rewards[place] = 0.0
            else:
                comparisons.append(comparison)
        for comparison, verdicts in judging.judge(self.engine, comparisons, self.question):
            p = None if verdicts is None else judging.soft_label(verdicts)
            if p is not None:
                p = judging.clamp(p, 1 - CERTAIN, CERTAIN)
                rewards[int(comparison["id"])] = math.log(p / (1 - p))
                masses += [one["mass"] for one in verdicts if "mass" in one]
        return rewards, ({"label_mass": sum(masses) / len(masses)} if masses else {})


def read_references(against: str, source) -> tuple[list[list[str]], str]:
    """(responses to each prompt of `source`, digest of the file). InputError for a prompt without any."""
    given = sources.Source([against], require=("prompt", "response"))
    found: dict[str, list[str]] = {}
    for row in given:
        found.setdefault(_key(row), []).append(text_of_round(row))
    without = [row for row in source if _key(row) not in found]
    if without:
        raise InputError(
            f"{len(without)} of {source.count} prompts have no response to compare with, "
            f"{shorten(without[0]['id'])!r} among them",
            where=against,
            remedy="Make them: python scripts/generate.py --model MODEL --input PROMPTS --output FILE",
        )
    return [found[_key(row)] for row in source], given.digest


def _key(row: dict) -> str:
    return json.dumps(as_messages(row["prompt"]), sort_keys=True)


def make_reward(prompts, chat, stops, scorer, output: str, chosen: dict, seen: list):
    """The function that TRL asks for rewards. It also writes samples.jsonl.

    seen: gets the (conversation, response) of every row of the newest update, those of all processes.
    """
    from accelerate.utils import gather_object

    def reward(completion_ids, row, update, trainer_state, log_metric, **_):
        ended = [ids[-1] in stops for ids in completion_ids]
        texts = [
            chat.answer(ids[:-1] if end else ids, continued=False)[0]
            for ids, end in zip(completion_ids, ended, strict=True)
        ]
        scores, figures = scorer(row, update[0], [prompts[i].messages for i in row], texts)
        seen[:] = gather_object([(prompts[i].messages, text) for i, text in zip(row, texts, strict=True)])
        known = [score for score in scores if score is not None]
        if not known or not all(map(math.isfinite, known)):
            raise CaiError(f"no score that is a number, in update {update[0] + 1}")
        log_metric("score", sum(known) / len(known))
        for name, value in figures.items():
            log_metric(name, value)
        if update[0] % chosen["samples_every"] == 0 and trainer_state.is_world_process_zero:
            shown = zip(row, texts, scores, completion_ids, ended, strict=True)
            write_samples(
                output,
                update[0] + 1,
                [
                    {"prompt": prompts[i].messages, "response": text, "score": score, "tokens": len(ids), "ended": end}
                    for i, text, score, ids, end in list(shown)[:4]
                ],
            )
        penalty = chosen["missing_eos_penalty"]
        return [
            None if score is None else score - penalty * (not end) for score, end in zip(scores, ended, strict=True)
        ]

    return reward


def write_samples(output: str, update: int, rows: list[dict]) -> None:
    """Rows of one update to samples.jsonl, in place of any that a stopped run wrote from here on."""
    path = Path(output) / SAMPLES
    kept = [row for _, row in readers.read_jsonl(path) if row["update"] < update] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_jsonl(path, kept + [{"update": update, **row} for row in rows])


# --- training --------------------------------------------------------------------------------------------


def make_trainer(kind, config, policy, chat, prompts, order, scorer, output, chosen, sizes, watch, adapters=None):
    """TRL's trainer over the prompts in `order`, a group of responses each.

    kind, config: from `make_config`. prompts: from `cai.train.prompts.encode_prompts`. scorer: (rows, update,
    conversations, responses) -> (scores, figures).
    """
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig

    from cai.models.chat import chat_stops

    class Checked(kind):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            if not torch.isfinite(loss):
                raise CaiError(
                    f"the loss is not finite at step {self.state.global_step} of {self.state.max_steps}. States saved "
                    "before it are kept. Start anew with a lower --learning-rate, or --dtype float32"
                )
            return loss

    stops = chat_stops(chat, policy)
    # One of its own: a checkpoint's sampling settings would act beside ours. Put back before saving.
    own, policy.generation_config = policy.generation_config, GenerationConfig(eos_token_id=sorted(stops))
    # Weights gone wrong are to be found by the loss, which names the remedy, and not by the sampling.
    sampling = {"stop_token_ids": sorted(stops)} if config.use_vllm else {"remove_invalid_values": True}
    config.generation_kwargs = {**(config.generation_kwargs or {}), **sampling}
    # Rendered here and not by TRL, so that text from a record can't end a turn.
    texts = [chat.render(prompt.messages) for prompt in prompts]
    per_update = chosen["prompts_per_update"]
    rows = [{"prompt": texts[i], "row": i, "update": n // per_update} for n, i in enumerate(order)]
    seen: list[tuple] = []
    trainer = Checked(
        model=policy,
        reward_funcs=make_reward(prompts, chat, stops, scorer, output, chosen, seen),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=plain(chat.tokenizer),
        peft_config=adapters,
        callbacks=[update_log(output, config, sizes, watch, seen)],
    )
    trainer.own_generation_config = own
    return trainer


def plain(tokenizer):
    """A copy of the tokenizer that adds no token by itself: a rendered prompt has all of its own."""
    kind = type(tokenizer)

    class Plain(kind):
        def __call__(self, *arguments, **named):
            return super().__call__(*arguments, **{**named, "add_special_tokens": False})

    Plain.__name__ = kind.__name__  # it is written into states
    copied = copy.copy(tokenizer)
    copied.__class__ = Plain
    return copied


def named(logs: dict, step: int, sizes: dict) -> dict:
    """TRL's figures of one update under the names of ppo.py."""
    row = {name: logs[key] for name, key in FIGURES.items() if logs.get(key) is not None}
    row["eos_rate"] = 1 - row["eos_rate"]
    if "kl" in row:  # TRL's is that of a token
        row["kl"] *= row["response_length"]
    update = step // sizes["per_update"]
    return {"update": update, "episodes": update * sizes["rows"], **row}


def update_log(output: str, config, sizes: dict, watch: alarms.Watch, seen: list):
    """metrics.jsonl with a row an update, the alarms, and score, KL and length beside the progress bar.

    In every process alike, so that all of them stop where an alarm is to stop the run.
    """
    raised = set()

    def place(args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    class UpdateLog(common.MetricsLog):
        def on_train_begin(self, args, state, control, **_):
            super().on_train_begin(args, state, control)
            saved = place(args, state) / ALARMS
            if state.global_step and saved.exists():
                watch.restore(json.loads(saved.read_text(encoding="utf-8")))

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                (place(args, state) / ALARMS).write_text(json.dumps(watch.state()), encoding="utf-8")

        def on_log(self, args, state, control, logs=None, **_):
            if not logs or "reward" not in logs:
                super().on_log(args, state, control, logs)
                return
            row = {**named(logs, state.global_step, sizes), "kl_coef": config.beta}
            found = watch.look(row, *zip(*seen, strict=True))
            row |= {**watch.figures, **({"alarms": [alarm.name for alarm in found]} if found else {})}
            super().on_log(args, state, control, row)
            if self.bar is not None:
                shown = {"score": "score", "kl": "kl", "length": "response_length"}
                self.bar.set_postfix({short: f"{row[name]:.3g}" for short, name in shown.items() if name in row})
                for alarm in found:
                    if alarm.name not in raised:
                        cli.warn(f"alarm in update {row['update']}: {alarm.message}.")
                    raised.add(alarm.name)
            if stopping := watch.stops(found):
                last = common.last_state(Path(args.output_dir))
                where = f"The last policy saved is {last}" if last else "No state was saved yet"
                raise CaiError(
                    f"stopped in update {row['update']} by --stop-on {stopping.name}: {stopping.message}. {where}."
                )

    return UpdateLog(output, "train")


def draw_curves(output: str) -> None:
    """The figures of the run as a picture, beside metrics.jsonl."""

    if loading.is_main_process():
        drawing.curves(Path(output) / CURVES, updates.figures_of(output), Path(output).name)


def summary(output: str, steps: int) -> dict:
    """The counts of the manifest, from the rows of metrics.jsonl."""
    from cai.train.updates import figures_of

    rows = figures_of(output)
    shown = ("score", "kl", "response_length", "eos_rate", "entropy")
    return {
        "updates": rows[-1]["update"],
        "episodes": rows[-1]["episodes"],
        "steps": steps,
        "score_at_first": rows[0]["score"],
        **{name: rows[-1][name] for name in shown if name in rows[-1]},
        "alarms": sorted({name for row in rows for name in row.get("alarms", ())}),
    }


if __name__ == "__main__":
    main()
