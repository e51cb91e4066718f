"""What a step will cost, told before it: model calls, tokens, memory, hours, money. Loads no model.

    plan = text_plan(conversations, "tiny", Sampling(max_new_tokens=96), price=(0.10, 0.40))

Tokens are counted with the model's own tokenizer and chat template (by tokenizers alone: torch stays out), of 512
rows at most, the others by their characters. How long answers will be nobody knows before: `--like` takes it
from a smaller run. Memory is that of tensors; what CUDA and Python take besides (1 to 2 GB) comes on top.

Hours follow from stated assumptions (`USED`, `GPUS`) and are no measurement. Leaves out several GPUs (divide),
what happens inside a server, and offloading to a CPU.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from cai.base.errors import InputError
from cai.base.paths import model_path
from cai.data.outputs import read_manifest
from cai.models.engine import Sampling
from cai.models.local import BATCH_SIZE, CHUNK_TOKENS, OTHER_CHUNK_TOKENS

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

# The share of those figures that is taken to be reached: assumptions, on the careful side.
USED = {"bandwidth": 0.4, "reading": 0.4, "training": 0.35}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

SAMPLE = 512


gpu_option = click.option(
    "--gpu", type=click.Choice(list(GPUS)), default=None, help="With --dry-run: estimate the hours on this GPU."
)


def plan_options(function):
    """Decorator: what `--dry-run` of a step that writes text can be told."""
    for option in reversed(
        (
            click.option(
                "--like",
                metavar="FILE",
                default=None,
                help="With --dry-run: a finished output of a smaller run, for the length of the answers.",
            ),
            gpu_option,
            click.option(
                "--price",
                nargs=2,
                type=click.FloatRange(min=0),
                default=None,
                metavar="IN OUT",
                help="With --dry-run: what a million tokens cost, read and written.",
            ),
        )
    ):
        function = option(function)
    return function


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
        """Numbers that keys and values of one token take in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shape_of(model: str) -> Shape | None:
    """The sizes of a local folder's model from config.json and the headers of its weights; None elsewhere."""
    folder = Path(model_path(model))
    count = parameters(model)
    if count is None or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
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


