"""Train a policy by comparing its own responses to the same prompt: GRPO or RLOO, on TRL's trainers.

    python scripts/grpo.py --input prompts.jsonl --model runs/sft --reward-model runs/reward --output runs/grpo

Neither needs a value model: the other responses of the group are the baseline (GRPO: arXiv 2402.03300; RLOO:
2402.14740). The reward is a reward model's score; or, without a reward model, a judge's verdict while training
(direct RLAIF, arXiv 2309.00267): the log-odds that a response is better than another one to the same prompt.
Leaves out rewards that are code, and a reference other than --model before training.
"""

import math

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.constitution import files, frames, templates
from cai.data import preferences, prefills, sources
from cai.models import loading, local
from cai.models.scorer import check_reward_model
from cai.steps import judging
from cai.train import alarms, arguments, common, grpo, prompts, rewards, updates

# Bound on the judge's probability: beyond it the log-odds mean little more, and one response would outweigh its group.
CERTAIN = 0.995


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
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Responses to each prompt: the group that is compared.",
)
@arguments.rl_options(
    prompts_per_update=16, responses="with --samples responses each", epochs=1, learning_rate=1e-6, kl_coef=0.04
)
@click.option(
    "--trl",
    default="",
    metavar="FLAGS",
    help="TRL's own flags of GRPOConfig or RLOOConfig, in quotes: '--use_vllm true --vllm_mode colocate'.",
)
def main(options):
    """Train a policy by comparing its own responses to the same prompt: GRPO or RLOO.

    --kl-coef 0 trains without a reference, which is TRL's default for GRPO. --batch-size is lowered to the next
    number that divides a minibatch.

    \b
    Example:
      python scripts/grpo.py --input scripts/cai/tiny/prompts/train.jsonl --model runs/sft \\
          --reward-model runs/reward --output runs/grpo --updates 20 --learning-rate 1e-4
    """
    check_usage(options)
    source = sources.Source(options.inputs, limit=options.limit, reading=options.reading)
    settings = updates.read_settings(grpo.Settings, options)
    absent = {"judge": "only ppo.py has a judge beside the reward"}
    absent |= {} if options.kl_coef else {"kl": "with --kl-coef 0 there is no reference"}
    watch = alarms.watch(options, absent)
    framing = frames.read_framing(options.frames, options.frame_share, options.seed)
    rows = list(map(framing.apply, source))
    question, references, reward_identity = read_reward(options, rows)
    run = common.TrainingRun(
        "grpo",
        options,
        {
            "model": hashing.identity(options.model),
            "input": source.digest,
            "algorithm": options.algorithm,
            **reward_identity,
            "trl": options.trl,
            **framing.fingerprint,
            **updates.identify_settings(settings, options),
        },
        inputs=[*options.inputs, *filter(None, [options.against])],
        next_command=f"python scripts/evaluate.py --model {options.output} --input PROMPTS --output FIGURES",
    )
    if run.report_if_done(lambda: plan(options, settings, rows)):
        return

    trainer_arguments = run.arguments(
        save_steps=options.save_every * settings.steps_per_update, **settings.trainer_arguments()
    )
    trainer_class, config = grpo.make_config(options.algorithm, options.trl, trainer_arguments)
    chat, policy = loading.load_chat(options.model), run.load_policy(dropout=False)
    encoded = prompts.encode_prompts(rows, chat, policy, settings.max_new_tokens)
    scorer = load_scorer(options, chat, question, references)
    with run.folder:
        trainer = grpo.make_trainer(
            trainer_class, config, policy, chat, encoded, scorer, options.output, settings, watch, run.adapters(policy)
        )
        try:
            common.run_trainer(trainer, options.output)
        finally:
            updates.draw_curves(options.output)
        policy.generation_config = trainer.saved_generation_config
        common.save_trained(trainer, chat.tokenizer, options.output)
        counts = {"prompts": source.count, **updates.summarise(options.output, trainer.state.global_step)}
        run.finish(counts, **local.fast_path(getattr(scorer, "engine", None)))


def plan(options, settings: grpo.Settings, rows: list[dict]) -> dict:
    """What --dry-run reports."""
    # Under LoRA the policy without its adapters is the reference.
    reference = [] if options.lora or not options.kl_coef else [options.model]
    return updates.plan(
        options,
        settings,
        list(map(prefills.conversation_of, rows)),
        sampled=settings.rows_per_update // settings.processes,
        frozen=[options.reward_model or options.judge, *reference],
    )


