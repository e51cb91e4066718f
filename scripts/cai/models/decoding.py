"""The decoding loop: token ids of prompts in, token ids of answers out, each row sampled independently.

    prefixes = Prefixes(model, prompts, pad_id)
    for row, tokens in decode(model, prompts, prefixes, sampler, max_new_tokens=64, stop_ids={2}, pad_id=0): ...

What transformers' `generate` does not do: a beginning that several prompts share is computed once; logits are computed
for the last position only; keys and values lie in one buffer that never has to be copied to grow; rows that have
ended leave the batch. The tokens are those of the plain loop (in float32; in bfloat16 batches round differently).

For attention over tokens, full or by sliding window (`slow_reason`); models with recurrent states, shared layers and
the like run through `generate`. Leaves out beams, speculation, and rows that join a running batch: with fixed batches
a resumed run makes the same ones. torch and transformers are imported inside functions.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from cai.base.errors import CaiError
from cai.models import attention
from cai.models.engine import Sampling

# The shortest beginnings to look for, in tokens.
_BEGINNINGS = (8, 16, 32, 64, 128, 256, 512)

# Most tokens of shared beginnings to compute ahead.
_MOST_SHARED = 16384

_Tokens = list[int]


class RowSampler:
    """The draws of a batch: one uniform number per row and step, from the row's seed alone.

    Args:
        seeds: one per row.
        width: columns of the prompt, if this is used as a logits processor of `generate`.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], width: int = 0):
        import torch

        self.sampling, self.width = sampling, width
        self.failed: Any = None
        self.draws: Any = None
        if sampling.temperature > 0:
            draws = [np.random.Generator(np.random.Philox(key=s)).random(sampling.max_new_tokens) for s in seeds]
            self.draws = torch.tensor(np.array(draws), dtype=torch.float32)

    def pick(self, logits: Any, step: int, rows: Any = None) -> Any:
        """Token ids (rows,) drawn from logits (rows, vocabulary) at a step from 0.

        rows: numbers of the rows that the logits are of, a tensor; None for all in order.
        """
        if self.draws is None:
            highest, picked = logits.max(-1)  # the maximum is NaN where any logit is
            self._note_nan(highest)
            return picked
        self._note_nan(logits)
        if self.draws.device != logits.device:
            self.draws = self.draws.to(logits.device)
        uniform = self.draws[:, step] if rows is None else self.draws[rows, step]
        return draw(logits, uniform.unsqueeze(1), self.sampling.temperature, self.sampling.top_p)[:, 0]

    def _note_nan(self, values: Any) -> None:
        """Remember whether any value is NaN. `check` reads it later, because reading waits for the device."""
        failed = values.isnan().any()
        self.failed = failed if self.failed is None else self.failed | failed

    def __call__(self, input_ids: Any, logits: Any) -> Any:
        """As a logits processor: logits (rows, vocabulary), all -inf except the drawn token."""
        import torch

        picked = self.pick(logits, input_ids.shape[1] - self.width).unsqueeze(1)
        return torch.full_like(logits, -torch.inf).scatter_(1, picked, 0.0)

    def check(self, name: str) -> None:
        """Raise CaiError if any logit was NaN."""
        if bool(self.failed):
            raise not_a_number(name)


def draw(logits: Any, uniform: Any, temperature: float, top_p: float) -> Any:
    """Token ids (rows, 1) at which each row's cumulative probability exceeds its number in `uniform` (rows, 1).

    Tokens are in the order of their ids, not of probability: rounding can't change then which token a number selects.
    """
    import torch

    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked = probs.sort(-1, descending=True).values
        count = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)
        probs = probs.where(probs >= ranked.gather(-1, count - 1), 0)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    point = uniform.clamp(max=1 - 1e-6) * total  # so that rounding never reaches the end
    # Clamped for rows of NaN: they are reported later, and must not crash a GPU before.
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)


def not_a_number(name: str) -> CaiError:
    """The error of logits that are NaN."""
    return CaiError(f"{name}: the model's logits are not numbers (NaN). Try --dtype float32 or bfloat16")


# What transformers calls the cache among the arguments of `forward`, the newest name first (5.24 renamed it).
CACHE_PARAMETERS = ("cache", "past_key_values")


