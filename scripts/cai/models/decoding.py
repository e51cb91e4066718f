"""Sampling on a model's forward pass: prompts in, new tokens out, each row on its own.

    prefixes = Prefixes(model, prompts, pad_id)
    for row, tokens in decode(model, prompts, prefixes, sampler, max_new_tokens=64, stop_ids={2}, pad_id=0): ...

What transformers' `generate` does not do: what groups of prompts begin with is computed once; only the last
position's logits are made; keys and values lie in one buffer that nothing is copied to grow; rows that have
ended leave the batch. The tokens are those of the plain loop (in float32; in bfloat16 batches round).

For attention over tokens, full or by sliding window (`slow_reason`); recurrent states, shared layers and the
like are left to `generate`. Leaves out beams, speculation, and rows that join a batch already under way: with
fixed batches a resumed run makes the same ones. torch and transformers are imported inside functions.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import groupby

import numpy as np

from cai.base.errors import CaiError
from cai.models.engine import Sampling

# Shortest beginnings that are looked for in common, and how many tokens of them are computed ahead at most.
_BEGINNINGS = (8, 16, 32, 64, 128, 256, 512)

_MOST_SHARED = 16384


class RowSampler:
    """The draws of a batch: one uniform number a row and step, from the row's seed alone.

    Args:
        seeds: one a row.
        width: columns of the prompt, where it is used as a logits processor of `generate`.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], width: int = 0):
        import torch

        self.sampling, self.width, self.failed = sampling, width, None
        self.draws = None
        if sampling.temperature > 0:
            draws = [np.random.Generator(np.random.Philox(key=s)).random(sampling.max_new_tokens) for s in seeds]
            self.draws = torch.tensor(np.array(draws), dtype=torch.float32)

    def pick(self, logits, step: int, rows=None):
        """Token ids (rows,) drawn from logits (rows, vocabulary) at a step from 0.

        rows: numbers of the rows that the logits are of, a tensor; None for all in order.
        """
        if self.draws is None:
            most, picked = logits.max(-1)  # which is NaN where any of them is
            self._note(most)
            return picked
        self._note(logits)
        if self.draws.device != logits.device:
            self.draws = self.draws.to(logits.device)
        uniform = self.draws[:, step] if rows is None else self.draws[rows, step]
        return draw(logits, uniform.unsqueeze(1), self.sampling.temperature, self.sampling.top_p)[:, 0]

    def _note(self, numbers) -> None:
        """Remember whether any was not a number; looked at later, because to look is to wait for the device."""
        failed = numbers.isnan().any()
        self.failed = failed if self.failed is None else self.failed | failed

    def __call__(self, input_ids, logits):
        """As a logits processor: logits (rows, vocabulary) to all -inf but the token drawn."""
        import torch

        picked = self.pick(logits, input_ids.shape[1] - self.width).unsqueeze(1)
        return torch.full_like(logits, -torch.inf).scatter_(1, picked, 0.0)

    def check(self, name: str) -> None:
        """Raise CaiError if any logit was not a number."""
        if bool(self.failed):
            raise not_a_number(name)


def draw(logits, uniform, temperature: float, top_p: float):
    """Token ids (rows, 1) where each row's cumulative probability passes its number in `uniform` (rows, 1).

    In order of token id, not of probability: rounding then can't change which token a number stands for.
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
    # Clamped for rows that are no numbers: they are reported later, and must not crash a GPU before.
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)


def not_a_number(name: str) -> CaiError:
    """The error of logits that are NaN."""
    return CaiError(f"{name}: the model's logits are not numbers (NaN). Try --dtype float32 or bfloat16")


# What transformers calls the cache among the arguments of `forward`, the newest name first (5.24 renamed it).
CACHE_PARAMETERS = ("cache", "past_key_values")


@cache
def cache_parameter(model_class: type) -> str | None:
    """The name of the cache among the arguments of a model class's `forward`; None if it takes no known one."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in CACHE_PARAMETERS if name in parameters), None)


def slow_reason(model) -> str | None:
    """Why `decode` can't run this model; None where a cache of keys and values is all that the model remembers.

    model: only its class and configuration are read, so one on the meta device will do.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    missing = {"position_ids", "attention_mask"} - set(inspect.signature(type(model).forward).parameters)
    if cache_parameter(type(model)) is None:
        missing.add(" or ".join(CACHE_PARAMETERS))
    if config.is_encoder_decoder:
        return "it has an encoder"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share keys and values"
    if missing:
        return f"{type(model).__name__}.forward takes no {', no '.join(sorted(missing))}"
    return None


def slow_warning(name: str, reason: str) -> str:
    """The warning of a model that `decode` can't run."""
    return (
        f"{name}: the fast decoding loop is off, because {reason}. Text comes from transformers' generate and "
        "nothing is shared among prompts, which takes several times as long"
    )


