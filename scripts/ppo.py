"""Train a policy against a reward model with PPO: the reinforcement learning stage (paper, section 4).

    python scripts/ppo.py --input prompts.jsonl --model runs/sft --reward-model runs/reward --output runs/ppo

The policy is kept near the reference by a KL penalty at every token. Defaults are those of Huang et al.
(arXiv 2403.17031) but for the rows of an update, 512 there. A reward is a model, or `module:function`, which is
code of yours and is run as such. Alarms say what goes wrong, in plain words; `--stop-on` makes them stop the run,
and `--select` takes the policy that did best on harmful and on other prompts, not the last one. Read samples.jsonl.
"""

import os
import shutil
from itertools import zip_longest
from pathlib import Path

import click

from cai.base import cli, hashing
from cai.base.errors import InputError, shorten
from cai.base.paths import TINY
from cai.data import outputs, sources
from cai.data.dialogue import as_messages
from cai.data.kinds import AXES
from cai.models import estimate, scorer
from cai.models.loading import (
    best_device,
    check_model,
    choose_device,
    find_model,
    is_classifier,
    is_main_process,
    load_chat,
    load_engine,
    load_policy,
    load_reward_model,
)
from cai.models.local import fast_path_field
from cai.report import hub
from cai.stats import drawing
from cai.train import alarms, common, updates
from cai.train.prompts import encode_prompts
from cai.train.rewards import RIGHT, Judge, Total, function, function_identity, is_function

CURVES = "curves.png"
FROM_INPUT = "the input"
SELECT_MOST = 64  # prompts of each axis that are taken from the input to choose by

