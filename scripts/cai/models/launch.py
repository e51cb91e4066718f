"""Launch files of the engines that train on many machines, with what the run needs as comments.

    texts = launch_files("verl", "ppo", terms, texts_of_rows)      # {file name: text}

The templates are in templates/launch/, one per engine and file; every one was accepted by the engine's own parser in
the version named here (tests/benchmarks/handover.py, references/handover.md). Leaves out rows (data/engine_rows.py).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from cai.base.paths import TEMPLATES
from cai.models import estimate, folders, hardware
from cai.models.engine import Message
from cai.models.gguf import resolve

# The versions that the launch files and rows were checked against.
VERSIONS = {
    "openrlhf": "0.11.2",
    "verl": "0.9.1",
    "trl": "1.16.0",
    "nemo-rl": "0.6.0 (commit 7ea279a)",
    "llamafactory": "0.9.5",
    "axolotl": "0.19.0",
}

INSTALL = {
    "openrlhf": "`pip install openrlhf[vllm]==0.11.2`",
    "verl": "`pip install verl==0.9.1`, with vLLM and flash-attn as its documentation says",
    "trl": "`pip install trl[vllm]==1.16.0`",
    "nemo-rl": "a checkout of its repository with `uv`, and `NEMO_RL` set to its folder",
    "llamafactory": "`pip install llamafactory==0.9.5 deepspeed`",
    "axolotl": "`pip install axolotl[flash-attn,vllm]==0.19.0`",
}

RESUME = {
    "openrlhf": "Start the same command again: `--ckpt.load_enable` continues from the last state in `checkpoints`.",
    "verl": "Start the same command again: `trainer.resume_mode=auto` continues from the last state in `checkpoints`.",
    "trl": "Start it again with `--resume_from_checkpoint RESULT/checkpoint-N`, the last one there.",
    "nemo-rl": "Start the same command again: it continues from the last state in `checkpoints`.",
    "llamafactory": "Start it again with `resume_from_checkpoint=RESULT/checkpoint-N`, the last one there.",
    "axolotl": "Start it again with `--resume-from-checkpoint RESULT/checkpoint-N`, the last one there.",
}

# How a folder of the engine's own becomes one that transformers loads; engines not named here write such a folder.
CONVERT = {
    ("verl", "rl"): "Merge the shards first: `python3 -m verl.model_merger merge --backend fsdp "
    "--local_dir checkpoints/global_step_N/actor --target_dir policy`.",
    ("verl", "sft"): "Merge the shards first: `python3 -m verl.model_merger merge --backend fsdp "
    "--local_dir checkpoints/global_step_N --target_dir policy`.",
    ("nemo-rl", "rl"): "Convert the checkpoint first: `uv run examples/converters/convert_dcp_to_hf.py "
    "--config checkpoints/step_N/config.yaml --dcp-ckpt-path checkpoints/step_N/policy/weights --hf-ckpt-path policy`.",
}

Row = tuple[Sequence[Message], Sequence[str]]  # the prompt of a row, and the responses in it

LEARNING_RATES = {"sft": 1e-5, "reward": 1e-5, "ppo": 1e-6, "grpo": 1e-6, "dpo": 5e-7}

# Rows of one optimizer step, responses per prompt of GRPO, and passes over the responses of an update.
BATCH, SAMPLES, EPOCHS = 128, 8, 1

# The share of a GPU's memory that the weights of the model that writes may take in bfloat16.
WEIGHTS_SHARE = 0.3

REWARD_FUNCTION = "reward_function.py"

# LLaMA-Factory renders with templates of its own, by name.
FACTORY_TEMPLATES = {"<|im_start|>": "qwen", "<|start_header_id|>": "llama3", "<start_of_turn>": "gemma"}


@dataclass(frozen=True)
class Terms:
    """What a launch file is written for.

    model: folder or hub id of the model that is trained. reward_model: folder of the scores, or None. nodes, gpus:
    machines, and GPUs in each. gpu: a key of `estimate.GPUS`. max_new_tokens: of a response. output: the folder.
    """

    model: str
    reward_model: str | None
    nodes: int
    gpus: int
    gpu: str
    max_new_tokens: int
    output: str

    @property
    def count(self) -> int:
        return self.nodes * self.gpus


def is_rl(stage: str) -> bool:
    return stage in ("ppo", "grpo")


def takes_function(engine: str, stage: str) -> bool:
    """Whether a judge's service may reward in place of a reward model, through the function that asks it."""
    return is_rl(stage) and engine in ("openrlhf", "verl")


