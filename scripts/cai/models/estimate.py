"""The cost of a step before it runs: model calls, tokens, memory, hours, money. Loads no model.

    plan = text_plan(conversations, "tiny", Sampling(max_new_tokens=96), price=(0.10, 0.40))

Tokens are counted with the model's own tokenizer and chat template (without torch), of 512 rows at most; those of the
others follow from their characters. The length of answers is not known in advance: `--like` takes it from a smaller
run. Memory is that of tensors; what CUDA and Python need besides (1 to 2 GB) comes on top.

Hours follow from stated assumptions (`USED`, `GPUS`) and are no measurement. An engine of `--engine` is planned for as
ours, its weights and keys and values divided among its GPUs; what it reserves besides is left out. So are several GPUs
without it (divide), and offloading to a CPU.
"""

import heapq
import json
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cai.base import cli, engine_options
from cai.base.engine_options import EngineChoice
from cai.base.errors import InputError
from cai.data.outputs import read_manifest
from cai.models import folders
from cai.models.chat import Chat
from cai.models.engine import Message, Sampling
from cai.models.gguf import resolve
from cai.models.local import BATCH_SIZE, auto_dtype, chunk_tokens
from cai.models.servers import IN_FLIGHT

# Makers' data sheets: memory in GB, memory bandwidth in TB/s, dense bfloat16 in TFLOP/s.
GPUS = {
    "b200": (180, 8.0, 2250),
    "h200": (141, 4.8, 989),
    "h100": (80, 3.35, 989),
    "mi300x": (192, 5.3, 1307),
    "a100-80": (80, 2.0, 312),
    "a100-40": (40, 1.55, 312),
    "l40s": (48, 0.86, 362),
    "l4": (24, 0.30, 121),
    "rtx-4090": (24, 1.0, 165),
}

# Bytes of the activations of one forward pass that training keeps, at most: batches with more are trained in parts
# (train/microbatches.py). On a CPU a pass over more is no faster.
ACTIVATIONS = {"cpu": 2e9, "gpu": 8e9}

# Logits that a loss of the supervised steps holds at most: with more it works through them in tiles.
HELD_LOGITS = 2**26

# The share of those figures that a step is assumed to reach: on the careful side.
USED = {"bandwidth": 0.4, "reading": 0.4, "training": 0.35}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

SAMPLE = 512

_Conversation = Sequence[Message]

_Function = TypeVar("_Function", bound=Callable[..., Any])


gpu_option = click.option(
    "--gpu", type=click.Choice(list(GPUS)), default=None, help="With --dry-run: estimate the hours on this GPU."
)


price_option = click.option(
    "--price",
    nargs=2,
    type=click.FloatRange(min=0),
    default=None,
    metavar="IN OUT",
    help="With --dry-run: the price of a million tokens, read and written.",
)


def plan_options(function: _Function) -> _Function:
    """Decorator: the options that `--dry-run` of a step that writes text takes."""
    like = click.option(
        "--like",
        metavar="FILE",
        default=None,
        help="With --dry-run: a finished output of a smaller run, for the length of the answers.",
    )
    return like(gpu_option(price_option(function)))


def refuse_without_dry_run(dry_run: bool, *names: str) -> None:
    """UsageError for options that only an estimate reads, on a command line that asks for none.

    names: of their parameters, where they are not those of `plan_options`.
    """
    if not dry_run:
        cli.refuse_options(names or ("like", "gpu", "price"), "without --dry-run nothing is estimated")


# --- the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `parameters` counts shared tensors once; `inner` is the feed-forward's width."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def kv(self) -> int:
        """Numbers in the keys and values of one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shape_of(model: str) -> Shape | None:
    """The sizes of a local folder's model from config.json and the headers of its weights; None elsewhere."""
    folder, count = folders.weights_folder(model), folders.count_parameters(model)
    if count is None or not (folder / "config.json").is_file():
        return None
    return shape_of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), count)