_positive = click.IntRange(min=1)
_above_0 = click.FloatRange(min=0, min_open=True)
_from_0 = click.FloatRange(min=0)
_share = click.FloatRange(0, 1)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--reward-model",
    required=True,
    multiple=True,
    metavar="MODEL|MODULE:FUNCTION",
    help="A reward model, from reward_model.py, or a Python function (conversations, responses) -> scores. "
    "Repeatable: their weighted sum.",
)
@click.option(
    "--reward-weight",
    "weights",
    multiple=True,
    type=float,
    help="Weight of each --reward-model, in their order. Default: 1 each.",
)
@click.option(
    "--ref-model",
    metavar="MODEL",
    default=None,
    help="What the KL penalty is measured against. Default: --model as it is now.",
)
@click.option(
    "--value-head",
    is_flag=True,
    help="A value head on the policy, instead of a value model that begins as the reward model. "
    "Takes half the time and memory.",
)
@click.option("--updates", type=_positive, default=100, show_default=True, help="Rounds of sampling and training.")
@click.option(
    "--prompts-per-update",
    type=_positive,
    default=128,
    show_default=True,
    help="Prompts drawn for an update, one response each.",
)
@click.option("--epochs", type=_positive, default=4, show_default=True, help="Passes over the rows of an update.")
@click.option(
    "--minibatches",
    type=_positive,
    default=1,
    show_default=True,
    help="Optimizer steps in a pass; their rows are equal in number.",
)
@click.option(
    "--batch-size",
    type=_positive,
    default=8,
    show_default=True,
    help="Rows in one forward pass, on each process. Changes memory and speed, not the result.",
)
@click.option(
    "--generation-batch-size",
    type=_positive,
    default=128,
    show_default=True,
    help="Rows sampled at once, on each process.",
)
@click.option("--learning-rate", type=_above_0, default=3e-6, show_default=True, help="At the start; falls to 0.")
@click.option("--value-learning-rate", type=_above_0, default=None, help="The value model's. Default: --learning-rate.")
@click.option("--kl-coef", type=_from_0, default=0.05, show_default=True, help="Weight of the KL penalty.")
@click.option(
    "--kl-estimator",
    type=click.Choice(["k1", "k3"]),
    default="k1",
    show_default=True,
    help="k1: the log-ratio, unbiased. k3: never negative, varies less.",
)
@click.option(
    "--kl-target",
    type=_above_0,
    default=None,
    help="KL of a response to steer --kl-coef to. Default: the coefficient stays.",
)
@click.option("--clip-range", type=_above_0, default=0.2, show_default=True, help="How far the ratio counts.")
@click.option(
    "--value-clip-range",
    type=_above_0,
    default=0.2,
    show_default=True,
    help="How far a value may move from its old one.",
)
@click.option("--vf-coef", type=_from_0, default=0.1, show_default=True, help="Weight of the value loss.")
@click.option("--gamma", type=_share, default=1.0, show_default=True, help="Discount of later rewards.")
@click.option("--lam", type=_share, default=0.95, show_default=True, help="Lambda of the advantage estimation.")
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
    "--scale-scores",
    is_flag=True,
    help="Divide scores by their standard deviation over the run so far, which fixes what --kl-coef means.",
)
@click.option(
    "--lora/--full", "lora", default=False, show_default=True, help="Train low-rank adapters, or all weights."
)
@click.option("--lora-rank", type=_positive, default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--merge/--no-merge",
    default=True,
    show_default=True,
    help="Write adapters merged into the weights, or alone, beside the name of their base.",
)
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
@click.option(
    "--judge",
    metavar="MODEL|MODULE:FUNCTION",
    default=None,
    help="Scores each update's responses but rewards nothing: a second reward model, a function, or a chat "
    "model, which is asked what a response does (prompts then need a `kind`).",
)
@click.option(
    "--select",
    is_flag=False,
    flag_value=FROM_INPUT,
    default=None,
    metavar="[FILE]",
    help="Take the saved state that did best on harmful and on other prompts alike, by the judge, else by "
    "the reward. Prompts with a `kind` are those of FILE, else some of the input's; never those "
    "that you evaluate on.",
)
@alarms.options
@click.option(
    "--report-to",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "trackio"]),
    help="Send the figures to a tracker as well, which must be installed. Repeatable.",
)
@hub.option
@estimate.gpu_option
@cli.options("seed", "limit", "device", "dtype", "json", "dry_run", "overwrite")
def main(
    inputs,
    output,
    model,
    reward_model,
    weights,
    ref_model,
    value_head,
    lora,
    lora_rank,
    merge,
    save_every,
    judge,
    select,
    alarm,
    stop_on,
    report_to,
    gpu,
    limit,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
    **chosen,
):
    """Train a policy against a reward model with PPO.

    \b
    Example:
      python scripts/ppo.py --input scripts/cai/tiny/prompts/train.jsonl --model runs/sft \\
          --reward-model runs/reward --output runs/ppo --updates 20 --learning-rate 5e-5
    """
    for name in filter(None, (model, ref_model)):
        check_model(name)
    if judge and not is_function(judge):
        find_model(judge)
    source = sources.Source(inputs, limit=limit)
    limits, trackers = alarms.limits(alarm), check_trackers(report_to)
    rewards = check_rewards(reward_model, weights, value_head)
    selection = None if select is None else read_selection(select, source, chosen["seed"])
    if selection and not save_every:
        raise InputError("--select with --save-every 0", expected="states to choose from")
    fingerprint = {
        "model": hashing.identity(model),
        "reward_model": rewards_identity(rewards),
        "ref_model": hashing.identity(ref_model or model),
        "input": source.digest,
        "value_head": value_head,
        "lora_rank": lora_rank if lora else None,
        "dtype": dtype,
        # A run stopped for want of memory may go on in smaller batches, and one stopped by an alarm without it.
        **{name: value for name, value in chosen.items() if not name.endswith("batch_size")},
        **({"judge": identity(judge)} if judge else {}),
        **({"select": [row["id"] for row in selection], "save_every": save_every} if selection else {}),
        **({} if merge else {"merge": False}),
    }
    folder = outputs.claim_folder(output, command="ppo", fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    following = f"python scripts/evaluate.py --model {output} --input PROMPTS --output FIGURES"
    if dry_run:
        prompts = [as_messages(row["prompt"]) for row in source]
        found = plan(
            model,
            list(rewards),
            prompts,
            chosen,
            value_head,
            ref_model,
            lora_rank=lora_rank if lora else None,
            gpu=gpu,
            device=device,
        )
        cli.finish({"output": output, **found, **hub.planned()}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts, **hub.push(output)}, as_json=as_json, next_command=following)
        return

    choose_device(device)
    parts = load(
        list(source),
        model,
        rewards,
        ref_model,
        judge=judge,
        selection=selection,
        value_head=value_head,
        lora_rank=lora_rank if lora else None,
        device=device,
        dtype=dtype,
        chosen=chosen,
    )
    with folder:
        from cai.train.ppo import PPOTrainer
        from cai.train.updates import Stopped

        arguments = common.trainer_arguments(
            output,
            learning_rate=chosen["learning_rate"],
            batch_size=chosen["batch_size"],
            save_steps=save_every,
            seed=chosen["seed"],
            device=device,
            dtype=dtype,
            lora=lora,
            report_to=trackers,
            run_name=Path(output).name,
        )
        if "tensorboard" in trackers:  # beside the metrics, not among the states that are dropped at the end
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output) / "tensorboard"))
        trainer = PPOTrainer(**parts, arguments=arguments, output=output, watch=alarms.Watch(limits, stop_on))
        stopped = {}
        try:
            common.run_trainer(trainer, output)
        except Stopped as error:
            draw_curves(trainer, output)
            if not selection:
                raise
            cli.warn(str(error))
            stopped = {"stopped": str(error)}
        draw_curves(trainer, output)
        counts = {"prompts": source.count, **save(trainer, output, merge=merge), **stopped}
        manifest = folder.finish(counts, fast_path=fast_path_field(trainer.slow_reason))
    if is_main_process():
        cli.finish(
            {"output": output, **counts, "seconds": manifest["seconds"], **hub.push(output)},
            as_json=as_json,
            next_command=following,
        )