@cache
def cache_parameter(model_class: Any) -> str | None:
    """The name of the cache among the arguments of a model class's `forward`; None if there is none that is known."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in CACHE_PARAMETERS if name in parameters), None)


def slow_reason(model: Any) -> str | None:
    """Why `decode` can't run this model; None where a cache of keys and values is all that the model remembers.

    model: only its class and configuration are read; it may be on the meta device.
    """
    config = model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    missing = {"position_ids", "attention_mask"} - set(inspect.signature(model.__class__.forward).parameters)
    if cache_parameter(model.__class__) is None:
        missing.add(" or ".join(CACHE_PARAMETERS))
    reasons = {
        "it has an encoder": config.is_encoder_decoder,
        "it keeps a recurrent state": getattr(model, "_is_stateful", False),
        f"it has layers of type {', '.join(kinds)}": kinds,
        "its layers share keys and values": getattr(config, "num_kv_shared_layers", None),
        f"{type(model).__name__}.forward takes no {', no '.join(sorted(missing))}": missing,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def context_length(model: Any) -> int | None:
    """Tokens that the model's positions reach, None where it has no limit."""
    return config_context(model.config)


def config_context(config: Any) -> int | None:
    """`context_length` by a model's configuration. MPT has its own name for it."""
    config = config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def slow_warning(name: str, reason: str) -> str:
    """The warning of a model that `decode` can't run."""
    return (
        f"{name}: the fast decoding loop is off, because {reason}. Text comes from transformers' generate and "
        "nothing is shared among prompts, which takes several times as long"
    )


def forward(model: Any, ids: Any, last: Any, **kwargs: Any) -> Any:
    """A forward pass that computes the logits of column `last` (rows,) of each row only: (rows, 1, vocabulary)."""
    rows = range(len(last))
    # A hook in front of the head: a large vocabulary's logits are never computed for the other positions, and
    # whatever the model does after the head (capping, scaling) still happens.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0][rows, last.to(args[0].device)].unsqueeze(1),)
    )
    try:
        return model(input_ids=ids, **kwargs)
    finally:
        hook.remove()


def answer_logprobs(model: Any, pad_id: int, batch: Sequence[tuple[_Tokens, int]]) -> list[Any]:
    """For each (ids, begin) the log-probabilities (tokens, vocabulary) that ids[begin:] were chosen from, on the CPU.

    Raises CaiError if the rows do not fit the memory.
    """
    logprobs = _answer_logits(model, pad_id, batch, lambda logits: logits.log_softmax(-1).cpu())
    return [logprobs[row, : len(ids) - begin] for row, (ids, begin) in enumerate(batch)]


def token_logprobs(model: Any, pad_id: int, batch: Sequence[tuple[_Tokens, int]]) -> list[list[float]]:
    """For each (ids, begin) the log-probability of every token of ids[begin:], over the whole vocabulary.

    Unlike `answer_logprobs` it holds the vocabulary's log-probabilities on the model's device only.

    Raises CaiError if the rows do not fit the memory.
    """
    import torch

    longest = max(len(ids) - begin for ids, begin in batch)
    # What is beyond an answer is looked up too, and left out.
    targets = torch.tensor([[*ids[begin:], *[0] * (longest - len(ids) + begin)] for ids, begin in batch])[..., None]

    def pick(logits: Any) -> Any:
        return (logits.gather(-1, targets.to(logits.device))[..., 0] - logits.logsumexp(-1)).cpu()

    logprobs = _answer_logits(model, pad_id, batch, pick).tolist()
    return [logprobs[row][: len(ids) - begin] for row, (ids, begin) in enumerate(batch)]


def _answer_logits(model: Any, pad_id: int, batch: Sequence[tuple[_Tokens, int]], read: Callable[[Any], Any]) -> Any:
    """`read(logits)` of the logits (rows, tokens of the longest answer, vocabulary) that ids[begin:] are chosen from.

    One forward pass, padded on the right, which no token before can see. Logits are computed for these columns alone.
    """
    import torch

    width, longest = max(len(ids) for ids, _ in batch), max(len(ids) - begin for ids, begin in batch)
    ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids, _ in batch])
    # The token in column c is predicted in column c − 1; what is beyond the answer is computed and left out.
    columns = torch.tensor([[min(begin + k, len(ids)) - 1 for k in range(longest)] for ids, begin in batch])
    rows = torch.arange(len(batch))[:, None]
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0][rows.to(args[0].device), columns.to(args[0].device)],)
    )
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            return read(logits.float())
    except torch.OutOfMemoryError as error:
        raise CaiError(f"{len(batch)} rows of {width} tokens do not fit the memory. Lower --batch-size") from error
    finally:
        hook.remove()