def check_usage(options) -> None:
    """Raise InputError unless exactly one reward is given, and the models exist."""
    if bool(options.reward_model) == bool(options.judge):
        raise InputError("give exactly one of --reward-model and --judge")
    if not options.judge:
        cli.refuse_options(["constitution", "template"], "without --judge nobody is asked about principles")
    if bool(options.judge) != bool(options.against):
        raise InputError(
            "--judge goes with --against FILE, the responses that it compares with",
            where="--against",
            remedy=prompts.MAKE_REFERENCES,
        )
    loading.check_model(options.model, training=True)
    if options.judge:
        loading.check_model(options.judge)
    else:
        check_reward_model(options.reward_model)


def read_reward(options, rows: list[dict]) -> tuple["GroupQuestion | None", list[list[str]], dict]:
    """(the question to a judge, the responses to compare with, what the manifest knows the reward by)."""
    if options.reward_model:
        return None, [], {"reward_model": hashing.identity(options.reward_model)}
    question = GroupQuestion(
        files.load_constitution(options.constitution), templates.load_template(options.template), seed=options.seed
    )
    references, digest = prompts.read_references(options.against, rows)
    return (
        question,
        references,
        {
            "judge": hashing.identity(options.judge),
            "against": digest,
            "constitution": question.constitution.sha256,
            "template": question.template.sha256,
        },
    )


def load_scorer(options, chat, question: "GroupQuestion | None", references: list[list[str]]) -> grpo.Scorer:
    """A reward model with the policy's tokenizer, or a judge."""
    scoring = {"batch_size": 4 * options.batch_size, "device": options.device, "dtype": options.dtype}
    if question is not None:
        return JudgeReward(loading.load_engine(options.judge, **scoring), question, references)
    reward = rewards.load_reward(options.reward_model, chat, **scoring)
    return lambda rows, update, conversations, responses: (reward(conversations, responses), {})


class GroupQuestion(judging.Question):
    """One principle for a group: responses that compete with each other are judged by the same one."""

    def principles(self, comparison: dict):
        return super().principles({"id": comparison["group"]})


class JudgeReward:
    """The log-odds that a response is better than another one to its prompt, by a judge in both orders.

    p is what judge.py writes as the soft label, so that log p/(1−p) is the difference of scores that a reward model
    would be trained to (Bradley and Terry), without one. The other response is the same for a whole group and
    cancels out of its baseline; the mean reward says how far the policy has come to surpass those responses.

    Args:
        engine: has `score`.
        question: constitution, template and seed.
        references: for each prompt, the responses to compare with, one of which is drawn for a group.
    """

    def __init__(self, engine, question: GroupQuestion, references: list[list[str]]):
        self.engine, self.question, self.references = engine, question, references

    def __call__(self, rows, update, conversations, responses) -> tuple[list[float | None], dict[str, float]]:
        """The rewards of an update.

        Returns:
            (a reward each, None where the judge's context is too short; {label_mass: the probability that the labels
            have together: near 0, the judge was about to say something else}).
        """
        log_odds: list[float | None] = [None] * len(rows)
        comparisons, masses = [], []
        for i, (row, prompt, response) in enumerate(zip(rows, conversations, responses, strict=True)):
            others = self.references[row]
            other = others[hashing.hashed_seed("reference", self.question.seed, row, update) % len(others)]
            comparison = {
                "id": str(i),
                "group": f"{row}/{update}",
                "prompt": prompt,
                "response_a": response,
                "response_b": other,
            }
            if preferences.is_tie(comparison):
                log_odds[i] = 0.0
            else:
                comparisons.append(comparison)
        for comparison, verdicts in judging.judge(self.engine, comparisons, self.question):
            p = None if verdicts is None else judging.soft_label(verdicts)
            if p is not None:
                p = judging.clamp(p, 1 - CERTAIN, CERTAIN)
                log_odds[int(comparison["id"])] = math.log(p / (1 - p))
                masses += [verdict["mass"] for verdict in verdicts if "mass" in verdict]
        return log_odds, ({"label_mass": sum(masses) / len(masses)} if masses else {})


if __name__ == "__main__":
    main()