# --- what was asked for ----------------------------------------------------------------------------------


def check_trackers(names) -> list[str] | str:
    """The trackers in Trainer's terms. InputError for one that is not installed."""
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed", where="--report-to", remedy=f"pip install {name}")
    return sorted(set(names)) or "none"


def check_rewards(specs, weights, value_head: bool) -> dict[str, float]:
    """{reward: weight}, each a model or `module:function` that is there. InputError otherwise."""
    if weights and len(weights) != len(specs):
        raise InputError(
            f"{len(weights)} weights for {len(specs)} rewards",
            where="--reward-weight",
            expected="one for each --reward-model, in their order",
        )
    if len(set(specs)) < len(specs):
        raise InputError("the same reward twice", where="--reward-model", remedy="Name it once, with its weight")
    for spec in specs:
        if is_function(spec):
            function(spec)
        else:
            check_reward_model(spec)
    if not value_head and all(map(is_function, specs)):
        raise InputError(
            "a function is no value model to begin with",
            where="--reward-model",
            expected="a reward model among the rewards, or --value-head",
            remedy="Add --value-head",
        )
    return dict(zip_longest(specs, weights, fillvalue=1.0))


def identity(spec: str):
    """What a reward or a judge is known by in the manifest."""
    return function_identity(spec) if is_function(spec) else hashing.identity(spec)


def rewards_identity(rewards: dict[str, float]):
    """The same of all rewards; of one that counts once, its own."""
    found = [[identity(spec), weight] for spec, weight in rewards.items()]
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else found


