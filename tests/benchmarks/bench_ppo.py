"""Our PPO against TRL 1.12's PPOTrainer, the last one that TRL had: episodes a second, memory, where the time goes.

    python3 -m venv trl112 && trl112/bin/pip install torch==2.13.0 && trl112/bin/pip install "trl==1.12.*" \
        "transformers==5.23.*" "accelerate==1.15.*" "datasets==5.2.*"
    python tests/benchmarks/bench_ppo.py --trl-python trl112/bin/python

Same policy, reference, reward and value model, prompts, sampling, longest response, epochs, minibatches, rows in a
forward pass and learning rate (so low that responses stay as they are). The end token ends a response in both. Each
measured run is a process of its own; they take turns, and the ratio is taken within a pair. The first update warms up
and is left out. TRL has no value head: there the contender is its separate value model all the same. TRL makes as many
optimizer steps as ours only without gradient accumulation, so its minibatches are its forward passes; both count.

Cases: a separate value model; a value head on the policy; and a vocabulary of 32,000, its new tokens random ones that
are hardly ever drawn. Leaves out several processes. A busy machine's figures are worth little.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

CASES = {
    "value model": {"value_head": False, "vocabulary": None},
    "value head": {"value_head": True, "vocabulary": None},
    "vocabulary 32,000": {"value_head": False, "vocabulary": 32_000},
}
GOALS = {"value model": 1.3, "value head": 1.8, "vocabulary 32,000": 1.5}
PARTS = ("sampling", "scoring", "forward", "training")


@click.command()
@click.option("--trl-python", metavar="PATH", required=True, help="Python of an environment with trl 1.12.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only this one. Repeatable.")
@click.option("--model", default="tiny", show_default=True, help="The policy; its body is the reward model's too.")
@click.option("--pairs", default=5, show_default=True, help="Runs of each contender.")
@click.option("--updates", default=4, show_default=True, help="Measured updates of a run.")
@click.option("--rows", default=64, show_default=True, help="Prompts of an update.")
@click.option("--epochs", default=4, show_default=True)
@click.option("--minibatches", default=4, show_default=True)
@click.option("--max-new-tokens", default=96, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--cpu-time",
    is_flag=True,
    help="Count the processor's seconds, not the clock's: for a busy machine, with OMP_NUM_THREADS=1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
def main(trl_python, cases, as_json, **size):
    """Measure our PPO and TRL 1.12's in turns."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases or CASES:
            job = {**size, **CASES[case], "folder": f"{folder}/{case.replace(' ', '-').replace(',', '')}"}
            prepare(job)
            runs = {"ours": [], "trl": []}
            for pair in range(size["pairs"]):
                # Whoever is first in one pair is second in the next.
                for who in ("ours", "trl") if pair % 2 == 0 else ("trl", "ours"):
                    runs[who].append(measured(who, sys.executable if who == "ours" else trl_python, job))
                    click.echo(f"{case}, pair {pair + 1}, {who}: {runs[who][-1]['rate']:.2f} episodes/s", err=True)
            results[case] = summary(case, runs)
            if not as_json:
                show(results[case], case, size)
    if as_json:
        click.echo(json.dumps({"size": size, "cases": results}))