class Prefixes:
    """Keys and values of the beginnings that groups of prompts share, computed once.

    Args:
        prompts: token ids. A prefix leaves at least one token of each of its prompts.
        share: False for a model whose cache can't be shared.
        within: shorter prefixes of the same prompts, which these continue. Those that no two prompts continue in the
            same way stay.
        chunk_tokens: prefixes are read so many tokens at a time, padding included; None: all at once.
    Attributes:
        token_ids, lengths: of each prefix. Their keys and values are padded on the left.
        width: columns of the cache, the longest prefix; 0 where nothing is shared.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[_Tokens],
        pad_id: int,
        share: bool = True,
        within: "Prefixes | None" = None,
        chunk_tokens: int | None = None,
    ):
        kept: list[int] = []
        known = [0] * len(prompts)
        if within:
            numbers = [within.find(prompt) for prompt in prompts]
            kept = sorted({number for number in numbers if number is not None})
            known = [0 if number is None else within.lengths[number] for number in numbers]
        new = shared_beginnings(prompts, known) if share else []
        if chunk_tokens:  # by what is left to read, which padding fills up to the longest of a pass
            new.sort(key=lambda prefix: (within.shared(prefix) if within else 0) - len(prefix))
        self.token_ids: list[list[int]] = new + ([within.token_ids[number] for number in kept] if within else [])
        self.lengths: list[int] = [len(prefix) for prefix in self.token_ids]
        self.width = max(self.lengths, default=0)
        self._by_length: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
        for number, prefix in enumerate(self.token_ids):
            self._by_length[len(prefix)][tuple(prefix)] = number
        self.layers: list[tuple[Any, Any]] = []
        if self.token_ids:
            self.layers = self._compute(model, new, pad_id, within, kept, chunk_tokens)

    def _compute(
        self,
        model: Any,
        new: list[list[int]],
        pad_id: int,
        within: "Prefixes | None",
        kept: list[int],
        chunk_tokens: int | None,
    ) -> list[tuple[Any, Any]]:
        """Each layer's keys and values, (prefixes, heads, columns, size): the new ones, then those kept of `within`."""
        import torch

        parts: list[tuple[list[tuple[Any, Any]], list[int], list[int]]] = []  # layers, start and length of each row
        unread = [len(prefix) - (within.shared(prefix) if within else 0) for prefix in new]
        for part in chunks(unread, chunk_tokens or sys.maxsize):
            with torch.inference_mode():
                _, past, starts = prefill(model, new[part.start : part.stop], within, pad_id)
            lengths = self.lengths[part.start : part.stop]
            parts.append(([(layer.keys, layer.values) for layer in past.layers], starts, lengths))
        if kept and within:
            lengths = self.lengths[len(new) :]
            starts = [within.width - length for length in lengths]
            parts.append(([(keys[kept], values[kept]) for keys, values in within.layers], starts, lengths))

        def join(layer: int, which: int) -> Any:
            states = parts[0][0][layer][which]
            joined = states.new_empty(len(self.token_ids), states.shape[1], self.width, states.shape[3])
            row = 0
            for layers, starts, lengths in parts:
                align(layers[layer][which], starts, lengths, joined[row : row + len(lengths)])
                row += len(lengths)
            return joined

        return [(join(layer, 0), join(layer, 1)) for layer in range(len(parts[0][0]))]

    def find(self, prompt: _Tokens) -> int | None:
        """The number of the longest prefix that the prompt begins with."""
        for length in sorted(self._by_length, reverse=True):
            if len(prompt) > length and (number := self._by_length[length].get(tuple(prompt[:length]))) is not None:
                return number
        return None

    def shared(self, prompt: _Tokens) -> int:
        """How many tokens of the prompt are known."""
        number = self.find(prompt)
        return 0 if number is None else self.lengths[number]


