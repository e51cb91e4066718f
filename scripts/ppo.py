"""Train a policy against a reward model with PPO: the reinforcement learning stage (paper, section 4).

    python scripts/ppo.py --input prompts.jsonl --model runs/sft --reward-model runs/reward --output runs/ppo

The policy is kept near the reference by a KL penalty at every token. Defaults are those of Huang et al.
(arXiv 2403.17031) but for the rows of an update, 512 there. Leaves out rewards that are no model, and stopping
by itself: watch `kl`, `entropy` and `response_length` in metrics.jsonl, and read samples.jsonl.
"""

import os
import shutil
from pathlib import Path

import click

from cai import cli, records, training
from cai.engines import check_model
from cai.errors import InputError
from cai.resources import model_path
from cai.templates import as_messages

_positive = click.IntRange(min=1)
_above_0 = click.FloatRange(min=0, min_open=True)
_from_0 = click.FloatRange(min=0)
_share = click.FloatRange(0, 1)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option("--reward-model", required=True, metavar="MODEL", help="A reward model, from reward_model.py.")
@click.option("--ref-model", metavar="MODEL", default=None,
              help="What the KL penalty is measured against. Default: --model as it is now.")
@click.option("--value-head", is_flag=True,
              help="A value head on the policy, instead of a value model that begins as the reward model. "
                   "Takes half the time and memory.")
@click.option("--updates", type=_positive, default=100, show_default=True, help="Rounds of sampling and training.")
@click.option("--prompts-per-update", type=_positive, default=128, show_default=True,
              help="Prompts drawn for an update, one response each.")
@click.option("--epochs", type=_positive, default=4, show_default=True, help="Passes over the rows of an update.")
@click.option("--minibatches", type=_positive, default=1, show_default=True,
              help="Optimizer steps in a pass; their rows are equal in number.")
@click.option("--batch-size", type=_positive, default=8, show_default=True,
              help="Rows in one forward pass, on each process. Changes memory and speed, not the result.")
@click.option("--generation-batch-size", type=_positive, default=128, show_default=True,
              help="Rows sampled at once, on each process.")
@click.option("--learning-rate", type=_above_0, default=3e-6, show_default=True, help="At the start; falls to 0.")
@click.option("--value-learning-rate", type=_above_0, default=None,
              help="The value model's. Default: --learning-rate.")
@click.option("--kl-coef", type=_from_0, default=0.05, show_default=True, help="Weight of the KL penalty.")
@click.option("--kl-estimator", type=click.Choice(["k1", "k3"]), default="k1", show_default=True,
              help="k1: the log-ratio, unbiased. k3: never negative, varies less.")
@click.option("--kl-target", type=_above_0, default=None,
              help="KL of a response to steer --kl-coef to. Default: the coefficient stays.")
@click.option("--clip-range", type=_above_0, default=0.2, show_default=True, help="How far the ratio counts.")
@click.option("--value-clip-range", type=_above_0, default=0.2, show_default=True,
              help="How far a value may move from its old one.")
@click.option("--vf-coef", type=_from_0, default=0.1, show_default=True, help="Weight of the value loss.")
@click.option("--gamma", type=_share, default=1.0, show_default=True, help="Discount of later rewards.")
@click.option("--lam", type=_share, default=0.95, show_default=True, help="Lambda of the advantage estimation.")
@click.option("--temperature", type=_above_0, default=0.7, show_default=True,
              help="Of the sampling. It is the policy at this temperature that is trained.")
@click.option("--max-new-tokens", type=_positive, default=256, show_default=True, help="Longest response, in tokens.")
@click.option("--missing-eos-penalty", type=_from_0, default=1.0, show_default=True,
              help="Taken off the score of a response that did not end.")
@click.option("--lora/--full", "lora", default=False, show_default=True,
              help="Train low-rank adapters, or all weights.")
@click.option("--lora-rank", type=_positive, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--save-every", type=click.IntRange(min=0), default=10, show_default=True,
              help="Updates between two saved states to resume from; 0: none.")
@click.option("--samples-every", type=_positive, default=10, show_default=True,
              help="Updates between two looks at the responses, in samples.jsonl.")
@cli.options("seed", "limit", "device", "dtype", "json", "dry_run", "overwrite")
def main(inputs, output, model, reward_model, ref_model, value_head, lora, lora_rank, save_every, limit, device,
         dtype, as_json, dry_run, overwrite, **chosen):
    """Train a policy against a reward model with PPO.

    \b
    Example:
      python scripts/ppo.py --input scripts/cai/tiny/prompts/train.jsonl --model runs/sft \\
          --reward-model runs/reward --output runs/ppo --updates 20 --learning-rate 5e-5
    """
    source = records.Source(inputs, limit=limit)
    fingerprint = {
        "model": records.identity(model), "reward_model": records.identity(reward_model),
        "ref_model": records.identity(ref_model or model), "input": source.digest, "value_head": value_head,
        "lora_rank": lora_rank if lora else None, "dtype": dtype,
        # A run stopped for want of memory may go on in smaller batches.
        **{name: value for name, value in chosen.items() if not name.endswith("batch_size")},
    }
    folder = records.claim_folder(output, command="ppo", fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    following = f"python scripts/evaluate.py --model {output} --input PROMPTS --output FIGURES"
    if dry_run:
        found = plan(model, reward_model, source.count, chosen, lora, value_head, ref_model is not None)
        cli.finish({"output": output, **found}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts}, as_json=as_json, next_command=following)
        return

    training.choose_device(device)
    parts = load(
        [as_messages(row["prompt"]) for row in source], model, reward_model, ref_model, value_head=value_head,
        lora_rank=lora_rank if lora else None, device=device, dtype=dtype, chosen=chosen,
    )
    with folder:
        from cai.ppo import PPOTrainer

        arguments = training.trainer_arguments(
            output, learning_rate=chosen["learning_rate"], batch_size=chosen["batch_size"],
            save_steps=save_every, seed=chosen["seed"], device=device, dtype=dtype, lora=lora,
        )
        trainer = PPOTrainer(**parts, arguments=arguments, output=output)
        training.run_trainer(trainer, output)
        counts = {"prompts": source.count, **save(trainer, output)}
        manifest = folder.finish(counts)
    if training.is_main_process():
        cli.finish({"output": output, **counts, "seconds": manifest["seconds"]}, as_json=as_json,
                   next_command=following)