def parameters(model: str) -> int | None:
    """Number of parameters in a local folder's safetensors files, read from their headers; None elsewhere."""
    total = 0
    for file in Path(model_path(model)).glob("*.safetensors"):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def token_counter(model: str) -> Callable[[Sequence[Sequence[dict]]], list[int]]:
    """Conversations to their tokens as the model reads them; by characters where it has no tokenizer here."""
    folder = Path(model_path(model))
    if not (folder / "tokenizer.json").is_file():
        return lambda found: [_characters(one) // 4 + 4 * len(one) for one in found]
    from tokenizers import Tokenizer

    tokenizer, render = Tokenizer.from_file(str(folder / "tokenizer.json")), _template(folder)

    def count(found):
        texts = [render(one) for one in found]
        return [len(made.ids) for made in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return count


def _characters(conversation: Sequence[dict]) -> int:
    return sum(len(message["content"]) for message in conversation)


def _template(folder: Path) -> Callable[[Sequence[dict]], str]:
    """The chat template, applied by Jinja alone; where it can't be, the messages with some letters for its marks."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = folder / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    else:
        source = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {
        name: value.get("content", "") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda _format: "01 Jan 2026"

    def plain(conversation):
        return "".join(f"\n{message['role']}:\n{message['content']}\n" for message in conversation)

    try:
        template = environment.from_string(source if isinstance(source, str) else "")
    except TemplateError:
        return plain

    def render(conversation):
        last = conversation[-1]
        # Templates that read lists of parts drop plain text without a word.
        parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in conversation]
        for messages in (list(conversation), parts):
            try:
                text = template.render(
                    messages=messages,
                    add_generation_prompt=last["role"] != "assistant",
                    enable_thinking=False,
                    **tokens,
                )
            except (TemplateError, TypeError):
                continue
            if last["content"].strip() in text:
                return text
        return plain(conversation)

    return render


def _refuse(message: str):
    from jinja2 import TemplateError

    raise TemplateError(message)


# --- memory -------------------------------------------------------------------------------------------------


def text_memory(shape: Shape, *, size: int, rows: int, longest: int, new: int, chunk: int) -> dict[str, int]:
    """Bytes of tensors at the peak of a step that writes text.

    Args:
        size: bytes of one number (`BYTES`).
        rows, longest, new: rows of the largest batch, tokens of its longest prompt and of each answer.
        chunk: tokens of prompts in one forward pass (`engines.CHUNK_TOKENS`).
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
) -> dict[str, int]:
    """Bytes of tensors at the peak of a training step with AdamW.

    Args:
        tokens: in one forward pass, padding counted.
        lora_rank: None trains all weights, in float32.
        autocast: activations in two bytes over float32 weights (and a copy of the weights in two bytes).
        checkpointing: only each block's input is kept, and one block is computed again.
        frozen_size: bytes of a weight that is not trained (2 for a bfloat16 base).
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
    size = 2 if autocast else 4
    # What a block keeps for its backward pass: inputs of its norms and their normed copies (in float32), query,
    # key, value and their rotated forms, attention's output twice; gate, its activation, up, and their product.
    normed = 4 * 4 * shape.hidden
    inside = size * (
        3 * shape.heads * shape.head_size + 3 * shape.kv_heads * shape.head_size + 2 * shape.hidden + 4 * shape.inner
    )
    block = normed + inside
    kept = shape.layers * size * shape.hidden + block if checkpointing else shape.layers * block
    # Logits, their float32 copy and the gradient of it.
    logits = shape.vocabulary * (12 if not autocast else 10)
    return {
        "weights": weights,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": tokens * (kept + logits),
    }


def gigabytes(parts: dict[str, int]) -> dict[str, float]:
    """The parts and their sum in GB (10⁹ bytes)."""
    return {name: float(f"{value / 1e9:.3g}") for name, value in {**parts, "total": sum(parts.values())}.items()}


# --- time and money -----------------------------------------------------------------------------------------


def text_hours(
    shape: Shape, gpu: str, *, size: int, rows: int, prompt_tokens: int, new_tokens: int, length: float
) -> float:
    """Hours on one GPU: reading is bound by arithmetic, writing by whatever is slower, arithmetic or memory.

    Args:
        rows: in a batch. length: tokens of a row, on average, while it is written.
    """
    _, bandwidth, flops = GPUS[gpu]
    reading = 2 * shape.parameters * prompt_tokens / (flops * 1e12 * USED["reading"])
    moved = (shape.parameters / rows + shape.kv * length) * size / (bandwidth * 1e12 * USED["bandwidth"])
    computed = 2 * shape.parameters / (flops * 1e12 * USED["reading"])
    return (reading + new_tokens * max(moved, computed)) / 3600


def training_hours(shape: Shape, gpu: str, *, tokens: int, lora: bool = False, checkpointing: bool = False) -> float:
    """Hours on one GPU: 6 operations a parameter and token, 4 where the weights are frozen, and 2 more where
    activations are computed again (arXiv 2001.08361, section 2.1)."""
    work = (4 if lora else 6) + (2 if checkpointing else 0)
    return work * shape.parameters * tokens / (GPUS[gpu][2] * 1e12 * USED["training"]) / 3600


def cost(prompt_tokens: int, new_tokens: int, price: tuple[float, float]) -> float:
    """What the tokens cost, in the currency of `price`: of a million read and of a million written."""
    return (prompt_tokens * price[0] + new_tokens * price[1]) / 1e6


# --- plans --------------------------------------------------------------------------------------------------


def text_plan(
    conversations: Iterable[Sequence[dict]],
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
) -> dict:
    """What `--dry-run` says of a step that writes text (max_new_tokens 0: that reads labels).

    Args:
        like: an output whose manifest says how long answers were.
        dtype: auto is taken for bfloat16, float32 on a CPU.
    """
    prompt_tokens, longest, calls = count_tokens(conversations, model)
    new = sampling.max_new_tokens
    plan = {
        "model_calls": calls,
        "prompt_tokens_about": prompt_tokens,
        "new_tokens_at_most": calls * new,
        "weights_on_disk_mb": _megabytes(model),
    }
    new_tokens = plan["new_tokens_at_most"]
    if like:
        new_tokens = plan["new_tokens_about"] = round(calls * mean_answer(like))
    if price:
        plan["cost_about" if like else "cost_at_most"] = round(cost(prompt_tokens, new_tokens, price), 4)
    shape = shape_of(model)
    if shape is None or not calls:
        return plan
    cpu = device == "cpu"
    size = BYTES[("float32" if cpu else "bfloat16") if dtype == "auto" else dtype]
    rows = min(batch_size or BATCH_SIZE, calls)
    if batch_tokens:
        rows = max(1, min(rows, batch_tokens // (longest + new)))
    chunk = CHUNK_TOKENS["cpu"] if cpu else OTHER_CHUNK_TOKENS
    memory = text_memory(shape, size=size, rows=rows, longest=longest, new=new, chunk=chunk)
    plan["memory_gb"] = gigabytes(memory)
    if gpu:
        length = (prompt_tokens + new_tokens / 2) / calls
        hours = text_hours(
            shape, gpu, size=size, rows=rows, prompt_tokens=prompt_tokens, new_tokens=new_tokens, length=length
        )
        plan[f"hours_on_one_{gpu}"] = float(f"{hours:.3g}")
    return plan


def _megabytes(model: str) -> float | str:
    sizes = [file.stat().st_size for file in Path(model_path(model)).glob("*.safetensors")]
    return round(sum(sizes) / 1e6, 1) if sizes else "unknown"


def count_tokens(conversations: Iterable[Sequence[dict]], model: str) -> tuple[int, int, int]:
    """(tokens of all, of the longest, how many conversations there are), from a random sample of `SAMPLE`."""
    draw, sample = random.Random(0), []
    calls = characters = most = 0
    for one in conversations:
        calls += 1
        length = _characters(one)
        characters, most = characters + length, max(most, length)
        if len(sample) < SAMPLE:
            sample.append(one)
        elif (place := draw.randrange(calls)) < SAMPLE:
            sample[place] = one
    if not calls:
        return 0, 0, 0
    counted = token_counter(model)(sample)
    sampled = sum(map(_characters, sample))
    if calls == len(sample):
        return sum(counted), max(counted), calls
    rate = sum(counted) / max(1, sampled)
    return round(rate * characters), max(*counted, round(rate * most)), calls


def mean_answer(output: str) -> float:
    """Tokens of an answer on average, by the manifest of a finished output. InputError if it has none."""
    tokens = (read_manifest(output) or {}).get("tokens") or {}
    if not tokens.get("rows"):
        raise InputError(
            "no manifest that counts the tokens of answers",
            where=output,
            expected="a finished output of generate, critique or revise",
            remedy="Make one with --limit 100, and name it with --like",
        )
    return tokens["new"] / tokens["rows"]


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
) -> dict:
    """What `--dry-run` says of a training: rows, optimizer steps, tokens, memory, hours.

    Args:
        lengths: tokens of each row, both sides of a pair together (`lengths_of`).
        batch_size: rows in one forward pass; rows of like length go together.
        frozen: folders of models that every row also goes through, such as a reference. (That under LoRA, the policy
            without its adapters, takes no memory; the time of its pass is not counted.)
        device: cpu is taken for float32 without checkpointing; else bfloat16 over float32 weights, with it.
    """
    rows, tokens = round(epochs * len(lengths)), round(epochs * sum(lengths))
    plan = {
        "rows": len(lengths),
        "steps": max(1, math.ceil(rows / batch_size / gradient_accumulation)),
        "tokens_about": tokens,
    }
    shape, others = shape_of(model), [shape_of(name) for name in frozen]
    if shape is None or None in others or not lengths:
        return plan
    widest = max(lengths) * min(batch_size, len(lengths))
    memory = _trained([shape], others, tokens=widest, lora_rank=lora_rank, cpu=device == "cpu")
    plan["memory_gb"] = gigabytes(memory)
    if gpu:
        hours = training_hours(shape, gpu, tokens=tokens, lora=bool(lora_rank), checkpointing=True)
        hours += sum(
            text_hours(other, gpu, size=2, rows=1, prompt_tokens=tokens, new_tokens=0, length=0) for other in others
        )
        plan[f"hours_on_one_{gpu}"] = float(f"{hours:.3g}")
    return plan


def rl_plan(
    model: str,
    prompts: Iterable[Sequence[dict]],
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
) -> dict:
    """What `--dry-run` says of PPO, GRPO and RLOO beside their updates: tokens, memory, hours.

    Args:
        prompts: conversations, each sampled equally often, `episodes` responses in all.
        epochs: passes over the responses of an update.
        batch_size: responses in one forward pass of the training.
        sampled: responses that are written at once.
        value_model: folder of a model that is trained beside the policy.
        frozen: folders of the models that only read: reward models, a reference.
    """
    told, longest, count = count_tokens(prompts, model)
    read, new = round(episodes * told / max(1, count)), episodes * new_tokens
    plan = {"prompt_tokens_about": read, "new_tokens_at_most": new}
    trained = [shape_of(name) for name in (model, value_model) if name]
    others = [shape_of(name) for name in frozen]
    if None in (*trained, *others) or not count:
        return plan
    cpu, policy = device == "cpu", trained[0]
    memory = _trained(trained, others, tokens=batch_size * (longest + new_tokens), lora_rank=lora_rank, cpu=cpu)
    size, rows = (4 if cpu else 2), min(sampled, episodes)
    # Weights, gradients and moments stay where they are while the policy writes.
    writing = text_memory(
        policy,
        size=size,
        rows=rows,
        longest=longest,
        new=new_tokens,
        chunk=CHUNK_TOKENS["cpu"] if cpu else OTHER_CHUNK_TOKENS,
    )
    memory["activations"] = max(memory["activations"], writing["kv_cache"] + writing["activations"])
    plan["memory_gb"] = gigabytes(memory)
    if gpu:
        reading = {"size": size, "rows": 1, "prompt_tokens": read + new, "new_tokens": 0, "length": 0}
        hours = text_hours(
            policy, gpu, size=size, rows=rows, prompt_tokens=read, new_tokens=new, length=(read + new / 2) / episodes
        )
        hours += sum(text_hours(shape, gpu, **reading) for shape in (*trained, *others))
        hours += sum(
            training_hours(shape, gpu, tokens=epochs * (read + new), lora=bool(lora_rank), checkpointing=True)
            for shape in trained
        )
        plan[f"hours_on_one_{gpu}"] = float(f"{hours:.3g}")
    return plan


def _trained(
    trained: Sequence[Shape], frozen: Sequence[Shape], *, tokens: int, lora_rank: int | None, cpu: bool
) -> dict[str, int]:
    """`training_memory` of all that is trained, and the weights that are only read. Logits are counted for a reward
    or value model too, which has none: on the careful side."""
    parts = [
        training_memory(
            shape,
            tokens=tokens,
            lora_rank=lora_rank,
            autocast=not cpu,
            checkpointing=not cpu,
            frozen_size=4 if cpu else 2,
        )
        for shape in trained
    ]
    memory = {name: sum(part[name] for part in parts) for name in parts[0]}
    if frozen:
        memory["frozen_models"] = (4 if cpu else 2) * sum(shape.parameters for shape in frozen)
    return memory


def lengths_of(model: str, rows: Sequence[tuple[Sequence[dict], Sequence[str]]]) -> list[int]:
    """Tokens of each row (a conversation and answers to it): of the conversation with each answer, added up.

    Those of `SAMPLE` rows drawn at random are counted, the others told from their characters.
    """

    def with_each(row):
        return [[*row[0], {"role": "assistant", "content": answer}] for answer in row[1]]

    characters = [sum(map(_characters, with_each(row))) for row in rows]
    sample = random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows)))
    counted = iter(token_counter(model)([one for at in sample for one in with_each(rows[at])]))
    known = {at: sum(next(counted) for _ in rows[at][1]) for at in sample}
    rate = sum(known.values()) / max(1, sum(characters[at] for at in sample))
    return [known.get(at, round(rate * length)) for at, length in enumerate(characters)]