def shape_of_config(config: dict[str, Any], count: int) -> Shape | None:
    """The sizes that a model's configuration names; None for an architecture with other names.

    count: its parameters.
    """
    config = config.get("text_config") or config
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            count,
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
        )
    except KeyError:
        return None


def token_counter(model: str) -> Callable[[Sequence[_Conversation]], list[int]]:
    """A function from conversations to their numbers of tokens; by characters where the tokenizer is not on disk."""
    folder = Path(folders.tokenizer_folder(resolve(model)))
    if not (folder / "tokenizer.json").is_file():
        return lambda talks: [_characters(talk) // 4 + 4 * len(talk) for talk in talks]
    from transformers import PreTrainedTokenizerFast  # comes without torch, unlike AutoTokenizer

    chat = Chat(PreTrainedTokenizerFast.from_pretrained(folder), model)
    return lambda talks: list(map(len, chat.encode_all(list(map(chat.render, talks)))))


def _characters(conversation: _Conversation) -> int:
    return sum(len(message["content"]) for message in conversation)


# --- memory -------------------------------------------------------------------------------------------------


def text_memory(shape: Shape, *, size: int, rows: int, longest: int, new: int, chunk: int) -> dict[str, int]:
    """Bytes of tensors at the peak of a step that writes text.

    Args:
        size: bytes of one number (`BYTES`).
        rows, longest, new: rows of the largest batch, tokens of its longest prompt and of each answer.
        chunk: tokens of prompts in one forward pass (`local.chunk_tokens`).
    """
    read = min(rows * longest, max(chunk, longest))
    # Widest point of a block: the residual and its normed copy, gate, up and their product.
    wide = read * (3 * shape.hidden + 3 * shape.inner)
    past = read * shape.kv
    return {
        "weights": shape.parameters * size,
        "kv_cache": shape.kv * rows * (longest + new) * size,
        "activations": (wide + past) * size + 4 * shape.vocabulary * rows * 4,
    }


def training_memory(
    shape: Shape,
    *,
    tokens: int,
    lora_rank: int | None = None,
    autocast: bool = False,
    checkpointing: bool = False,
    frozen_size: int = 4,
    held_logits: int | None = None,
) -> dict[str, int]:
    """Bytes of tensors at the peak of a training step with AdamW.

    Args:
        tokens: in one forward pass, padding counted.
        lora_rank: None trains all weights, in float32.
        autocast: activations in two bytes over float32 weights (and a copy of the weights in two bytes).
        checkpointing: only each block's input is kept, and one block is computed again.
        frozen_size: bytes of a weight that is not trained (2 for a bfloat16 base).
        held_logits: at most so many are held at once; None: all.
    """
    if lora_rank:
        # Every linear layer but the head: query, key, value, output, and three of the feed-forward.
        wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        sides = 2 * (shape.hidden + wide) + 2 * (shape.hidden + narrow) + 3 * (shape.hidden + shape.inner)
        trained = shape.layers * lora_rank * sides
        weights = shape.parameters * frozen_size + 4 * trained
    else:
        trained = shape.parameters
        weights = 4 * trained + (2 * trained if autocast else 0)
    logits = tokens * shape.vocabulary
    if held_logits is not None:
        logits = min(logits, held_logits)
    return {
        "weights": weights,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        # Logits, their float32 copy and the gradient of it.
        "activations": tokens * token_bytes(shape, autocast=autocast, checkpointing=checkpointing)
        + logits * (12 if not autocast else 10),
    }


def token_bytes(shape: Shape, *, autocast: bool, checkpointing: bool) -> int:
    """Bytes that a token's forward pass keeps for the backward pass, logits left out (as in `training_memory`)."""
    size = 2 if autocast else 4
    # What a block keeps: inputs of its norms and their normed copies (in float32), query, key, value and their rotated
    # forms, attention's output twice; gate, its activation, up, and their product.
    normed = 4 * 4 * shape.hidden
    inside = size * (
        3 * shape.heads * shape.head_size + 3 * shape.kv_heads * shape.head_size + 2 * shape.hidden + 4 * shape.inner
    )
    block = normed + inside
    return shape.layers * size * shape.hidden + block if checkpointing else shape.layers * block


def bound_tokens(shape: Shape, *, cpu: bool) -> int:
    """Tokens whose activations take `ACTIVATIONS`, without checkpointing on a CPU, else with it."""
    return int(ACTIVATIONS["cpu" if cpu else "gpu"]) // token_bytes(shape, autocast=not cpu, checkpointing=not cpu)


def supervised_memory(
    trained: Sequence[Shape],
    frozen: Sequence[Shape],
    *,
    tokens: int,
    longest: int,
    lora_rank: int | None,
    cpu: bool,
    processes: int = 1,
) -> dict[str, int]:
    """`trained_memory` of sft.py, reward_model.py and dpo.py, which bound a batch by tokens and hold few logits.

    Args:
        tokens, longest: of the largest batch and of its longest row, both sides of a pair together.
        processes: several do not bound their batches.
    """
    if processes == 1:
        tokens = min(tokens, max(longest, bound_tokens(trained[0], cpu=cpu)))
    return trained_memory(trained, frozen, tokens=tokens, lora_rank=lora_rank, cpu=cpu, held_logits=HELD_LOGITS)


def trained_memory(
    trained: Sequence[Shape],
    frozen: Sequence[Shape],
    *,
    tokens: int,
    lora_rank: int | None,
    cpu: bool,
    held_logits: int | None = None,
) -> dict[str, int]:
    """`training_memory` of all trained models, and the weights of the frozen ones. Logits are counted for a reward
    or value model too, which has none: on the careful side."""
    parts = [
        training_memory(
            shape,
            tokens=tokens,
            lora_rank=lora_rank,
            autocast=not cpu,
            checkpointing=not cpu,
            frozen_size=4 if cpu else 2,
            held_logits=held_logits,
        )
        for shape in trained
    ]
    memory = {name: sum(part[name] for part in parts) for name in parts[0]}
    if frozen:
        memory["frozen_models"] = (4 if cpu else 2) * sum(shape.parameters for shape in frozen)
    return memory


def gigabytes(parts: dict[str, int]) -> dict[str, float]:
    """The parts and their sum in GB (10⁹ bytes)."""
    return {name: float(f"{value / 1e9:.3g}") for name, value in {**parts, "total": sum(parts.values())}.items()}


# --- time and money -----------------------------------------------------------------------------------------


def text_hours(
    shape: Shape, gpu: str, *, size: int, rows: int, prompt_tokens: float, new_tokens: float, length: float
) -> float:
    """Hours on one GPU: reading is bound by arithmetic, writing by whatever is slower, arithmetic or memory.

    Args:
        rows: in a batch. length: tokens of a row, on average, while it is written.
    """
    _, bandwidth, flops = GPUS[gpu]
    moved = (shape.parameters / rows + shape.kv * length) * size / (bandwidth * 1e12 * USED["bandwidth"])
    computed = 2 * shape.parameters / (flops * 1e12 * USED["reading"])
    return reading_hours(shape, gpu, prompt_tokens) + new_tokens * max(moved, computed) / 3600


def reading_hours(shape: Shape, gpu: str, tokens: float) -> float:
    """Hours on one GPU for a forward pass over the tokens."""
    return 2 * shape.parameters * tokens / (GPUS[gpu][2] * 1e12 * USED["reading"]) / 3600


def training_hours(shape: Shape, gpu: str, *, tokens: float, lora: bool = False, checkpointing: bool = False) -> float:
    """Hours on one GPU: 6 operations per parameter and token, 4 where the weights are frozen, and 2 more where
    activations are computed again (arXiv 2001.08361, section 2.1)."""
    work = (4 if lora else 6) + (2 if checkpointing else 0)
    return work * shape.parameters * tokens / (GPUS[gpu][2] * 1e12 * USED["training"]) / 3600


def rl_memory(
    trained: Sequence[Shape],
    frozen: Sequence[Shape],
    *,
    batch_size: int,
    rows: int,
    longest: int,
    new: int,
    lora_rank: int | None,
    cpu: bool = False,
) -> dict[str, int]:
    """Bytes of tensors at the peak of PPO, GRPO or RLOO.

    Args:
        trained: the policy, and a value model if there is one. frozen: reward models, a reference.
        batch_size, rows: responses in one forward pass of the training, and responses that are written at once.
        longest, new: tokens of the longest prompt and of each response.
    """
    memory = trained_memory(trained, frozen, tokens=batch_size * (longest + new), lora_rank=lora_rank, cpu=cpu)
    # Weights, gradients and moments stay where they are while the policy writes.
    chunk = chunk_tokens(trained[0].hidden, cpu)
    writing = text_memory(trained[0], size=4 if cpu else 2, rows=rows, longest=longest, new=new, chunk=chunk)
    memory["activations"] = max(memory["activations"], writing["kv_cache"] + writing["activations"])
    return memory


def rl_hours(
    trained: Sequence[Shape],
    frozen: Sequence[Shape],
    gpu: str,
    *,
    episodes: int,
    read: float,
    new: float,
    epochs: int,
    rows: int,
    lora: bool,
    size: int = 2,
) -> float:
    """Hours on one GPU for PPO, GRPO or RLOO: writing the responses, scoring them, training on them.

    Args:
        trained, frozen, rows: as in `rl_memory`. read, new: tokens of all episodes, of prompts and of responses.
        epochs: passes over the responses of an update.
    """
    length = (read + new / 2) / episodes
    hours = text_hours(trained[0], gpu, size=size, rows=rows, prompt_tokens=read, new_tokens=new, length=length)
    hours += sum(reading_hours(shape, gpu, read + new) for shape in [*trained, *frozen])
    tokens = epochs * (read + new)
    return hours + sum(training_hours(shape, gpu, tokens=tokens, lora=lora, checkpointing=True) for shape in trained)


# --- plans --------------------------------------------------------------------------------------------------


def text_plan(
    conversations: Iterable[_Conversation],
    model: str,
    sampling: Sampling,
    *,
    like: str | None = None,
    gpu: str | None = None,
    price: tuple[float, float] | None = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """What `--dry-run` prints for a step that writes text (or reads labels: max_new_tokens 0).

    Args:
        like: an output whose manifest tells the length of answers.
        dtype: auto stands for bfloat16, float32 on a CPU.
    """
    prompt_tokens, longest, calls = count_tokens(conversations, model)
    new = sampling.max_new_tokens
    new_tokens, on_disk = (calls * new, sum(file.stat().st_size for file in Path(resolve(model)).glob("*.safetensors")))
    plan: dict[str, Any] = {
        "model_calls": calls,
        "prompt_tokens_about": prompt_tokens,
        "new_tokens_at_most": new_tokens,
        "weights_on_disk_mb": round(on_disk / 1e6, 1) if on_disk else "unknown",
    }
    if like:
        new_tokens = plan["new_tokens_about"] = round(calls * mean_answer(like))
    if price:
        cost = (prompt_tokens * price[0] + new_tokens * price[1]) / 1e6
        plan["cost_about" if like else "cost_at_most"] = round(cost, 4)
    shape = shape_of(model)
    if shape is None or not calls:
        return plan | _unknown_hours(gpu, shape is not None)
    cpu, choice = device == "cpu", engine_options.engine_choice()
    size = BYTES[auto_dtype("cpu" if cpu else "cuda", shape.parameters) if dtype == "auto" else dtype]
    most = -(-batch_size // (choice.copies if choice else 1)) if batch_size else IN_FLIGHT if choice else BATCH_SIZE
    rows = min(most, calls)
    if batch_tokens:
        rows = max(1, min(rows, batch_tokens // (longest + new)))
    chunk = chunk_tokens(shape.hidden, cpu)
    plan |= _memory_fields(text_memory(shape, size=size, rows=rows, longest=longest, new=new, chunk=chunk), choice)
    if gpu:
        length = (prompt_tokens + new_tokens / 2) / calls
        work: dict[str, Any] = {
            "size": size,
            "rows": rows,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "length": length,
        }
        gpus = choice.gpus if choice else 1
        hours = text_hours(shape, gpu, **work) / gpus
        plan[f"hours_on_{'one' if gpus == 1 else gpus}_{gpu}"] = float(f"{hours:.3g}")
    return plan


def _memory_fields(memory: dict[str, int], choice: EngineChoice | None) -> dict[str, Any]:
    """Memory as a plan shows it; of another engine that of each GPU, over which tensor parallelism spreads a copy."""
    if choice is None:
        return {"memory_gb": gigabytes(memory)}
    share = {name: value // choice.tensor_parallel_size for name, value in memory.items()}
    return {"engine": choice.label, "gpus": choice.gpus, "gpu_memory_gb": gigabytes(share)}


def count_tokens(conversations: Iterable[_Conversation], model: str) -> tuple[int, int, int]:
    """(tokens of all, tokens of the longest, number of conversations), from a random sample of `SAMPLE`."""
    rng, lengths = random.Random(0), array("L")  # in characters

    def number_randomly() -> Iterator[tuple[float, int, _Conversation]]:
        for index, talk in enumerate(conversations):
            lengths.append(_characters(talk))
            yield rng.random(), index, talk

    sample = [talk for *_, talk in heapq.nlargest(SAMPLE, number_randomly())]
    if not lengths:
        return 0, 0, 0
    tokens = token_counter(model)(sample)
    if len(sample) == len(lengths):
        return sum(tokens), max(tokens), len(lengths)
    rate = sum(tokens) / max(1, sum(map(_characters, sample)))
    return round(rate * sum(lengths)), max(*tokens, round(rate * max(lengths))), len(lengths)


def mean_answer(output: str) -> float:
    """Mean tokens of an answer, by the manifest of a finished output. InputError if it has none."""
    tokens = (read_manifest(output) or {}).get("tokens") or {}
    if not tokens.get("rows"):
        raise InputError(
            "no manifest that counts the tokens of answers",
            where=output,
            expected="a finished output of generate, critique or revise",
            remedy="Make one with --limit 100, and name it with --like",
        )
    return float(tokens["new"] / tokens["rows"])


def training_plan(
    model: str,
    lengths: Sequence[int],
    *,
    epochs: float,
    batch_size: int,
    gradient_accumulation: int = 1,
    lora_rank: int | None = None,
    frozen: Sequence[str] = (),
    gpu: str | None = None,
    device: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What `--dry-run` prints for a training: rows, optimizer steps, tokens, memory, hours.

    Args:
        lengths: tokens of each row, both sides of a pair together (`lengths_of`).
        batch_size: rows in one forward pass; rows of similar length go together.
        frozen: folders of models that every row also goes through, such as a reference. (That under LoRA, the policy
            without its adapters, takes no memory; the time of its pass is not counted.)
        device: cpu means float32 without checkpointing; else bfloat16 over float32 weights, with it.
        processes: that train together, each with its own batches.
    """
    rows, tokens = round(epochs * len(lengths)), round(epochs * sum(lengths))
    plan: dict[str, Any] = {
        "rows": len(lengths),
        "steps": max(1, math.ceil(rows / batch_size / gradient_accumulation)),
        "tokens_about": tokens,
    }
    shapes = _shapes([model, *frozen])
    if not shapes or not lengths:
        return plan | _unknown_hours(gpu, bool(shapes))
    shape, *others = shapes
    widest = max(lengths) * min(batch_size, len(lengths))
    plan["memory_gb"] = gigabytes(
        supervised_memory(
            [shape],
            others,
            tokens=widest,
            longest=max(lengths),
            lora_rank=lora_rank,
            cpu=device == "cpu",
            processes=processes,
        )
    )
    if gpu:
        hours = training_hours(shape, gpu, tokens=tokens, lora=bool(lora_rank), checkpointing=True)
        hours += sum(reading_hours(other, gpu, tokens) for other in others)
        plan[f"hours_on_one_{gpu}"] = float(f"{hours:.3g}")
    return plan


def rl_plan(
    model: str,
    prompts: Iterable[_Conversation],
    *,
    episodes: int,
    new_tokens: int,
    epochs: int,
    batch_size: int,
    sampled: int,
    value_model: str | None = None,
    frozen: Sequence[str] = (),
    lora_rank: int | None = None,
    gpu: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """What `--dry-run` prints for PPO, GRPO and RLOO beside their updates: tokens, memory, hours.

    Args:
        prompts: conversations, each sampled equally often, `episodes` responses in all.
        epochs: passes over the responses of an update.
        batch_size: responses in one forward pass of the training.
        sampled: responses that are written at once.
        value_model: folder of a model that is trained beside the policy.
        frozen: folders of the models that are not trained: reward models, a reference.
    """
    tokens, longest, count = count_tokens(prompts, model)
    read, new = round(episodes * tokens / max(1, count)), episodes * new_tokens
    plan: dict[str, Any] = {"prompt_tokens_about": read, "new_tokens_at_most": new}
    names = [name for name in (model, value_model) if name]
    shapes = _shapes([*names, *frozen])
    if not shapes or not count:
        return plan | _unknown_hours(gpu, bool(shapes))
    trained, others = shapes[: len(names)], shapes[len(names) :]
    cpu, rows = device == "cpu", min(sampled, episodes)
    sizes = {"batch_size": batch_size, "rows": rows, "longest": longest, "new": new_tokens}
    plan["memory_gb"] = gigabytes(rl_memory(trained, others, **sizes, lora_rank=lora_rank, cpu=cpu))
    if gpu:
        work = {"episodes": episodes, "read": read, "new": new, "epochs": epochs, "rows": rows}
        hours = rl_hours(trained, others, gpu, **work, lora=bool(lora_rank), size=4 if cpu else 2)
        plan[f"hours_on_one_{gpu}"] = float(f"{hours:.3g}")
    return plan


def _unknown_hours(gpu: str | None, is_known: bool) -> dict[str, str]:
    """A field that says why --gpu has no effect, where the sizes of a model are not known."""
    return {} if is_known or not gpu else {f"hours_on_one_{gpu}": "unknown: no local folder with the model's sizes"}


def _shapes(models: Sequence[str]) -> list[Shape]:
    """The shape of each model; empty if that of any is unknown."""
    shapes = [shape for shape in map(shape_of, models) if shape]
    return shapes if len(shapes) == len(models) else []


def lengths_of(model: str, rows: Sequence[tuple[_Conversation, Sequence[str]]]) -> list[int]:
    """Tokens of each row (a conversation and answers to it): of the conversation with each answer, added up.

    The end token of an answer counts too. The tokens of `SAMPLE` rows drawn at random are counted; those of the others
    follow from their characters.
    """
    talks = [[[*talk, {"role": "assistant", "content": answer}] for answer in answers] for talk, answers in rows]
    characters = [sum(map(_characters, row)) for row in talks]
    sample = random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows)))
    tokens = iter(token_counter(model)([talk for index in sample for talk in talks[index]]))
    known = {index: sum(next(tokens) + 1 for _ in talks[index]) for index in sample}
    rate = sum(known.values()) / max(1, sum(characters[index] for index in sample))
    return [known.get(index, round(rate * length)) for index, length in enumerate(characters)]