def plan(model, reward_model, prompts: int, chosen: dict, lora: bool, value_head: bool, ref_model: bool) -> dict:
    """What `--dry-run` says: rows, optimizer steps, the most tokens that can be sampled, memory (about)."""
    from cai.ppo import Settings

    settings = Settings(**chosen)
    found = {
        "prompts": prompts, "updates": settings.updates, "episodes": settings.episodes, "steps": settings.steps,
        "new_tokens_at_most": settings.episodes * settings.max_new_tokens,
    }
    policy, scorer = training.parameters(model), training.parameters(reward_model)
    if policy is not None and scorer is not None:
        # Bytes a parameter: trained 16 (weights, gradient, two moments), frozen 4; under LoRA 3 and 2.
        trained, frozen = (3, 2) if lora else (16, 4)
        size = trained * (policy + (0 if value_head else scorer)) + frozen * scorer
        size += 0 if lora and not ref_model else frozen * policy
        found["memory_gb_about"] = round(size / 2**30, 2)
    return found


def load(conversations, model, reward_model, ref_model, *, value_head, lora_rank, device, dtype, chosen) -> dict:
    """The trainer's parts: policy and value model, prompts, chat, reward model, settings, reference.

    Raises InputError for parts that do not fit one another.
    """
    from transformers import set_seed

    from cai import ppo

    settings = ppo.Settings(**chosen, processes=int(os.environ.get("WORLD_SIZE", "1")))
    set_seed(settings.seed)  # of the adapters
    chat = training.load_chat(model)
    check_reward_model(reward_model)
    for other in filter(None, (reward_model, ref_model)):
        check_tokenizer(other, chat)
    lora = lora_rank is not None
    policy = training.load_policy(model, device, dtype, lora=lora)
    prompts = ppo.encode_prompts(conversations, chat, policy, settings.max_new_tokens)
    # What is frozen needs no float32 where the device has bfloat16, which is what `lora` says of a base.
    scorer = training.load_reward_model(reward_model, device, dtype, lora=True)
    if not hasattr(scorer, "score"):
        raise InputError(f"{type(scorer).__name__} has no linear head named `score`", where=reward_model,
                         expected="a decoder with a classification head", remedy="Train one with reward_model.py")
    value_model = None if value_head else training.load_reward_model(reward_model, device, dtype, lora=lora)
    reference = None
    if ref_model is not None or not lora:
        reference = training.load_policy(ref_model or model, device, dtype, lora=True)
    if lora:
        from peft import get_peft_model

        policy = get_peft_model(policy, training.lora_config(lora_rank))
        if value_model is not None:
            value_model = get_peft_model(value_model, training.lora_config(lora_rank, "SEQ_CLS"))
    scorer.to(training.best_device(device))
    return {
        "model": ppo.PolicyAndValue(
            policy, value_model, temperature=settings.temperature, kl_coef=settings.kl_coef
        ),
        "prompts": prompts, "chat": chat, "settings": settings, "reference": reference,
        "reward": ppo.RewardModel(scorer, chat, 4 * settings.batch_size),
    }


def check_reward_model(path: str) -> None:
    """InputError unless the folder holds a sequence classifier."""
    from transformers import AutoConfig

    check_model(path, classifier=True)
    kinds = AutoConfig.from_pretrained(model_path(path)).architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"not a reward model ({', '.join(kinds) or 'no architecture'})", where=path,
            expected="a sequence classifier with one score", remedy="Train one with reward_model.py",
        )


def check_tokenizer(path: str, chat) -> None:
    """InputError unless a model reads the policy's tokens."""
    if training.load_chat(path).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise InputError(
            "another tokenizer than the policy's", where=path, expected=f"the tokenizer of {chat.name}",
            remedy="Train it from the policy's own checkpoint",
        )


def save(trainer, output: str) -> dict:
    """Write the policy to `output`, drop the states to resume from, and return the counts of the manifest."""
    from cai import ppo

    wrapper = trainer.accelerator.unwrap_model(trainer.model)
    trainer.check_finite(wrapper)
    if trainer.is_world_process_zero():
        training.save_checkpoint(wrapper.policy, trainer.chat.tokenizer, output)
        shutil.rmtree(Path(output) / training.CHECKPOINTS, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    settings, rows = trainer.settings, ppo.figures_of(output)
    shown = ("score", "kl", "response_length", "eos_rate", "entropy")
    return {
        "updates": settings.updates, "episodes": settings.episodes, "steps": trainer.state.global_step,
        "score_at_first": rows[0]["score"], **{name: rows[-1][name] for name in shown},
    }


if __name__ == "__main__":
    main()
