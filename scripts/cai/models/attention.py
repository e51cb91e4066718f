"""Attention of local models on a CPU, where transformers' own copies keys and values or reads padding.

    if attention.suits(model): attention.use(model)

With grouped heads (several heads of queries share one of keys and values) transformers copies the shared keys and
values once per head, as soon as a mask is given. Here they are shared, with the same result. While text is written
in 16 bits, each step reads the columns of each row once, without those that are only padding: at this length of a
query (one token) torch's fused kernel takes twice as long as two products of matrices (measured with torch 2.13).

In float32 the values are those of transformers to rounding; a model in float32 whose heads share nothing keeps
transformers' attention. Leaves out GPUs, whose kernels do all this, and attention with a bias or capped scores.
"""

from collections import deque
from typing import Any

NAME = "cai_cpu"  # as transformers knows this attention

ROWS = 16  # rows of a batch that are read together, from the first column that any of them needs

# (mask, parts) of the last masks: every layer gets the same one.
_recent: deque[tuple[Any, list[tuple[slice, int]]]] = deque(maxlen=4)


def suits(model: Any) -> bool:
    """Whether `use` makes a model faster: on a CPU, with fused attention, grouped heads or 16-bit weights."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    is_grouped = heads is not None and (getattr(config, "num_key_value_heads", None) or heads) < heads
    is_fused = getattr(model.config, "_attn_implementation", None) == "sdpa"
    return model.device.type == "cpu" and is_fused and (is_grouped or is_16_bit(model.dtype))


def use(model: Any) -> None:
    """Let a model take this attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def is_used(model: Any) -> bool:
    """Whether a model takes this attention."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def is_16_bit(dtype: Any) -> bool:
    return bool(dtype.is_floating_point and dtype.itemsize == 2)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """transformers' interface of an attention function.

    Args:
        query: (rows, heads, tokens, size). key, value: (rows, heads of keys, columns, size).
        attention_mask: (rows, 1, tokens, columns), true where a token sees a column; or None: all, or causal.
    Returns:
        (output (rows, tokens, heads, size), None)
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokens, is_grouped = query.shape[2], key.shape[1] < query.shape[1]
    is_plain = not dropout and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "s_aux"))
    if is_plain and tokens == 1 and is_16_bit(query.dtype):
        return _attend_one(query, key, value, attention_mask, scaling).transpose(1, 2), None
    if is_plain and tokens > 1 and is_grouped:
        is_causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=is_causal, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None


def _attend_one(query: Any, key: Any, value: Any, mask: Any, scaling: float | None) -> Any:
    """The output (rows, heads, 1, size) of one token per row."""
    import torch

    rows, heads, _, size = query.shape
    grouped = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows, key.shape[1], -1, size)
    output = torch.empty_like(grouped)
    for part, start in _parts(mask, rows):
        scores = torch.matmul(grouped[part], key[part, :, start:].transpose(-1, -2)).float()
        if mask is not None:
            scores.masked_fill_(~mask[part, :, :, start:], -torch.inf)
        torch.matmul(scores.softmax(-1).to(query.dtype), value[part, :, start:], out=output[part])
    return output.view(rows, heads, 1, size)


def _parts(mask: Any, rows: int) -> list[tuple[slice, int]]:
    """(rows, the first column that one of them sees) of each part of a batch."""
    if mask is None:
        return [(slice(0, rows), 0)]
    for known, parts in _recent:
        if known is mask:
            return parts
    first = mask[:, 0, 0].int().argmax(-1).tolist()
    parts = [(slice(n, n + ROWS), min(first[n : n + ROWS])) for n in range(0, rows, ROWS)]
    _recent.append((mask, parts))
    return parts