def align(states: Any, starts: Sequence[int], lengths: Sequence[int], into: Any) -> None:
    """Copy `lengths` columns of each row of `states`, from its start, to the right end of the row of `into`.

    states, into: (rows, heads, columns, size). The left of each row becomes zero: masked values are still
    multiplied, and NaN times zero is NaN.
    """
    row, width = 0, into.shape[2]
    for (start, length), same in groupby(zip(starts, lengths, strict=True)):
        rows = slice(row, row := row + len(list(same)))
        into[rows, :, : width - length] = 0
        into[rows, :, width - length :] = states[rows, :, start : start + length]


def shared_beginnings(prompts: Sequence[_Tokens], known: Sequence[int]) -> list[list[int]]:
    """The beginnings, each shared by two prompts or more, that save most tokens when they are computed once.

    Prompts are grouped by their first k tokens beyond the known ones, for the k that saves most; a group shares the
    longest beginning that its prompts have in common.

    known: tokens of each prompt that are computed already.
    """
    best: list[list[int]] = []
    most = 0
    for k in _BEGINNINGS:
        groups: dict[tuple[int, ...], list[tuple[_Tokens, int]]] = defaultdict(list)
        for prompt, free in zip(prompts, known, strict=True):
            if len(prompt) > free + k:
                groups[tuple(prompt[: free + k])].append((prompt[:-1], free))
        shared = []  # (tokens saved, beginning)
        for group in groups.values():
            if len(group) > 1:
                prefix = common_prefix([prompt for prompt, _ in group])
                shared.append(((len(group) - 1) * (len(prefix) - group[0][1]), prefix))
        if not shared:
            break
        kept: list[tuple[int, list[int]]] = []
        for saves, prefix in sorted(shared, key=lambda entry: -entry[0]):
            if len(prefix) * (len(kept) + 1) <= _MOST_SHARED:  # padded to the longest, roughly
                kept.append((saves, prefix))
        saved = sum(saves for saves, _ in kept)
        if saved > most:
            best, most = [prefix for _, prefix in kept], saved
    return best


def common_prefix(lists: Sequence[_Tokens]) -> list[int]:
    """The longest common prefix: that of the first and the last list in sorted order."""
    low, high = min(lists), max(lists)
    return low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def prefill(
    model: Any, prompts: Sequence[_Tokens], prefixes: Prefixes | None, pad_id: int, keep: bool = True
) -> tuple[Any, Any, list[int]]:
    """One forward pass over prompts, their known prefixes taken from the cache.

    Padded on the right: the last token can't see what comes after it, and the distance between prefix and rest, which
    a sliding window counts, stays true.

    Args:
        keep: whether the cache is wanted; without it and without prefixes none is made.
    Returns:
        (logits (rows, vocabulary) of each last token, the cache or None, the column of the cache where each row begins)
    """
    import torch
    from transformers import DynamicCache

    device = model.device
    numbers = [prefixes.find(prompt) if prefixes else None for prompt in prompts]
    lengths = [prefixes.lengths[number] if prefixes and number is not None else 0 for number in numbers]
    # A prefix cache that is wider than these rows need loses its columns on the left.
    width = max(lengths, default=0)
    rests = [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)]
    longest = max(map(len, rests))
    ids = torch.tensor([[*rest, *[pad_id] * (longest - len(rest))] for rest in rests], device=device)
    last = torch.tensor([len(rest) - 1 for rest in rests])
    arguments: dict[str, Any] = {}
    past = None
    if prefixes and width:
        rows = torch.tensor([0 if number is None else number for number in numbers], device=device)
        past = DynamicCache(
            [
                (keys[rows, :, prefixes.width - width :], values[rows, :, prefixes.width - width :])
                for keys, values in prefixes.layers
            ]
        )
        if min(lengths) < width:
            known = torch.tensor(lengths, device=device).unsqueeze(1)
            columns = torch.arange(width + longest, device=device)
            arguments = {"attention_mask": (columns >= width - known).long(), "position_ids": columns[:longest] + known}
    elif keep:
        past = DynamicCache()  # without a configuration all layers keep all tokens, and the mask cuts windows
    if past is not None:
        arguments[_cache_name(model)] = past
    logits = forward(model, ids, last, use_cache=past is not None, **arguments).logits[:, 0]
    return logits, past, [width - length for length in lengths]