def launch_files(engine: str, stage: str, terms: Terms, texts: Sequence[Row], notes: Sequence[str]) -> dict[str, str]:
    """{file name: its text}: launch.sh, the engine's configuration, and README.md.

    Args:
        texts: of each row, its prompt and the responses in it.
        notes: sentences for the README.
    """
    values = {"engine": engine, "stage": stage, "notes": list(notes), **_values(engine, stage, terms, texts)}
    names = {f"{engine}.sh.jinja": "launch.sh"}
    if engine in ("trl", "llamafactory", "axolotl"):
        names[f"{engine}.yaml.jinja"] = f"{engine}.yaml"
    if engine == "llamafactory":
        names |= {"llamafactory.json.jinja": "dataset_info.json", "zero3.json.jinja": "zero3.json"}
    values["contents"] = _contents(engine, stage, list(names.values()))
    names["README.md.jinja"] = "README.md"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / "launch"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    files = {name: environment.get_template(template).render(values) for template, name in names.items()}
    if takes_function(engine, stage):
        files[REWARD_FUNCTION] = (TEMPLATES / "launch" / REWARD_FUNCTION).read_text(encoding="utf-8")
    return files


def rows_file(engine: str, stage: str) -> str:
    """The name of the file of rows: verl reads rows of SFT from Parquet only."""
    return "rows.parquet" if (engine, stage) == ("verl", "sft") else "rows.jsonl"


