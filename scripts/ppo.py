"""Train a policy against a reward model with PPO: the reinforcement learning stage (paper, section 4).

    python scripts/ppo.py --input prompts.jsonl --model runs/sft --reward-model runs/reward --output runs/ppo

The policy is kept near the reference by a KL penalty at every token. Defaults are those of Huang et al.
(arXiv 2403.17031) except the rows per update, 512 there. A reward is a model, or `module:function`, which is your code
and is run as such. Alarms describe in plain words what goes wrong; `--stop-on` makes them stop the run, and `--select`
takes the policy that did best on harmful and on other prompts, not the last one. Read samples.jsonl.
"""

import os
from pathlib import Path

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.constitution import frames
from cai.data import prefills, sources
from cai.models import loading, local
from cai.train import alarms, arguments, common, prompts, rewards, selection, too_large, updates


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
    help="The model that the KL penalty is measured against. Default: --model before training.",
)
@click.option(
    "--value-head",
    is_flag=True,
    help="A value head on the policy, instead of a value model that begins as the reward model. "
    "Takes half the time and memory.",
)
@arguments.rl_options(
    prompts_per_update=128, responses="with one response each", epochs=4, learning_rate=3e-6, kl_coef=0.05
)
@arguments.ppo_options
@click.option(
    "--merge/--no-merge",
    default=True,
    show_default=True,
    help="Write adapters merged into the weights, or alone, beside the name of their base.",
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
    flag_value=selection.FROM_INPUT,
    default=None,
    metavar="[FILE]",
    help="Take the saved state that did best on harmful and on other prompts alike, by the judge, else by "
    "the reward. Prompts with a `kind` are those of FILE, else some of the input's; never those "
    "that you evaluate on.",
)
@click.option(
    "--report-to",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "trackio"]),
    help="Send the figures to a tracker as well, which must be installed. Repeatable.",
)
def main(options):
    """Train a policy against a reward model with PPO.

    \b
    Example:
      python scripts/ppo.py --input scripts/cai/tiny/prompts/train.jsonl --model runs/sft \\
          --reward-model runs/reward --output runs/ppo --updates 20 --learning-rate 5e-5
    """
    from cai.train.ppo import PPOTrainer, Settings

    check_models(options)
    source = sources.Source(options.inputs, limit=options.limit, reading=options.reading)
    framing = frames.read_framing(options.frames, options.frame_share, options.seed)
    rows = list(map(framing.apply, source))
    settings = updates.read_settings(Settings, options)
    watch = alarms.watch(options, {} if options.judge else {"judge": "without --judge there is no other score"})
    trackers = common.check_trackers(options.report_to)
    weights = rewards.read_rewards(options.reward_model, options.weights, options.value_head)
    selected = selection.read_prompts(options.select, source, options.seed) if options.select else []
    if selected and not options.save_every:
        raise InputError("--select with --save-every 0", expected="states to choose from")
    run = common.TrainingRun(
        "ppo",
        options,
        {**identify(options, source, settings, weights, selected), **framing.fingerprint},
        inputs=options.inputs,
        next_command=f"python scripts/evaluate.py --model {options.output} --input PROMPTS --output FIGURES",
    )
    if run.report_if_done(lambda: plan(options, settings, weights, rows)):
        return

    parts = load(run, settings, weights, rows, list(map(framing.apply, selected)))
    with run.folder:
        if "tensorboard" in trackers:  # beside the metrics, not among the states that are deleted at the end
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(options.output) / "tensorboard"))
        trainer = PPOTrainer(
            **parts,
            settings=settings,
            arguments=run.arguments(
                save_steps=options.save_every, report_to=trackers, run_name=Path(options.output).name
            ),
            output=options.output,
            watch=watch,
        )
        stopped = {}
        try:
            common.run_trainer(trainer, options.output)
        except updates.Stopped as error:
            if not selected:
                raise
            cli.warn(str(error))
            stopped = {"stopped": str(error)}
        finally:
            updates.draw_curves(options.output)
        chosen = trainer.save_policy(options.output, merge=options.merge)
        counts = updates.summarise(options.output, trainer.state.global_step)
        counts = {"prompts": source.count, **counts, **chosen, **stopped}
        run.finish(counts, fast_path=local.fast_path_field(trainer.slow_reason))