def _cache_name(model: Any) -> str:
    return cache_parameter(model.__class__) or CACHE_PARAMETERS[0]


@cache
def _layer_class() -> Any:
    """A layer of transformers' Cache whose rows lie in one buffer with room for their longest answers."""
    from transformers.cache_utils import DynamicLayer

    class Rows(DynamicLayer):  # type: ignore[misc]
        """Buffers (rows, heads, columns, size): a head's keys lie together, and reading them is what attention takes
        its time for on a CPU. Transposed keys, for attention.py, lie together by feature."""

        def __init__(self, rows: int, capacity: int, is_transposed: bool):
            super().__init__()
            self.rows, self.capacity, self.length, self.is_transposed = rows, capacity, 0, is_transposed
            self.buffers: list[Any] = []
            self.is_initialized = True

        def put(
            self, first: int, cached: tuple[Any, Any], starts: Sequence[int], lengths: Sequence[int], width: int
        ) -> None:
            """Copy `cached` to the rows from `first`, each row to the right of `width` columns.

            cached: keys and values (rows, heads, columns, size), of which a row's begin at its start.
            """
            self.length = width
            if not self.buffers:
                _, heads, _, size = cached[0].shape
                keys = (size, self.capacity) if self.is_transposed else (self.capacity, size)
                values = (self.capacity, cached[1].shape[3])
                self.buffers = [
                    states.new_empty(self.rows, heads, *shape)
                    for states, shape in zip(cached, (keys, values), strict=True)
                ]
                if self.is_transposed:  # a view of the usual shape
                    self.buffers[0] = self.buffers[0].transpose(2, 3)
            for buffer, states in zip(self.buffers, cached, strict=True):
                align(states, starts, lengths, buffer[first : first + len(lengths), :, :width])

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            start, self.length = self.length, self.length + key_states.shape[-2]
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[: self.rows, :, start : self.length] = states
            keys, values = (buffer[: self.rows, :, : self.length] for buffer in self.buffers)
            return keys, values

        def drop(self, ended: Sequence[bool]) -> list[int]:
            """Remove the rows that have ended. Returns the old position of each row that stays, in the new order."""
            self.rows = ended.count(False)
            positions = list(range(self.rows))
            targets = [position for position in positions if ended[position]]
            sources = [position for position in range(self.rows, len(ended)) if not ended[position]]
            for target, source in zip(targets, sources, strict=True):
                positions[target] = source
            if sources:
                for buffer in self.buffers:
                    buffer[targets, :, : self.length] = buffer[sources, :, : self.length]
            return positions

        def get_seq_length(self) -> int:
            return self.length

    return Rows


