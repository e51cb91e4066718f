"""The memory that each step needs, for a model's shape and for models of common sizes.

    step_memory(shape_of("tiny"), gpu=False)["judge"]     # GB
    print(hardware_table(hardware_rows()))

Leaves out several GPUs and models that are not Llama-like.
"""

from functools import partial
from typing import Any

from cai.base.errors import InputError, shorten
from cai.models import estimate
from cai.models.estimate import GPUS, Shape, gigabytes, supervised_memory, text_memory, training_memory

# The steps are estimated for these: the defaults of the commands, for rows of this length.
TOKENS, NEW, ROWS, TRAINING_ROWS = 512, 256, 32, 8

# From the published config.json of each: layers, hidden, inner, heads, key heads, head size, vocabulary, and whether
# the output layer shares the embedding.
PUBLISHED = {
    "Llama 3.2 1B": (16, 2048, 8192, 32, 8, 64, 128_256, True),
    "Llama 3.2 3B": (28, 3072, 8192, 24, 8, 128, 128_256, True),
    "Llama 3.1 8B": (32, 4096, 14_336, 32, 8, 128, 128_256, False),
    "Qwen2.5 14B": (48, 5120, 13_824, 40, 8, 128, 152_064, False),
    "Qwen2.5 32B": (64, 5120, 27_648, 40, 8, 128, 152_064, False),
    "Llama 3.1 70B": (80, 8192, 28_672, 64, 8, 128, 128_256, False),
}

# The same by their size alone, for an estimate without a model at hand: `--model size:8b`.
SIZE = "size:"
SIZES = {name.rsplit(" ", 1)[1].lower(): name for name in PUBLISHED}

# What CUDA, its kernels and Python take beside the tensors.
BESIDE_GB = 2


def step_memory(shape: Shape, gpu: bool) -> dict[str, float]:
    """{step: GB} of tensors at its peak, for rows of TOKENS + NEW tokens.

    Text steps with ROWS rows in a batch, training with TRAINING_ROWS; on a GPU in bfloat16 with checkpointing,
    else in float32.
    """
    size, tokens = 2 if gpu else 4, TRAINING_ROWS * (TOKENS + NEW)

    text = partial(text_memory, shape, size=size, rows=ROWS, longest=TOKENS, chunk=ROWS * TOKENS)
    train = partial(training_memory, shape, autocast=gpu, checkpointing=gpu)
    train_lora = partial(train, lora_rank=16, frozen_size=size)
    full, light = train(tokens=tokens), train_lora(tokens=tokens)

    def supervise(sides: int, lora_rank: int | None) -> dict[str, int]:
        longest = sides * (TOKENS + NEW)
        return supervised_memory(
            [shape], [], tokens=TRAINING_ROWS * longest, longest=longest, lora_rank=lora_rank, cpu=not gpu
        )

    frozen = shape.parameters * size  # a model without gradients: the reference, the reward model
    needs = {
        "generate, critique, revise": text(new=NEW),
        "judge": text(new=0),
        # Counted for a reward model, which reads two responses per row.
        "sft, reward_model (--lora)": supervise(2, 16),
        "sft, reward_model (--full)": supervise(2, None),
        "dpo (--lora)": supervise(2, 16),
        "dpo (--full)": {**supervise(2, None), "reference": frozen},
        # A value model of the policy's size is trained beside it; under LoRA the reference is the policy without
        # its adapters.
        "ppo (--lora)": {**light, "value": sum(light.values()), "reward": frozen},
        "ppo (--full)": {**full, "value": sum(full.values()), "reward": frozen, "reference": frozen},
    }
    return {step: gigabytes(parts)["total"] for step, parts in needs.items()}


def published_shape(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_size: int, vocabulary: int, tied: bool
) -> Shape:
    """The shape of a Llama-like decoder; its parameters counted matrix by matrix (biases and norms left out)."""
    attention = 2 * hidden * head_size * (heads + kv_heads)
    count = layers * (attention + 3 * hidden * inner) + vocabulary * hidden * (1 if tied else 2)
    return Shape(count, layers, hidden, inner, heads, kv_heads, head_size, vocabulary)


def shape_of(model: str) -> Shape | None:
    """The shape of `size:NAME`, or of a local folder's model; None elsewhere. InputError for an unknown size."""
    if not model.startswith(SIZE):
        return estimate.shape_of(model)
    name = model.removeprefix(SIZE).lower()
    if name not in SIZES:
        raise InputError(
            f"no size {shorten(name)!r}", where="--model", expected=f"{SIZE} and one of {', '.join(SIZES)}"
        )
    return published_shape(*PUBLISHED[SIZES[name]])


def hardware_rows() -> list[dict[str, Any]]:
    """[{model, parameters, steps: {step: {needs_gb, gpu}}}]; gpu is the smallest known one that holds it, or None."""
    rows: list[dict[str, Any]] = []
    for name, sizes in PUBLISHED.items():
        shape = published_shape(*sizes)
        needs = step_memory(shape, gpu=True).items()
        steps = {step: {"needs_gb": total, "gpu": _smallest_gpu(total)} for step, total in needs}
        rows.append({"model": name, "parameters": shape.parameters, "steps": steps})
    return rows


def _smallest_gpu(needed_gb: float) -> str | None:
    fitting = ((memory, gpu) for gpu, (memory, *_) in GPUS.items() if memory >= needed_gb + BESIDE_GB)
    return min(fitting, default=(0, None))[1]


def hardware_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: GB, and the smallest GPU that holds them."""
    lines = [["step", *(row["model"] for row in rows)], ["---"] * (1 + len(rows))]
    for step in rows[0]["steps"]:
        needs = (row["steps"][step] for row in rows)
        lines.append([step, *(f"{need['needs_gb']:.0f} GB: {need['gpu'] or 'several'}" for need in needs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