def _values(engine: str, stage: str, terms: Terms, texts: Sequence[Row]) -> dict[str, Any]:
    """What the templates print."""
    prompt_tokens, length = _lengths(terms, stage, texts)
    trainers = terms.nodes - 1 if (engine, stage) == ("trl", "grpo") and terms.nodes > 1 else terms.nodes
    batch = max(terms.count, min(BATCH, len(texts)) // terms.count * terms.count)
    tensor_parallel = _tensor_parallel(terms)
    per_device = SAMPLES if stage == "grpo" else 1
    result = "reward-model" if stage == "reward" else "policy"
    model = terms.model if not Path(terms.model).is_dir() else os.path.relpath(terms.model, terms.output)
    return {
        "version": VERSIONS[engine],
        "nodes": terms.nodes,
        "gpus": terms.gpus,
        "trainers": trainers,
        "model": model,
        # Quoted for the inside of double quotes, in which the shell file prints it.
        "shell_model": _escape(model) if model == terms.model else f"$HERE/{_escape(model)}",
        "estimate": describe_cost(stage, terms, texts, length),
        "prompt_tokens": prompt_tokens,
        "new_tokens": terms.max_new_tokens,
        "length": length,
        "batch": batch,
        "samples": SAMPLES,
        "accumulation": max(1, batch * per_device // (trainers * terms.gpus * per_device)),
        "engines": max(1, terms.count // tensor_parallel),
        "tensor_parallel": tensor_parallel,
        "learning_rate": f"{LEARNING_RATES[stage]:.7f}".rstrip("0"),
        "several_nodes_by_rank": engine in ("trl", "llamafactory", "axolotl") or (engine, stage) == ("verl", "sft"),
        "template": _factory_template(terms.model) if engine == "llamafactory" else "",
        "result": result,
        "install": INSTALL[engine],
        "resume": RESUME[engine].replace("RESULT", result),
        "convert": CONVERT.get((engine, "rl" if is_rl(stage) or engine == "nemo-rl" else stage), ""),
    }


def _escape(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def _lengths(terms: Terms, stage: str, texts: Sequence[Row]) -> tuple[int, int]:
    """(tokens of the longest prompt, of the longest row), rounded up to powers of two, within the model's context."""
    count = estimate.token_counter(terms.model)
    prompt_tokens = _round_up(max(count([prompt for prompt, _ in texts])))
    if is_rl(stage):
        return prompt_tokens, prompt_tokens + terms.max_new_tokens
    rows = [[*prompt, {"role": "assistant", "content": text}] for prompt, answers in texts for text in answers]
    return prompt_tokens, _round_up(max(count(rows)) + 8)


def _round_up(tokens: int) -> int:
    return max(64, 1 << (tokens - 1).bit_length())


def _tensor_parallel(terms: Terms) -> int:
    """Over how many GPUs the weights of the model that writes are divided: a power of two, at most one node's."""
    shape = hardware.shape_of(terms.model)
    share = WEIGHTS_SHARE * estimate.GPUS[terms.gpu][0] * 1e9
    parts = 1
    while shape and 2 * shape.parameters / parts > share and 2 * parts <= terms.gpus:
        parts *= 2
    return parts


def _factory_template(model: str) -> str:
    """LLaMA-Factory's name of the model's chat template, by its control tokens; `default` where none is known."""
    text = folders.template_text(resolve(model))
    return next((name for token, name in FACTORY_TEMPLATES.items() if token in text), "default")


def _contents(engine: str, stage: str, names: Sequence[str]) -> list[tuple[str, str]]:
    texts = {
        "launch.sh": "starts the training",
        f"{engine}.yaml": "the engine's configuration",
        "dataset_info.json": "describes the rows to the engine",
        "zero3.json": "the settings of DeepSpeed",
    }
    contents = [(rows_file(engine, stage), "the rows"), *((name, texts[name]) for name in names)]
    if is_rl(stage):
        contents.append(("reward/", "the reward model, in a form that all engines score alike"))
    if takes_function(engine, stage):
        contents.append((REWARD_FUNCTION, "asks the service of a judge for rewards, in place of the reward model"))
    return [*contents, ("ledger.jsonl", "what became of every input row")]


# --- cost ---------------------------------------------------------------------------------------------------


def describe_cost(stage: str, terms: Terms, texts: Sequence[Row], length: int) -> list[str]:
    """Memory and GPU-hours in sentences, by the estimator (models/estimate.py)."""
    if is_rl(stage):
        plan = estimate.rl_plan(
            terms.model,
            [prompt for prompt, _ in texts],
            episodes=len(texts) * (SAMPLES if stage == "grpo" else 1),
            new_tokens=terms.max_new_tokens,
            epochs=EPOCHS,
            batch_size=1,
            sampled=BATCH,
            value_model=terms.reward_model if stage == "ppo" else None,
            frozen=[name for name in (terms.reward_model, terms.model) if name],
            gpu=terms.gpu,
        )
    else:
        lengths = estimate.lengths_of(terms.model, texts)
        frozen = [terms.model] if stage == "dpo" else []
        plan = estimate.training_plan(terms.model, lengths, epochs=1, batch_size=1, frozen=frozen, gpu=terms.gpu)
    memory, hours = plan.get("memory_gb"), plan.get(f"hours_on_one_{terms.gpu}")
    if not memory or not isinstance(hours, float):
        return ["Memory and hours: unknown, since the model is not a local folder with its sizes."]
    activations = memory["activations"]
    states = memory["total"] - activations
    lines = [
        f"Memory, estimated: {_number(states)} GB of weights, gradients and optimizer in all, "
        f"{_number(states / terms.count)} GB per GPU if divided over {terms.count}, and {_number(activations)} GB of "
        "activations and cache per GPU.",
        f"Time, estimated: {_number(hours)} GPU-hours on {terms.gpu}, {_number(hours / terms.count)} hours on "
        f"{terms.count} if none waits; rows of at most {length} tokens.",
    ]
    limit = estimate.GPUS[terms.gpu][0]
    if states / terms.count + activations > limit - hardware.BESIDE_GB:
        lines.append(f"That is more than the {limit} GB of one {terms.gpu}: take more GPUs or shorter rows.")
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
