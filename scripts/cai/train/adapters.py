"""LoRA adapters trained fast on few cores: a plain loop over rows of token ids, resumable, and the same on every run.

    adapt(model, [rows], "runs/critic", Settings(), base="smollm2")

The forward pass multiplies by the merged weights, which is what the adapter becomes when it is loaded; the two small
matrices of each layer and the optimizer are in float32. That spares the narrow products of peft's layers, which a CPU
does slowly, and what rows begin with in common is computed once. Leaves out several devices, and what the rows say
(adapter_rows.py).
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cai.base.errors import InputError
from cai.base.files import write_text
from cai.base.hashing import sha256_file, sha256_text
from cai.models import decoding
from cai.train.common import check_first_layer, lora_config, training_order

# The linear layers of a Llama block, which get an adapter.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

STATE, WEIGHTS = "state.pt", "adapter_model.safetensors"

BEGINNING = 36  # tokens: a template's first words, or of its principle

CLIP = 1.0  # largest norm of a step's gradient

WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained.

    first_layer: the first block, from 0, that gets an adapter. What a small model knows of a text is in the states of
        its middle blocks already; later ones learn to say it from fewer examples, and what is before has no gradient.
    batch_tokens: of one step, padding counted. save_steps: between saved states.
    """

    rank: int = 16
    first_layer: int = 16
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    seed: int = 0
    save_steps: int = 10


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a conversation, how many at its end have a loss, and what the first of these counts for.

    lead: 0 for a share like that of any target; 1 if it counts as much as all of them.
    beginning: rows that have so many first tokens in common come in the same batches.
    """

    ids: Sequence[int]
    targets: int
    lead: float = 0.0
    beginning: int = BEGINNING


def adapted_layers(model: Any, settings: Settings) -> dict[str, Any]:
    """{name: layer}: put an adapter on the linear layers named in TARGETS, in place; only the adapters are trained.

    The first matrix is drawn from the seed, the second is zero, so that training begins at the model itself.
    """
    import torch

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    check_first_layer(settings.first_layer, model.config.num_hidden_layers, model.name_or_path)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in TARGETS and int(name.split(".")[2]) >= settings.first_layer
    }
    generator = torch.Generator().manual_seed(settings.seed)
    for layer in layers.values():
        outputs, inputs = layer.weight.shape
        bound = 1 / math.sqrt(inputs)
        first = torch.empty(settings.rank, inputs).uniform_(-bound, bound, generator=generator)
        layer.lora_a = torch.nn.Parameter(first)
        layer.lora_b = torch.nn.Parameter(torch.zeros(outputs, settings.rank))
        layer.forward = _forward_of(layer, lora_config(settings.rank).lora_alpha / settings.rank)
    return layers


def _forward_of(layer: Any, scale: float) -> Callable:
    merge = _merged_product()
    return lambda inputs: merge.apply(inputs, layer.weight, layer.lora_a, layer.lora_b, scale)


def _merged_product() -> Any:
    """The product with the merged weights, as a function whose gradient goes to the two matrices of the adapter."""
    import torch

    class MergedProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, weight, a, b, scale):
            a, b = a.to(weight.dtype), b.to(weight.dtype)
            merged = torch.addmm(weight, b, a, alpha=scale)
            ctx.save_for_backward(inputs, merged, a, b)
            ctx.scale = scale
            return torch.nn.functional.linear(inputs, merged)

        @staticmethod
        def backward(ctx, gradient):
            inputs, merged, a, b = ctx.saved_tensors
            rows, slopes = inputs.flatten(0, -2), gradient.flatten(0, -2)
            gradient_a = ((slopes @ b).T @ rows).float() * ctx.scale
            gradient_b = (slopes.T @ (rows @ a.T)).float() * ctx.scale
            return gradient @ merged, None, gradient_a, gradient_b, None

    return MergedProduct


def batches_of(rows: Sequence[TokenRow], settings: Settings, seed: int) -> list[list[int]]:
    """Row numbers in batches of at most `batch_tokens` tokens (and at least one row), the batches shuffled.

    Rows with the same first tokens (`beginning`) come together, because what they have in common is computed once; of
    these, rows of similar length.
    """
    batches: list[list[int]] = []

    def fits(row: int) -> bool:
        together = [rows[number] for number in (*batches[-1], row)]
        shared = shared_tokens(together)
        return shared + len(together) * (len(rows[row].ids) - shared) <= settings.batch_tokens

    def beginning(row: int) -> tuple[int, ...]:
        return tuple(rows[row].ids[: rows[row].beginning])

    for row in sorted(range(len(rows)), key=lambda row: (beginning(row), len(rows[row].ids))):
        if batches and beginning(batches[-1][0]) == beginning(row) and fits(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [batches[number] for number in training_order([1] * len(batches), 1, 1, seed)]


def shared_tokens(rows: Sequence[TokenRow]) -> int:
    """How many tokens all rows begin with, the last of a prompt and what follows left out; 0 for a single row."""
    if len(rows) < 2:
        return 0
    first, most = rows[0].ids, min(len(row.ids) - row.targets for row in rows) - 1
    same = (all(row.ids[at] == first[at] for row in rows) for at in range(most))
    return next((at for at, is_same in enumerate(same) if not is_same), max(most, 0))


def hidden_states(model: Any, rows: Sequence[TokenRow]) -> tuple[Any, int]:
    """(states of the last layer after the shared tokens, how many are shared): (rows, longest - shared, width).

    Padding is on the right, where no token that counts can see it.
    """
    import torch
    from transformers import DynamicCache

    shared = shared_tokens(rows)
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids[shared:], *[0] * (width - len(row.ids))] for row in rows])
    if not shared:
        return model.model(ids, use_cache=False)[0], 0
    cache, name = DynamicCache(), str(decoding.cache_parameter(model.model.__class__))
    model.model(torch.tensor([rows[0].ids[:shared]]), use_cache=True, **{name: cache})
    for layer in cache.layers:
        layer.keys, layer.values = (states.expand(len(rows), -1, -1, -1) for states in (layer.keys, layer.values))
    return model.model(ids, use_cache=True, **{name: cache})[0], shared


def loss_of(model: Any, rows: Sequence[TokenRow]) -> Any:
    """Mean over the rows of the mean loss of their targets, and `lead` times that of the first of these.

    So a label counts as much as a text.
    """
    import torch

    hidden, shared = hidden_states(model, rows)
    at = [(n, len(row.ids) - row.targets + k) for n, row in enumerate(rows) for k in range(row.targets)]
    lines, columns = (torch.tensor(numbers) for numbers in zip(*at, strict=True))
    logits = model.lm_head(hidden[lines, columns - 1 - shared]).float()
    targets = torch.tensor([rows[n].ids[column] for n, column in at])
    leads = [row.lead * (k == 0) for row in rows for k in range(row.targets)]
    weights = torch.tensor([1 / rows[n].targets + lead for (n, _), lead in zip(at, leads, strict=True)])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / len(rows)


def adapt(
    model: Any,
    epochs: Sequence[Sequence[TokenRow]],
    folder: str | Path,
    settings: Settings,
    *,
    base: str,
    start: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train adapters on the rows of each epoch, and save them to `folder` in peft's form; {steps, tokens, loss}.

    The model is changed. A run that was stopped continues from its last saved state, with the same result.

    Args:
        model: a Llama-like language model, with its weights in the dtype of the forward pass.
        base: what the adapter names as its base.
        start: folder of an adapter of the same shape, from which training begins.
    """
    import torch

    folder = Path(folder)
    layers = adapted_layers(model, settings)
    if start:
        load_adapter(layers, Path(start))
    parameters = [parameter for layer in layers.values() for parameter in (layer.lora_a, layer.lora_b)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    plan = [
        (rows, batch)
        for number, rows in enumerate(epochs)
        for batch in batches_of(rows, settings, settings.seed + number)
    ]
    identity = _identity(epochs, settings, start)
    losses = _resume(folder, identity, parameters, optimizer)
    step = len(losses)
    model.train()
    started, seen = time.monotonic(), 0
    for rows, batch in plan[step:]:
        chosen = [rows[number] for number in batch]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, len(plan))
        loss = loss_of(model, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step, seen = step + 1, seen + sum(len(row.ids) for row in chosen)
        if step % settings.save_steps == 0 and step < len(plan):
            _save_state(folder, parameters, optimizer, losses, identity)
            recent = sum(losses[-settings.save_steps :]) / settings.save_steps
            speed = seen / (time.monotonic() - started)
            report(f"step {step} of {len(plan)}, loss {recent:.3f}, {speed:.0f} tokens/s")
    save_adapter(layers, folder, settings, base)
    (folder / STATE).unlink(missing_ok=True)
    tokens = sum(len(rows[number].ids) for rows, batch in plan for number in batch)
    return {"steps": len(plan), "tokens": tokens, "loss": round(sum(losses[-50:]) / len(losses[-50:]), 4)}


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate: up in a straight line, then down to zero along a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _identity(epochs: Sequence[Sequence[TokenRow]], settings: Settings, start: str | Path | None) -> str:
    """A hash of all that decides a training, beside the model."""
    rows = [[[*row.ids], row.targets, row.lead] for rows in epochs for row in rows]
    begins = sha256_file(Path(start) / WEIGHTS) if start else None
    return sha256_text(json.dumps([asdict(settings), [len(rows) for rows in epochs], rows, begins]))


def _resume(folder: Path, identity: str, parameters: Sequence[Any], optimizer: Any) -> list[float]:
    """Take over the saved state of the same training, and return the losses of its steps; none where there is none."""
    import torch

    if not (folder / STATE).is_file():
        return []
    state: dict = torch.load(folder / STATE, weights_only=True)
    if state.get("identity") != identity:
        return []
    for parameter, saved in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])