def read_selection(select: str, source, seed: int) -> list[dict]:
    """The prompts with a kind that the policy is chosen by: those of a file, or some of the input's, by hashing.

    InputError for the bundled held-out prompts, a kind that is none, and where one of the two axes has no prompt.
    """
    if select != FROM_INPUT:
        if Path(select).resolve() == (TINY / "prompts" / "heldout.jsonl").resolve():
            raise InputError(
                "these prompts are for the evaluation",
                where=select,
                remedy="Choose by others, or the figures of the chosen policy flatter it",
            )
        rows = list(sources.Source([select], require=("prompt", "kind")))
    else:
        rows = [row for row in source if row.get("kind") is not None]
        rows.sort(key=lambda row: hashing.hashed_seed("select", seed, row["id"]))
    where = ", ".join(source.inputs) if select == FROM_INPUT else select
    for row in rows:
        if row["kind"] not in RIGHT:
            raise InputError(
                f"the kind {shorten(row['kind'])!r} of row {shorten(row['id'])}",
                where=where,
                expected=f"one of {', '.join(RIGHT)}",
            )
    chosen = []
    for axis, kinds in AXES.items():
        own = [row for row in rows if row["kind"] in kinds]
        if not own:
            raise InputError(
                f"no prompt to measure {axis} on",
                where=where,
                expected=f"prompts of the kind {' or '.join(kinds)}",
                remedy="Give --select a FILE whose rows have a kind",
            )
        chosen += own[:SELECT_MOST] if select == FROM_INPUT else own
    return chosen


def plan(model, rewards: list[str], prompts: list, chosen: dict, value_head: bool, ref_model, **sizing) -> dict:
    """What `--dry-run` says: updates, optimizer steps, and `estimate.rl_plan`."""
    from cai.train.ppo import Settings

    settings = Settings(**chosen)
    scorers = [spec for spec in rewards if not is_function(spec)]
    # Under LoRA the policy without its adapters is the reference, unless another is named.
    reference = [] if sizing["lora_rank"] and ref_model is None else [ref_model or model]
    return {
        "prompts": len(prompts),
        "updates": settings.updates,
        "episodes": settings.episodes,
        "steps": settings.steps,
        **estimate.rl_plan(
            model,
            prompts,
            episodes=settings.episodes,
            new_tokens=settings.max_new_tokens,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            sampled=settings.generation_batch_size,
            value_model=None if value_head else scorers[0],
            frozen=[*scorers, *reference],
            **sizing,
        ),
    }


# --- the parts, and what is left of them -----------------------------------------------------------------


def load(
    rows, model, rewards: dict[str, float], ref_model, *, judge, selection, value_head, lora_rank, device, dtype, chosen
) -> dict:
    """The trainer's parts: policy and value model, prompts, chat, rewards, judge, settings, reference.

    Raises InputError for parts that do not fit one another.
    """
    from transformers import set_seed

    from cai.train import ppo

    settings = ppo.Settings(**chosen, processes=int(os.environ.get("WORLD_SIZE", "1")))
    set_seed(settings.seed)  # of the adapters
    chat = load_chat(model)
    checkpoints = [spec for spec in rewards if not is_function(spec)]
    for other in filter(None, (*checkpoints, ref_model)):
        check_tokenizer(other, chat)
    lora = lora_rank is not None
    policy = load_policy(model, device, dtype, lora=lora)

    def encoded(rows):
        return encode_prompts(
            [as_messages(row["prompt"]) for row in rows],
            chat,
            policy,
            settings.max_new_tokens,
            [row.get("kind") for row in rows],
        )

    drawn_from, selection = encoded(rows), encoded(selection) if selection else []
    loading = {"batch_size": 4 * settings.batch_size, "device": device, "dtype": dtype}
    found = {spec: load_reward(spec, **loading) for spec in rewards}
    value_model = None
    if not value_head:
        value_model = load_reward_model(checkpoints[0], device, dtype, lora=lora)
        if not hasattr(value_model, "score"):
            raise InputError(
                f"{type(value_model).__name__} has no linear head named `score`",
                where=checkpoints[0],
                expected="a decoder with a classification head",
                remedy="Train one with reward_model.py",
            )
    reference = None
    if ref_model is not None or not lora:
        reference = load_policy(ref_model or model, device, dtype, lora=True)
    if lora:
        from peft import get_peft_model

        policy = get_peft_model(policy, common.lora_config(lora_rank))
        if value_model is not None:
            value_model = get_peft_model(value_model, common.lora_config(lora_rank, "SEQ_CLS"))
    names = [spec if is_function(spec) else Path(spec).name for spec in rewards]
    names = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    return {
        "model": ppo.PolicyAndValue(policy, value_model, temperature=settings.temperature, kl_coef=settings.kl_coef),
        "prompts": drawn_from,
        "chat": chat,
        "settings": settings,
        "reference": reference,
        "reward": Total(
            {name: (found[spec], weight) for name, (spec, weight) in zip(names, rewards.items(), strict=True)}
        ),
        "judge": load_judge(judge, [*drawn_from, *selection], **loading) if judge else None,
        "selection": selection,
    }