def summary(case: str, runs: dict[str, list[dict]]) -> dict:
    """The figures of one case: medians, the ratio of each pair, and the parts of an update in seconds."""
    ratios = [ours["rate"] / trl["rate"] for ours, trl in zip(runs["ours"], runs["trl"], strict=True)]
    found = {"goal": GOALS[case], "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
    for who, of in runs.items():
        found[who] = {
            name: statistics.median(run[name] for run in of)
            for name in ("rate", "peak_mb", "grown_mb", "steps", "response_length", "eos_rate")
        } | {part: statistics.median(run["parts"][part] for run in of) for part in PARTS}
    return found


def show(found: dict, case: str, size: dict) -> None:
    """A table of one case."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from cai.stats import tables

    ours, trl = found["ours"], found["trl"]
    low, high = found["ratios"]
    click.echo(f"\n{case}: {found['ratio']:.2f} times ({low:.2f}–{high:.2f} over the pairs; goal {found['goal']})")

    def row(name, key, digits=2):
        return (name, f"{ours[key]:,.{digits}f}", f"{trl[key]:,.{digits}f}")

    click.echo(
        tables.table(
            ("", "ours", "TRL 1.12"),
            [
                row("episodes a second", "rate"),
                *(row(f"seconds an update: {part}", part) for part in PARTS),
                row("optimizer steps", "steps", 0),
                row("tokens a response", "response_length", 1),
                row("share that ended", "eos_rate"),
                row("peak memory, MB", "peak_mb", 0),
                row("of it grown in training, MB", "grown_mb", 0),
            ],
        )
    )
    assert ours["steps"] == trl["steps"], "not the same number of optimizer steps"


def measured(who: str, python: str, job: dict) -> dict:
    """One run in a process of its own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, str(HERE / "bench_ppo.py"), who, json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=job["folder"],
    )
    if done.returncode:
        raise click.ClickException(f"{who} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- what both are given ----------------------------------------------------------------------------------


def prepare(job: dict) -> None:
    """Write policy, reward model and prompts into the job's folder."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from cai.base.paths import TINY, model_path
    from cai.data.readers import read_jsonl
    from cai.models.loading import load_chat

    folder = Path(job["folder"])
    folder.mkdir()
    chat = load_chat(job["model"])
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model_path(job["model"]), dtype=torch.float32)
    if job["vocabulary"]:
        known = policy.get_input_embeddings().weight.shape[0]
        policy.resize_token_embeddings(job["vocabulary"], mean_resizing=False)
        with torch.no_grad():  # small, so that their logits are near 0 and they are drawn rarely
            policy.get_input_embeddings().weight[known:].normal_(0, 1e-3)
            policy.get_output_embeddings().weight[known:].normal_(0, 1e-3)
    policy.save_pretrained(folder / "policy")
    config = AutoConfig.from_pretrained(folder / "policy", num_labels=1)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "policy", config=config, dtype=torch.float32)
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        chat.tokenizer.save_pretrained(folder / name)
    bundled = [row["prompt"] for _, row in read_jsonl(TINY / "prompts" / "train.jsonl")]
    count = job["rows"] * (job["updates"] + 1)
    messages = [[{"role": "user", "content": bundled[n % len(bundled)]}] for n in range(count)]
    ids = [chat.encode(chat.render(one)) for one in messages]
    (folder / "prompts.json").write_text(json.dumps({"messages": messages, "ids": ids}))


class Clock:
    """Seconds of the parts of an update, and when each update ended."""

    def __init__(self, job: dict):
        self.cpu_time = job["cpu_time"]
        self.parts, self.ends, self.steps, self.rows = dict.fromkeys(PARTS, 0.0), [], 0, []

    @contextmanager
    def part(self, name: str):
        began = self.now()
        yield
        if self.ends:
            self.parts[name] += self.now() - began

    def now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.monotonic()

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def count_steps(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def counted(*_):
            self.steps += 1

        register_optimizer_step_post_hook(counted)

    def update(self, figures: dict):
        self.ends.append(self.now())
        self.rows.append(figures)

    def report(self, job: dict, before: float, length: str, ended) -> dict:
        import torch

        updates = len(self.ends) - 1
        seconds = self.ends[-1] - self.ends[0]
        parts = {name: spent / updates for name, spent in self.parts.items()}
        parts["training"] = seconds / updates - sum(spent for name, spent in parts.items() if name != "training")
        peak = torch.cuda.max_memory_allocated() / 2**20 if job["device"] == "cuda" else most_memory()
        rows = self.rows[1:]
        return {
            "rate": updates * job["rows"] / seconds,
            "parts": parts,
            "steps": self.steps,
            "peak_mb": peak,
            "grown_mb": peak - before,
            "response_length": statistics.mean(row[length] for row in rows),
            "eos_rate": statistics.mean(map(ended, rows)),
        }


def most_memory() -> float:
    """The most memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def held_memory(job: dict) -> float:
    import torch

    return torch.cuda.memory_allocated() / 2**20 if job["device"] == "cuda" else most_memory()


# --- the contenders ---------------------------------------------------------------------------------------


def ours(job: dict) -> dict:
    """A run of ours."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from transformers import TrainerCallback

    from cai.models.loading import load_chat, load_policy, load_reward_model
    from cai.models.scorer import Scorer
    from cai.train import common, ppo
    from cai.train.prompts import encode_prompts

    folder, clock = Path(job["folder"]), Clock(job)
    chat = load_chat(str(folder / "policy"))
    loading = {"device": job["device"]}
    policy = load_policy(str(folder / "policy"), **loading)
    reference = load_policy(str(folder / "policy"), **loading)
    reward = load_reward_model(str(folder / "reward"), **loading).to(job["device"])
    value = None if job["value_head"] else load_reward_model(str(folder / "reward"), **loading)
    settings = ppo.Settings(
        updates=job["updates"] + 1,
        prompts_per_update=job["rows"],
        epochs=job["epochs"],
        minibatches=job["minibatches"],
        batch_size=job["rows"] // job["minibatches"],
        generation_batch_size=job["rows"],
        learning_rate=1e-7,
        max_new_tokens=job["max_new_tokens"],
        samples_every=10**6,
    )
    model = ppo.PolicyAndValue(policy, value, temperature=settings.temperature, kl_coef=settings.kl_coef)
    prompts = json.loads((folder / "prompts.json").read_text())
    rows = [{"prompt": messages} for messages in prompts["messages"]]
    encoded = encode_prompts(rows, chat, policy, settings.max_new_tokens)
    assert [prompt.ids.tolist() for prompt in encoded] == prompts["ids"]
    with tempfile.TemporaryDirectory() as output:
        arguments = common.trainer_arguments(
            output, learning_rate=1e-7, batch_size=settings.batch_size, device=job["device"]
        )
        if job["device"] == "cuda":
            arguments |= {name: False for name in arguments if name.endswith("_checkpointing")}
        trainer = ppo.PPOTrainer(
            model, encoded, chat, Scorer(chat, reward, job["rows"]), settings, arguments, output, reference
        )

        class Ends(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                if "score" in logs:
                    clock.update(logs)

        trainer.add_callback(Ends())
        trainer.answer = clock.timed("sampling", trainer.answer)
        trainer.reward = clock.timed("scoring", trainer.reward)
        trainer._fill = clock.timed("forward", trainer._fill)
        clock.count_steps()
        before = held_memory(job)
        common.run_trainer(trainer, output)
    return clock.report(job, before, "response_length", lambda row: row["eos_rate"])


def trl(job: dict) -> dict:
    """A run of TRL 1.12's, in the environment that has it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    folder, clock = Path(job["folder"]), Clock(job)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")

    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    def scorer():
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)

    checkpointing = [
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in PPOConfig.__dataclass_fields__
    ][:1]
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["epochs"],
        local_rollout_forward_batch_size=job["rows"],
        total_episodes=job["rows"] * (job["updates"] + 1),
        response_length=job["max_new_tokens"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=0.7,
        learning_rate=1e-7,
        kl_coef=0.05,
        lam=0.95,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        use_cpu=job["device"] == "cpu",
        bf16=job["device"] == "cuda",
        **dict.fromkeys(checkpointing, False),
    )
    rows = Dataset.from_dict({"input_ids": json.loads((folder / "prompts.json").read_text())["ids"]})
    model = policy()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=rows,
        eval_dataset=rows.select(range(job["rows"])),
    )
    lengths: list[float] = []
    truncate = ppo_trainer.truncate_response

    def truncated(stop_token_id, pad_token_id, responses):
        made = truncate(stop_token_id, pad_token_id, responses)
        lengths.append(((made != pad_token_id).sum() / len(made)).item())
        ended.append((made == tokenizer.eos_token_id).any(1).float().mean().item())
        return made

    ended: list[float] = []

    class Ends(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "objective/kl" in logs:
                clock.update({"length": lengths[-1], "ended": ended[-1]})

    trainer.add_callback(Ends())
    forward = ppo_trainer.forward

    def passed(*args, **kwargs):
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return clock.timed("forward", forward)(*args, **kwargs)

    get_reward = ppo_trainer.get_reward

    def read(model, *args, **kwargs):  # of the reward model, and of the value model before the first epoch
        part = "scoring" if model is trainer.reward_model else "forward"
        return clock.timed(part, get_reward)(model, *args, **kwargs)

    # The policy's log-probabilities before the first epoch are made with the sampling.
    ppo_trainer.forward, ppo_trainer.truncate_response, ppo_trainer.get_reward = passed, truncated, read
    ppo_trainer.batch_generation = clock.timed("sampling", ppo_trainer.batch_generation)
    clock.count_steps()
    before = held_memory(job)
    trainer.train()
    return clock.report(job, before, "length", lambda row: row["ended"])


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("ours", "trl"):
        print(json.dumps({"ours": ours, "trl": trl}[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        main()