def decode(
    model: Any,
    prompts: Sequence[_Tokens],
    prefixes: Prefixes,
    sampler: RowSampler,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    chunk_tokens: int = 8192,
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its new tokens up to and with its end) as rows end; call it in `torch.inference_mode`.

    Args:
        sampler: draws for each prompt, in their order.
        chunk_tokens: prompts are read so many tokens at a time, padding included.
        stopped: whether text in the new tokens ends a row, for each row; called after every token.
    """
    import torch
    from transformers.cache_utils import Cache

    device, lengths = model.device, [len(prompt) for prompt in prompts]
    width, prompt_lengths = max(lengths), torch.tensor(lengths, device=device)
    logits, layers = _read_prompts(model, prompts, prefixes, pad_id, chunk_tokens, width + max_new_tokens - 1)
    cached = {_cache_name(model): Cache(layers=layers)}
    ends = torch.tensor(sorted(stop_ids), device=device)
    new = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    rows = list(range(len(prompts)))  # the prompt at each position of the cache
    order = torch.tensor(rows, device=device)
    over = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # by position
    check_every = 1 if device.type == "cpu" else 8  # to read `over` is to wait for the device
    for step in range(max_new_tokens):
        picked = sampler.pick(logits, step, order)
        new[order, step] = picked
        over |= torch.isin(picked, ends)
        if stopped:
            over |= torch.tensor(stopped(new[order, : step + 1].tolist()), device=device)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % check_every == 0:
            ended = over.tolist()
            if all(ended):
                break
            # A sixteenth: to remove rows costs about as much as so many rows cost in a step.
            if sum(ended) >= max(1, len(ended) // 16):
                for row in (row for row, is_over in zip(rows, ended, strict=True) if is_over):
                    yield row, _until(new[row, : step + 1].tolist(), stop_ids)
                for layer in layers:
                    positions = layer.drop(ended)
                rows = [rows[position] for position in positions]
                picked, over, order = picked[positions], over.new_zeros(len(rows)), torch.tensor(rows, device=device)
        known = prompt_lengths[order].unsqueeze(1)
        unpadded = all(lengths[row] == width for row in rows)
        mask = None if unpadded else (torch.arange(width + step + 1, device=device) >= width - known).long()
        logits = model(
            input_ids=picked.unsqueeze(1), position_ids=known + step, use_cache=True, attention_mask=mask, **cached
        ).logits[:, -1]
    for row in rows:
        yield row, _until(new[row, : step + 1].tolist(), stop_ids)


def generate_tokens(
    model: Any,
    prompts: Sequence[_Tokens],
    sampler: RowSampler,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    prefixes: Prefixes | None = None,
    chunk_tokens: int = 8192,
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """`decode` where it can run the model, else the same by transformers' `generate`, whose rows all end together.

    Args:
        prefixes: beginnings that are computed already; None shares nothing among these prompts.
    """
    import torch
    from transformers import GenerationConfig

    if slow_reason(model) is None:
        yield from decode(
            model,
            prompts,
            prefixes or Prefixes(model, prompts, pad_id, share=False),
            sampler,
            max_new_tokens=sampler.sampling.max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            chunk_tokens=chunk_tokens,
            stopped=stopped,
        )
        return
    width = sampler.width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]  # on the left: all answers begin in one column
    ids = [[*[pad_id] * gap, *prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[int(column >= gap) for column in range(width)] for gap in gaps]
    saved = model.generation_config
    # Our own configuration: a checkpoint's sampling settings would act in addition to ours.
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=sorted(stop_ids) or None,
        max_new_tokens=sampler.sampling.max_new_tokens,
    )
    try:
        rows = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=[sampler],
            stopping_criteria=[
                lambda ids, _scores, **_: torch.tensor(stopped(ids[:, width:].tolist()), device=ids.device)
            ]
            if stopped
            else None,
        )
    finally:
        model.generation_config = saved
    for row, tokens in enumerate(rows[:, width:].tolist()):
        yield row, _until(tokens, stop_ids)


def _read_prompts(
    model: Any, prompts: Sequence[_Tokens], prefixes: Prefixes, pad_id: int, chunk_tokens: int, capacity: int
) -> tuple[Any, list[Any]]:
    """(logits (rows, vocabulary) of each prompt's last token, layers of a cache with so many columns)."""
    import torch

    lengths = [len(prompt) for prompt in prompts]
    is_transposed = attention.is_used(model) and attention.is_16_bit(model.dtype)
    layers: list[Any] = []
    logits = []
    for part in chunks(lengths, chunk_tokens):
        part_logits, past, starts = prefill(model, [prompts[i] for i in part], prefixes, pad_id)
        layers = layers or [_layer_class()(len(prompts), capacity, is_transposed) for _ in past.layers]
        # Moved to the right: answers then begin in one column, and every row's columns are neighbours.
        for layer, read in zip(layers, past.layers, strict=True):
            layer.put(part.start, (read.keys, read.values), starts, lengths[part.start : part.stop], max(lengths))
        logits.append(part_logits)
        del past
    return torch.cat(logits), layers


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first end."""
    return tokens[: next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))]


def chunks(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Neighbouring rows of at most `tokens` together, padding included; one row at least."""
    start, widest = 0, 0
    for row, length in enumerate(lengths):
        widest = max(widest, length)
        if row > start and (row + 1 - start) * widest > tokens:
            yield range(start, row)
            start, widest = row, length
    if start < len(lengths):
        yield range(start, len(lengths))