def load_reward(spec: str, batch_size: int, device: str | None, dtype: str):
    """A reward model on its device, or the function that the text names."""
    if is_function(spec):
        return function(spec)
    # What is frozen needs no float32 where the device has bfloat16, which is what `lora` says of a base.
    model = load_reward_model(spec, device, dtype, lora=True).to(best_device(device))
    return scorer.RewardModel(model, load_chat(spec), batch_size)


def load_judge(spec: str, prompts, batch_size: int, device: str | None, dtype: str):
    """The judge: a function, a reward model, or a chat model, for which every prompt must have a kind."""
    if is_function(spec) or is_classifier(spec):
        return load_reward(spec, batch_size, device, dtype)
    lacking = [prompt for prompt in prompts if prompt.kind not in RIGHT]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(prompts)} prompts have no kind, such as "
            f"{shorten(lacking[0].messages[-1]['content'])!r}",
            where="--judge",
            expected=f"one of {', '.join(RIGHT)}: a chat model is asked whether a response is right for it",
            remedy="Add the kinds, or take a reward model or a function as the judge",
        )
    engine = load_engine(spec, batch_size=batch_size, device=device, dtype=dtype)
    return Judge(engine, {str(prompt.messages): prompt.kind for prompt in prompts})


def check_reward_model(path: str) -> None:
    """InputError unless the folder holds a sequence classifier."""
    if not is_classifier(path):
        raise InputError(
            "not a reward model",
            where=path,
            expected="a sequence classifier with one score",
            remedy="Train one with reward_model.py",
        )


def check_tokenizer(path: str, chat) -> None:
    """InputError unless a model reads the policy's tokens."""
    if load_chat(path).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise InputError(
            "another tokenizer than the policy's",
            where=path,
            expected=f"the tokenizer of {chat.name}",
            remedy="Train it from the policy's own checkpoint",
        )


def save(trainer, output: str, merge: bool = True) -> dict:
    """Write the policy to `output`, drop the states to resume from, and return the counts of the manifest."""

    selected = {"selected_update": trainer.load_best()} if trainer.selection else {}
    wrapper = trainer.accelerator.unwrap_model(trainer.model)
    trainer.check_finite(wrapper)
    if trainer.is_world_process_zero():
        if merge:
            common.save_checkpoint(wrapper.policy, trainer.chat.tokenizer, output)
        else:
            wrapper.policy.save_pretrained(output)
            trainer.chat.tokenizer.save_pretrained(output)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(Path(output) / common.CHECKPOINTS, ignore_errors=True)
    rows = updates.figures_of(output)
    shown = ("score", "kl", "response_length", "eos_rate", "entropy")
    return {
        "updates": rows[-1]["update"],
        "episodes": rows[-1]["episodes"],
        "steps": trainer.state.global_step,
        "score_at_first": rows[0]["score"],
        **{name: rows[-1][name] for name in shown},
        **selected,
        "alarms": sorted({name for row in rows for name in row.get("alarms", ())}),
    }


def draw_curves(trainer, output: str) -> None:
    """The figures of the run as a picture, beside metrics.jsonl."""
    from cai.train import updates

    if trainer.is_world_process_zero():
        drawing.curves(Path(output) / CURVES, updates.figures_of(output), Path(output).name)


if __name__ == "__main__":
    main()