def forward(model, ids, last, **kwargs):
    """A forward pass whose logits are of column `last` (rows,) of each row alone: (rows, 1, vocabulary)."""
    rows = range(len(last))
    # In front of the head, so that a large vocabulary's logits are never made for the other positions,
    # and whatever the model does after the head (capping, scaling) is still done.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0][rows, last.to(args[0].device)].unsqueeze(1),)
    )
    try:
        return model(input_ids=ids, **kwargs)
    finally:
        hook.remove()


class Prefixes:
    """What groups of prompts begin with: its keys and values, computed once.

    Args:
        prompts: token ids. A prefix leaves at least one token of each of its prompts.
        share: False for a model whose cache can't be shared.
        within: shorter ones of the same prompts, which these continue; what no two prompts continue alike stays.
    Attributes:
        width: columns of the cache, the longest prefix; 0 where nothing is shared.
        lengths: tokens of each prefix. They are padded on the left.
    """

    def __init__(
        self, model, prompts: Sequence[Sequence[int]], pad_id: int, share: bool = True, within: "Prefixes | None" = None
    ):
        known = [within.of(prompt) for prompt in prompts] if within else [None] * len(prompts)
        kept = sorted({number for number in known if number is not None})
        new = shared_beginnings(prompts, [0 if n is None else within.lengths[n] for n in known]) if share else []
        self.found = new + [within.found[number] for number in kept]
        self.lengths = [len(prefix) for prefix in self.found]
        self.width = max(self.lengths, default=0)
        self._by_start: dict[int, dict[tuple, int]] = defaultdict(dict)
        for number, prefix in enumerate(self.found):
            self._by_start[len(prefix)][tuple(prefix)] = number
        if self.found:
            self.layers = self._compute(model, new, pad_id, within, kept)

    def _compute(self, model, new: list, pad_id: int, within: "Prefixes | None", kept: list[int]) -> list[tuple]:
        """Each layer's keys and values, (prefixes, heads, columns, size): of the new, then what is kept of `within`."""
        import torch

        parts = []  # (layers, start and length of each row in them)
        if new:
            with torch.inference_mode():
                _, past, starts = prefill(model, new, within, pad_id)
            parts.append(([(layer.keys, layer.values) for layer in past.layers], starts, self.lengths[: len(new)]))
        if kept:
            lengths = self.lengths[len(new) :]
            parts.append(
                (
                    [(keys[kept], values[kept]) for keys, values in within.layers],
                    [within.width - length for length in lengths],
                    lengths,
                )
            )

        def joined(layer, which):
            first = parts[0][0][layer][which]
            into = first.new_empty(len(self.found), first.shape[1], self.width, first.shape[3])
            at = 0
            for layers, starts, lengths in parts:
                align(layers[layer][which], starts, lengths, into[at : at + len(lengths)])
                at += len(lengths)
            return into

        return [(joined(layer, 0), joined(layer, 1)) for layer in range(len(parts[0][0]))]

    def of(self, prompt: Sequence[int]) -> int | None:
        """The number of the longest prefix that the prompt begins with."""
        for length in sorted(self._by_start, reverse=True):
            if len(prompt) > length and (number := self._by_start[length].get(tuple(prompt[:length]))) is not None:
                return number
        return None

    def shared(self, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt are known."""
        number = self.of(prompt)
        return 0 if number is None else self.lengths[number]


def align(states, starts: Sequence[int], lengths: Sequence[int], into) -> None:
    """Copy from each row of `states`, from its start so many columns, to the right end of the row of `into`.

    states, into: (rows, heads, columns, size). On the left of a row are zeros then: what is masked is still
    multiplied, and NaN by nought is NaN.
    """
    row, width = 0, into.shape[2]
    for (start, length), same in groupby(zip(starts, lengths, strict=True)):
        rows = slice(row, row := row + len(list(same)))
        into[rows, :, : width - length] = 0
        into[rows, :, width - length :] = states[rows, :, start : start + length]


def shared_beginnings(prompts: Sequence[Sequence[int]], known: Sequence[int]) -> list[list[int]]:
    """Beginnings, each common to two prompts or more, that save most tokens when they are computed once.

    Prompts are put together by their first k tokens beyond those that are known, for the k that saves most; a
    group shares all that its prompts begin with.

    known: tokens of each prompt that cost nothing any more.
    """
    best, most = [], 0
    for k in _BEGINNINGS:
        groups: dict[tuple, list] = defaultdict(list)
        for prompt, free in zip(prompts, known, strict=True):
            if len(prompt) > free + k:
                groups[tuple(prompt[: free + k])].append((prompt[:-1], free))
        shared = []
        for group in groups.values():
            if len(group) > 1:
                prefix = common_prefix([prompt for prompt, _ in group])
                shared.append(((len(group) - 1) * (len(prefix) - group[0][1]), prefix))
        if not shared:
            break
        shared.sort(key=lambda found: -found[0])
        kept, room = [], _MOST_SHARED
        for saves, prefix in shared:
            if len(prefix) * (len(kept) + 1) <= room:  # padded to the longest, roughly
                kept.append((saves, prefix))
        saved = sum(saves for saves, _ in kept)
        if saved > most:
            best, most = [prefix for _, prefix in kept], saved
    return best


def common_prefix(lists: Sequence[Sequence[int]]) -> list[int]:
    """What all the lists begin with: what the first and the last of them in sorted order do."""
    low, high = min(lists), max(lists)
    return low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def prefill(model, prompts: Sequence[Sequence[int]], prefixes: Prefixes | None, pad_id: int, keep: bool = True):
    """One forward pass over prompts, their known prefixes taken from the cache.

    Padded on the right: what comes after the last token can't be seen from it, and the distance between
    prefix and rest, which a sliding window counts, stays true.

    Returns (logits (rows, vocabulary) of each last token, the cache or None, starts: the column of the cache
    where each row begins).
    Args:
        keep: whether the cache is wanted; without it and without prefixes none is made.
    """
    import torch
    from transformers import DynamicCache

    device = model.device
    numbers = [prefixes.of(prompt) for prompt in prompts] if prefixes else [None] * len(prompts)
    used = [number for number in numbers if number is not None]
    lengths = [0 if number is None else prefixes.lengths[number] for number in numbers]
    # Of a prefix cache that is wider than these rows need, the columns on the left are left out.
    width = max(lengths, default=0)
    rests = [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)]
    most = max(map(len, rests))
    ids = torch.tensor([[*rest, *[pad_id] * (most - len(rest))] for rest in rests], device=device)
    last = torch.tensor([len(rest) - 1 for rest in rests])
    kept = {}
    past = None
    if used:
        rows = torch.tensor([0 if number is None else number for number in numbers], device=device)
        past = DynamicCache(
            [
                (keys[rows, :, prefixes.width - width :], values[rows, :, prefixes.width - width :])
                for keys, values in prefixes.layers
            ]
        )
        if min(lengths) < width:
            known = torch.tensor(lengths, device=device).unsqueeze(1)
            columns = torch.arange(width + most, device=device)
            kept = {"attention_mask": (columns >= width - known).long(), "position_ids": columns[:most] + known}
    elif keep:
        past = DynamicCache()  # without a configuration all layers keep all tokens, and windows are cut by the mask
    if past is not None:
        kept[cache_parameter(type(model))] = past
    logits = forward(model, ids, last, use_cache=past is not None, **kept).logits[:, 0]
    return logits, past, [width - length for length in lengths]


@cache
def _layer_class():
    """A layer of transformers' Cache whose rows lie in one buffer, made for their longest answers."""
    from transformers.cache_utils import DynamicLayer

    class Rows(DynamicLayer):
        """Buffers (rows, heads, columns, size), so that a head's keys are read in one sweep; on a CPU that is what
        attention takes its time for."""

        def __init__(self, rows: int, capacity: int):
            super().__init__()
            self.rows, self.capacity, self.length = rows, capacity, 0
            self.buffers = None
            self.is_initialized = True

        def put(self, at: int, cached: tuple, starts: Sequence[int], lengths: Sequence[int], width: int) -> None:
            """To rows from `at`, from the right of `width` columns, what `cached` has of each row.

            cached: keys and values (rows, heads, columns, size). Of these a row's begin at its start.
            """
            self.length = width
            if self.buffers is None:
                self.buffers = [
                    states.new_empty(self.rows, states.shape[1], self.capacity, states.shape[3]) for states in cached
                ]
            for buffer, states in zip(self.buffers, cached, strict=True):
                align(states, starts, lengths, buffer[at : at + len(lengths), :, :width])

        def update(self, key_states, value_states, *args, **kwargs):
            start, self.length = self.length, self.length + key_states.shape[-2]
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[: self.rows, :, start : self.length] = states
            keys, values = (buffer[: self.rows, :, : self.length] for buffer in self.buffers)
            return keys, values

        def move(self, sources, targets, rows: int) -> None:
            """Rows `sources` to the places `targets`; then only the first `rows` are left."""
            if len(sources):
                for buffer in self.buffers:
                    buffer[targets, :, : self.length] = buffer[sources, :, : self.length]
            self.rows = rows

        def get_seq_length(self) -> int:
            return self.length

    return Rows


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    prefixes: Prefixes,
    sampler: RowSampler,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    chunk_tokens: int = 8192,
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its new tokens up to and with its end) as rows end, not in order.

    To be called under `torch.inference_mode` or `no_grad`, step by step.

    Args:
        sampler: draws for each prompt, in their order.
        chunk_tokens: prompts are read so many tokens at a time, padding counted.
        stopped: says of rows' new tokens whether text in them ends the row; asked after every token.
    """
    import torch
    from transformers.cache_utils import Cache

    device, lengths = model.device, [len(prompt) for prompt in prompts]
    width, total = max(lengths), torch.tensor(lengths, device=device)
    layers, logits = None, []
    for part in chunks(lengths, chunk_tokens):
        some, past, starts = prefill(model, [prompts[i] for i in part], prefixes, pad_id)
        if layers is None:
            layers = [_layer_class()(len(prompts), width + max_new_tokens - 1) for _ in past.layers]
        # Moved to the right, so that answers begin in one column and every row's columns are neighbours.
        for layer, one in zip(layers, past.layers, strict=True):
            layer.put(part.start, (one.keys, one.values), starts, lengths[part.start : part.stop], width)
        logits.append(some)
        del past
    logits, past = torch.cat(logits), Cache(layers=layers)
    ends = torch.tensor(sorted(stop_ids), device=device)
    new = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    order = torch.arange(len(prompts), device=device)  # which row lies in each place of the cache
    live = list(range(len(prompts)))
    over = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # by place
    cache_name = cache_parameter(type(model))
    every = 1 if device.type == "cpu" else 8  # to look is to wait for the device
    for step in range(max_new_tokens):
        picked = sampler.pick(logits, step, order)
        new[order, step] = picked
        over |= torch.isin(picked, ends)
        if stopped:
            over |= torch.tensor(stopped(new[order, : step + 1].tolist()), device=device)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % every == 0:
            ended = over.tolist()
            if all(ended):
                break
            # A sixteenth: looking and moving costs about as much as so many rows cost in a step.
            if sum(ended) >= max(1, len(ended) // 16):
                left = len(ended) - sum(ended)
                for place, done in enumerate(ended):
                    if done:
                        yield live[place], _until(new[live[place], : step + 1].tolist(), stop_ids)
                targets = [place for place in range(left) if ended[place]]
                sources = [place for place in range(left, len(ended)) if not ended[place]]
                for target, source in zip(targets, sources, strict=True):
                    live[target] = live[source]
                del live[left:]
                picked[targets] = picked[sources]
                picked, over = picked[:left], over.new_zeros(left)
                order = torch.tensor(live, device=device)
                for layer in layers:
                    layer.move(sources, targets, left)
        known = total[order].unsqueeze(1)
        columns = torch.arange(width + step + 1, device=device)
        same = len({lengths[row] for row in live}) == 1 and lengths[live[0]] == width
        logits = model(
            input_ids=picked.unsqueeze(1),
            position_ids=known + step,
            use_cache=True,
            attention_mask=None if same else (columns >= width - known).long(),
            **{cache_name: past},
        ).logits[:, -1]
    for row in live:
        yield row, _until(new[row, : step + 1].tolist(), stop_ids)


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first end."""
    return tokens[: next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))]


def chunks(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Neighbouring rows of at most `tokens` together, padding counted; one row at least."""
    start, widest = 0, 0
    for at, length in enumerate(lengths):
        widest = max(widest, length)
        if at > start and (at + 1 - start) * widest > tokens:
            yield range(start, at)
            start, widest = at, length
    if start < len(lengths):
        yield range(start, len(lengths))