def _save_state(folder, parameters, optimizer, losses, identity) -> None:
    """Write what a resumed training needs, complete or not at all."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {"losses": losses, "identity": identity}
    state |= {"parameters": [parameter.data for parameter in parameters], "optimizer": optimizer.state_dict()}
    torch.save(state, folder / f"{STATE}.tmp")
    os.replace(folder / f"{STATE}.tmp", folder / STATE)


def load_adapter(layers: dict[str, Any], folder: Path) -> None:
    """Give the layers the matrices that `save_adapter` wrote. InputError for an adapter of other layers or rank."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    wanted = {_tensor_name(name, kind): matrix for name, kind, matrix in _matrices(layers)}
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: m.shape for name, m in wanted.items()}:
        raise InputError(
            "an adapter of other layers or another rank",
            where=folder,
            remedy="Give the --rank, --first-layer and --model that it was built with",
        )
    for name, matrix in wanted.items():
        matrix.data.copy_(tensors[name])


def _matrices(layers: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name of the layer, kind, matrix) of all adapters."""
    for name, layer in layers.items():
        yield name, "lora_A", layer.lora_a
        yield name, "lora_B", layer.lora_b


def _tensor_name(layer: str, kind: str) -> str:
    return f"base_model.model.{layer}.{kind}.weight"


def save_adapter(layers: dict[str, Any], folder: Path, settings: Settings, base: str) -> None:
    """Write the adapter as peft reads it: WEIGHTS in bfloat16, and adapter_config.json."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _tensor_name(name, kind): matrix.detach().to(torch.bfloat16).contiguous()
        for name, kind, matrix in _matrices(layers)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    lora = lora_config(settings.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "layers_to_transform": sorted({int(name.split(".")[2]) for name in layers}),
        "inference_mode": True,
    }
    write_text(folder / "adapter_config.json", f"{json.dumps(config, indent=1)}\n")
