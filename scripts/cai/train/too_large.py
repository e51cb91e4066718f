"""PPO of models that do not fit on one GPU: the engine that takes them, and the command that hands the run over.

    too_large.check(options, ["runs/sft", "runs/reward"], ["runs/reward", "runs/sft"])

Each process of ppo.py holds a copy of all its models. What is compared with the GPU is the least that these need (their
weights, gradients and optimizer, without activations), so that a model that fits is never refused. Leaves out CPUs, and
devices whose memory is not known.
"""

import math
import os
import shlex
from collections.abc import Sequence
from typing import Any

from cai.base.errors import InputError
from cai.models import estimate, folders, loading
from cai.train import rewards

# GPUs of one machine, and the share of their memory that models may take, when machines are counted.
GPUS_PER_NODE, USABLE = 8, 0.7

# OpenRLHF shards by ZeRO-3; beyond this number of parameters verl's Megatron workers split single layers as well.
LARGEST_BY_LAYERS = 100e9


def check(options, trained: Sequence[str], frozen: Sequence[str]) -> None:
    """Raise InputError, with the engine and the command, under a launcher that shards models, or if the models can't
    fit on this process's GPU.

    Args:
        options: of ppo.py.
        trained, frozen: folders or hub ids: the policy and a value model; reward models and a reference.
    """
    memory = loading.device_memory(options.device)
    needed = least_memory(trained, frozen, options.lora_rank if options.lora else None, options.dtype)
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        fault = "PPO does not run under FSDP or DeepSpeed"
    elif memory is not None and needed is not None and needed > memory:
        fault = f"PPO needs at least {needed / 1e9:.0f} GB on each GPU, which has {memory / 1e9:.0f}"
    else:
        return
    raise InputError(
        fault,
        where=options.model,
        expected="one process, or several with a copy of the models each",
        remedy=f"Launch with --multi_gpu{'' if options.lora else ' and --lora'} models that fit on one GPU. An engine "
        f"that shards them takes the run from here: {command(options, needed or 0, memory)}",
    )


def plan(options, trained: Sequence[str], frozen: Sequence[str]) -> dict[str, Any]:
    """What --dry-run --gpu adds for models that do not fit on that GPU: {hand_over: command}; else {}."""
    needed = least_memory(trained, frozen, options.lora_rank if options.lora else None, options.dtype)
    if not options.gpu or needed is None:
        return {}
    memory = estimate.GPUS[options.gpu][0] * 10**9
    return {"hand_over": command(options, needed, memory)} if needed > memory else {}


def least_memory(trained: Sequence[str], frozen: Sequence[str], lora_rank: int | None, dtype: str) -> int | None:
    """Bytes of weights, gradients and optimizer on a GPU; None where the sizes of a model are not known.

    Args:
        trained, frozen: as for `check`.
        dtype: of --dtype. Trained weights, and all that belongs to them, take two bytes each in bfloat16 alone.
    """
    shapes = [estimate.shape_of(name) for name in (*trained, *frozen)]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    total = 2 * sum(shape.parameters for shape in known[len(trained) :])
    for shape in known[: len(trained)]:
        parts = estimate.training_memory(shape, tokens=0, lora_rank=lora_rank, frozen_size=2)
        total += sum(parts.values()) // (2 if dtype == "bfloat16" else 1)
    return total


def command(options, needed: float, memory: float | None) -> str:
    """The command line that hands the run to an engine.

    Args:
        needed, memory: bytes, of all the models and of one GPU; None: a GPU of 80 GB.
    """
    engine = "openrlhf" if (folders.count_parameters(options.model) or 0) <= LARGEST_BY_LAYERS else "verl"
    nodes = math.ceil(needed / (GPUS_PER_NODE * USABLE * (memory or 80e9)))
    line = ["python", "scripts/export.py", "--to", engine, "--stage", "ppo"]
    line += [part for path in options.inputs for part in ("--input", path)]
    line += ["--model", options.model]
    models = [name for name in options.reward_model if not rewards.is_function(name)]
    line += ["--reward-model", models[0]] if models else []
    line += ["--nodes", str(nodes)] if nodes > 1 else []
    line += ["--output", f"{options.output.rstrip(os.sep)}-{engine}"]
    return shlex.join(line)