def check_models(options) -> None:
    """Raise InputError for a model that is not there or can't be trained, or whose training would never begin."""
    if options.value_head:
        cli.refuse_options(["value_warmup"], "with --value-head the value model is the policy's own")
    if options.value_warmup >= options.updates:
        raise InputError(
            f"--value-warmup {options.value_warmup} leaves no update for the policy",
            expected=f"fewer than the {options.updates} of --updates",
            remedy="Lower it, or raise --updates",
        )
    loading.check_model(options.model, training=True)
    if options.ref_model:
        loading.check_model(options.ref_model)
    if options.judge and not rewards.is_function(options.judge):
        loading.find_model(options.judge)


def identify(options, source: sources.Source, settings, weights: dict[str, float], selected: list[dict]) -> dict:
    """Everything that decides the result, for the manifest."""
    return {
        "model": hashing.identity(options.model),
        "reward_model": rewards.identify_rewards(weights),
        "ref_model": hashing.identity(options.ref_model or options.model),
        "input": source.digest,
        "value_head": options.value_head,
        **updates.identify_settings(settings, options),
        **({"judge": rewards.identify(options.judge)} if options.judge else {}),
        **({"select": selection.digest(selected), "save_every": options.save_every} if selected else {}),
        **({} if options.merge else {"merge": False}),
    }


def plan(options, settings, weights: dict[str, float], rows: list[dict]) -> dict:
    """What --dry-run reports."""
    (_, *value_model), frozen = models(options, weights)
    figures = updates.plan(
        options,
        settings,
        list(map(prefills.conversation_of, rows)),
        sampled=settings.generation_batch_size,
        value_model=value_model[0] if value_model else None,
        frozen=frozen,
    )
    return {**figures, **too_large.plan(options, *models(options, weights))}


def models(options, weights: dict[str, float]) -> tuple[list[str], list[str]]:
    """(the models that are trained, the policy first; those that are not) of a run."""
    reward_models = [spec for spec in weights if not rewards.is_function(spec)]
    references = [options.ref_model or options.model] if has_reference(options) else []
    return [options.model, *([] if options.value_head else reward_models[:1])], [*reward_models, *references]


def has_reference(options) -> bool:
    """Whether the reference is a model of its own: under LoRA it is the policy without its adapters."""
    return options.ref_model is not None or not options.lora


def load(run: common.TrainingRun, settings, weights: dict[str, float], rows: list[dict], selected: list[dict]) -> dict:
    """The trainer's model, prompts, chat, rewards, judge, reference and selection.

    Raises InputError for parts that do not fit one another.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from cai.train.ppo import PolicyAndValue

    options = run.options
    too_large.check(options, *models(options, weights))
    set_seed(settings.seed)  # of the adapters
    chat = loading.load_chat(options.model)
    if options.ref_model:
        rewards.check_tokenizer(options.ref_model, chat)
    policy = run.load_policy()
    encoded, candidates = (
        prompts.encode_prompts(part, chat, policy, settings.max_new_tokens) for part in (rows, selected)
    )
    scoring = {"batch_size": 4 * settings.batch_size, "device": options.device, "dtype": options.dtype}
    reward = rewards.load_total(weights, chat, **scoring)
    value_model = None if options.value_head else rewards.load_value_model(weights, options)
    reference = run.load_policy(options.ref_model or options.model) if has_reference(options) else None
    for model in filter(None, (value_model, reference)):
        prompts.check_context([*encoded, *candidates], model, settings.max_new_tokens)
    if options.lora:
        policy = get_peft_model(policy, run.adapters(policy))
        if value_model is not None:
            value_model = get_peft_model(value_model, run.adapters(value_model, "SEQ_CLS"))
    judge = rewards.load_judge(options.judge, [*encoded, *candidates], **scoring) if options.judge else None
    return {
        "model": PolicyAndValue(policy, value_model, temperature=settings.temperature, kl_coef=settings.kl_coef),
        "prompts": encoded,
        "chat": chat,
        "reward": reward,
        "reference": reference,
        "judge": judge,
        "selection": candidates,
    }


if __name__ == "__main__":
    main()
