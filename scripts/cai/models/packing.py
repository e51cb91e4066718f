"""Weights of a local model packed once for the processor, where torch packs them again in every product of matrices.

    if packing.suits(model): packing.pack(model)

oneDNN brings the weights of a product of matrices into the layout of its kernels first. Packed beforehand, a product
of 64 rows in bfloat16 takes 0.8 times as long and one of 1,024 rows 0.96 times, with the same values (torch 2.13,
AVX512-BF16). In float32 torch takes MKL instead, which leaves AVX512 unused on AMD's processors: there these products
take 0.1 to 0.5 times as long. The operators are those of torch's own compiler and not a public interface: where they
are missing, or a model answers differently with them, it keeps its layers. Leaves out models that are trained, and
small ones in float32 (`BFLOAT16_FROM`), whose values stay the same to the last byte.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from cai.models.local import BFLOAT16_FROM

ROWS = 64  # of the products that the layout is chosen for: a decoding step; the others are as fast with it

ROUNDING = 0.02  # of the largest logit: 8 bits, through many layers


def suits(model: Any) -> bool:
    """Whether `pack` makes a model faster: on a CPU, in bfloat16 or large in float32, with torch's operators for it."""
    import torch

    operators = torch.ops.mkldnn
    has_operators = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    is_large = sum(parameter.numel() for parameter in model.parameters()) >= BFLOAT16_FROM
    suits_dtype = model.dtype == torch.bfloat16 or (model.dtype == torch.float32 and is_large)
    return bool(model.device.type == "cpu" and suits_dtype and has_operators)


def pack(model: Any) -> bool:
    """Replace the linear layers of a model by packed ones; their own weights are freed, unless the embedding has them.

    Returns whether the model was changed: not if it fails with packed layers, or its logits are others than before.
    """
    import torch

    layers = list(_linear_layers(model))
    ids = torch.arange(8).clamp(max=model.config.get_text_config().vocab_size - 1)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        try:
            for parent, name, layer in layers:
                setattr(parent, name, _make_packed(layer))
            difference = (model(input_ids=ids, use_cache=False).logits - before).abs().max()
            is_same = bool(difference <= ROUNDING * before.abs().max())  # not so where a logit is NaN
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            is_same = False
    if not is_same:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
    return is_same


def _linear_layers(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(parent, name, layer) of the linear layers."""
    import torch

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                yield parent, name, layer


def _make_packed(layer: Any) -> Any:
    """A module that computes what a linear layer does."""
    return _packed_linear()(layer)


@cache
def _packed_linear() -> Any:
    """The class of packed layers; in a function, because torch is imported late."""
    import torch

    class PackedLinear(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
            self.bias = layer.bias

        def forward(self, states: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")

    return PackedLinear
