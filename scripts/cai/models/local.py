"""A causal language model on this machine: it generates text and scores forced choices.

    request = Request("a", [{"role": "user", "content": "Hello"}], seed=1)
    for request, generation in engine.generate([request], Sampling()): ...

`generate` samples text, `score` reads the log-probabilities of a forced choice (engine.py describes both).

A batch holds as many tokens (`--batch-tokens`) as memory allows, and is halved if it does not fit after all. The
decoding loop is in decoding.py. Leaves out models split over several GPUs, beam search, images and tools.
"""

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.models import decoding
from cai.models.chat import Chat, chat_stops
from cai.models.decoding import Prefixes, RowSampler
from cai.models.engine import Generation, Request, RequestT, Sampling

# Rows that are sorted by length together: so many batches of the largest size, and at most so many rows. More sort
# better, fewer answer sooner and use less memory.
WINDOW = 32

MOST_ROWS = 4096

# Most rows in one forward pass, by default.
BATCH_SIZE = 128

# Most tokens of prompts in one forward pass.
CHUNK_TOKENS = 16384

# The same on a CPU, and numbers in the hidden states of such a pass: more of them exceed the cache. A 135M model read
# its prompts in 6.2 s by 1,024 tokens at once and in 8.0 s by 4,096.
CPU_CHUNK_TOKENS, CPU_CHUNK_NUMBERS = 4096, 1 << 20

# Parameters from which `--dtype auto` takes bfloat16 on a CPU that multiplies it. Random models of 12, 19 and 40
# million wrote text 1.7, 1.9 and 2.4 times as fast as in float32. Smaller ones stay exact to the last byte.
BFLOAT16_FROM = 10_000_000


class _Prompt(NamedTuple):
    """A request as the model reads it. label_ids: of the labels to score, where there are any."""

    request: Any  # the Request, in the caller's own class
    token_ids: list[int]
    label_ids: Sequence[int] = ()


class LocalEngine:
    """A transformers causal LM and its chat. `load_engine` makes one.

    Attributes:
        name, model, tokenizer, chat.
        slow_reason: why the fast decoding loop is off, or None.
        context: tokens the model can hold, or None.
        batch_size: most rows in one forward pass.
        batch_tokens: most tokens in one batch, prompts with padding and new ones together.
    """

    scores_choices = True

    def __init__(
        self, name: str, model: Any, tokenizer: Any, batch_size: int | None = None, batch_tokens: int | None = None
    ):
        from transformers import GenerationConfig

        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.chat = Chat(tokenizer, name)
        self.context = decoding.context_length(model)
        self.slow_reason = decoding.slow_reason(model)
        self._decodes = self.slow_reason is None
        self.stop_ids = sorted(chat_stops(self.chat, model))
        self.pad_id: int = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id >= model.config.get_text_config().vocab_size:
            self.pad_id = self.stop_ids[0] if self.stop_ids else 0
        # A new one: the checkpoint's own sampling settings would act beside ours.
        model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=self.pad_id, eos_token_id=self.stop_ids or None
        )
        self.set_batches(batch_size, batch_tokens)

    def set_batches(self, batch_size: int | None, batch_tokens: int | None) -> None:
        """Bound the batches; None: `BATCH_SIZE` rows, and as many tokens as memory holds."""
        self.batch_size = batch_size or BATCH_SIZE
        self.batch_tokens = batch_tokens or tokens_that_fit(self.model)

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """Each request with its answer, as they are ready, not in order.

        A row's draws depend on its seed alone, so its text does not depend on its batch (in float32; in
        bfloat16 the logits themselves do).

        Args:
            requests: read lazily, a window ahead of the model, and in another thread.
            done: keys of requests that the caller has the answers of. A batch of only such requests is skipped; any
                other is the same as without `done`, so that a resumed run rounds as one that never stopped.
        """
        run = partial(self._generate if self._decodes else self._generate_slowly, sampling=sampling)
        for prompt, answer in self._run(requests, self._read_prompts, run, sampling.max_new_tokens, done):
            yield prompt.request, answer or Generation("", "too_long", len(prompt.token_ids), 0)

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """Each request with the log-probability of every label as its next token, not in order.

        They are of the softmax over the whole vocabulary: what they lack to 1 belongs to other tokens. None
        where a conversation is longer than the model's context. Shared beginnings of conversations are computed
        once, so it pays to call this with conversations that begin alike.

        Raises InputError if the labels are not single, different tokens where the conversation ends.
        """
        read = partial(self._read_questions, labels=labels, label_ids={})
        for prompt, logprobs in self._run(requests, read, self._score, 0):
            yield prompt.request, logprobs

    def _run(
        self,
        requests: Iterable[Request],
        read: Callable[[list[Request]], list[_Prompt]],
        run: Callable[..., Iterator[tuple[_Prompt, Any]]],
        new_tokens: int,
        done: Container[Hashable] = (),
    ) -> Iterator[tuple[_Prompt, Any]]:
        """(prompt, result) of each request, as it comes; the result is None where it does not fit the model's context.

        Args:
            run: a batch and the prefixes of its window to its prompts and results.
            new_tokens: tokens that each row may grow by.
        """
        limit = (self.context or float("inf")) - new_tokens
        for window in self._windows(requests, read, done):
            prompts = [prompt for prompt in window if len(prompt.token_ids) <= limit]
            yield from ((prompt, None) for prompt in window if len(prompt.token_ids) > limit)
            token_ids = [prompt.token_ids for prompt in prompts]
            share = self._decodes and len(prompts) > 1
            prefixes = Prefixes(self.model, token_ids, self.pad_id, share, chunk_tokens=self._prefix_tokens)
            yield from self._run_batches(prompts, partial(run, prefixes=prefixes), new_tokens, done)

    def _windows(
        self,
        requests: Iterable[Request],
        read: Callable[[list[Request]], list[_Prompt]],
        done: Container[Hashable] = (),
    ) -> Iterator[list[_Prompt]]:
        """`read` of the requests that are sorted together, the next ones while the model works on these.

        A window whose keys are all in `done` is skipped.
        """
        size = min(WINDOW * self.batch_size, MOST_ROWS)
        requests = iter(requests)

        def read_window() -> list[_Prompt] | None:
            while window := list(islice(requests, size)):
                if not all(request.key in done for request in window):
                    return read(window)
            return None

        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(read_window)
            while (prompts := following.result()) is not None:
                following = thread.submit(read_window)
                yield prompts

    def _read_prompts(self, requests: list[Request]) -> list[_Prompt]:
        token_ids = self.chat.encode_all([self.chat.render(request.conversation) for request in requests])
        return list(map(_Prompt, requests, token_ids))

    def _run_batches(
        self,
        prompts: list[_Prompt],
        run: Callable[[list[_Prompt]], Iterator[tuple[_Prompt, Any]]],
        new_tokens: int,
        done: Container[Hashable] = (),
    ) -> Iterator[tuple[_Prompt, Any]]:
        """The results of `run` for batches of similar length, longest first; nothing for keys in `done`.

        Where memory runs out the batch is halved, and its rows without a result are run again.
        """
        import torch

        waiting = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
        while waiting:
            longest = len(waiting[0].token_ids) + new_tokens
            count = max(1, min(self.batch_size, self.batch_tokens // longest))
            batch, waiting = waiting[:count], waiting[count:]
            if all(prompt.request.key in done for prompt in batch):
                continue
            answered = set()
            results, is_full = run(batch), False
            while True:
                try:
                    with torch.inference_mode():  # not around the yield, which would switch the caller's mode
                        prompt, result = next(results)
                except StopIteration:
                    break
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        tokens = len(batch[0].token_ids)
                        raise CaiError(f"one row of {tokens} tokens does not fit the GPU's memory") from error
                    is_full = True
                    break
                answered.add(prompt.request.key)
                if prompt.request.key not in done:
                    yield prompt, result
            if is_full:  # outside the handler, where the failed batch's tensors are freed
                del results
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.batch_tokens = max(1, len(batch) // 2) * longest
                cli.warn(f"the memory is full: continuing with --batch-tokens {self.batch_tokens}")
                waiting = [prompt for prompt in batch if prompt.request.key not in answered] + waiting

    def _generate(
        self, batch: list[_Prompt], sampling: Sampling, prefixes: Prefixes
    ) -> Iterator[tuple[_Prompt, Generation]]:
        """The answers of one batch, row by row as they end."""
        sampler = RowSampler(sampling, [prompt.request.seed for prompt in batch])
        stops = self.chat.stops(sampling.stop)
        rows = decoding.decode(
            self.model,
            [prompt.token_ids for prompt in batch],
            prefixes,
            sampler,
            pad_id=self.pad_id,
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=set(self.stop_ids),
            chunk_tokens=self._chunk_tokens,
            stopped=_StopStrings(self.tokenizer, stops).have_stopped if stops else None,
        )
        for row, tokens in rows:
            sampler.check(self.name)
            yield batch[row], self._read_answer(batch[row], tokens, sampling)

    def _generate_slowly(
        self, batch: list[_Prompt], sampling: Sampling, prefixes: Prefixes
    ) -> Iterator[tuple[_Prompt, Generation]]:
        """`_generate` by transformers' own loop, for models that `decoding.decode` can't run."""
        import torch

        width = len(batch[0].token_ids)
        ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):  # left padding: all answers begin in one column
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        sampler = RowSampler(sampling, [prompt.request.seed for prompt in batch], width)
        stops = self.chat.stops(sampling.stop)
        new = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=[sampler],
            stopping_criteria=[_StopStrings(self.tokenizer, stops, width)] if stops else None,
        )[:, width:].tolist()
        sampler.check(self.name)
        for prompt, tokens in zip(batch, new, strict=True):
            length = next((n + 1 for n, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
            yield prompt, self._read_answer(prompt, tokens[:length], sampling)

    def _read_answer(self, prompt: _Prompt, tokens: list[int], sampling: Sampling) -> Generation:
        """The answer from the new tokens, the end token included."""
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        continued = prompt.request.conversation[-1]["role"] == "assistant"
        text, stopped = self.chat.answer(tokens[:-1] if ended else tokens, continued=continued, stop=sampling.stop)
        finish = "stop" if ended or stopped else "length"
        return Generation(text, finish, len(prompt.token_ids), len(tokens))

    @property
    def _chunk_tokens(self) -> int:
        hidden = getattr(self.model.config.get_text_config(), "hidden_size", 1)
        return chunk_tokens(hidden, self.model.device.type == "cpu")

    @property
    def _prefix_tokens(self) -> int | None:
        """Tokens of shared beginnings in one forward pass; None: all at once.

        For a narrow model on a CPU passes of similar length gain nothing (`tiny`: 5.9 s against 5.6 s for 200 pairs),
        and its values stay the same to the last byte.
        """
        is_narrow = self.model.device.type == "cpu" and self._chunk_tokens == CPU_CHUNK_TOKENS
        return None if is_narrow else self._chunk_tokens

    def _read_questions(
        self, requests: list[Request], labels: Sequence[str], label_ids: dict[str, list[int]]
    ) -> list[_Prompt]:
        """The tokens before each choice, and the labels' ids there.

        A label is encoded together with the text before it, as in training: "(" and "A" may be one token, and then
        that token is scored.

        Args:
            label_ids: {prefill: ids of the labels after it}, filled here.
        """
        texts = [self.chat.render(request.conversation) for request in requests]
        prompts = []
        encoded = self.chat.encode_all([text + labels[0] for text in texts])
        for request, text, ids in zip(requests, texts, encoded, strict=True):
            prefill = request.prefill
            if prefill not in label_ids:
                label_ids[prefill] = self._label_ids(text, prefill, labels)
            if ids[-1] != label_ids[prefill][0]:
                raise InputError(f"{labels[0]!r} is not one token after {text[-20:]!r}", where=self.name)
            prompts.append(_Prompt(request, ids[:-1], label_ids[prefill]))
        return prompts

    def _label_ids(self, text: str, prefill: str, labels: Sequence[str]) -> list[int]:
        """The token of each label after `text`; InputError if they are not single and different."""
        encoded = [self.chat.encode(text + label) for label in labels]
        before = decoding.common_prefix([ids[:-1] for ids in encoded])
        label_ids = [ids[-1] for ids in encoded]
        if len(set(label_ids)) < len(labels) or any(len(ids) != len(before) + 1 for ids in encoded):
            pieces = {
                label: self.tokenizer.convert_ids_to_tokens(ids[len(before) :][:4])
                for label, ids in zip(labels, encoded, strict=True)
            }
            raise InputError(
                f"the labels are not single, different tokens after {prefill[-20:]!r}: {pieces}",
                where=self.name,
                remedy="End the prefill so that they are, or use other labels",
            )
        return label_ids

    def _score(self, batch: list[_Prompt], prefixes: Prefixes) -> Iterator[tuple[_Prompt, list[float]]]:
        """The labels' log-probabilities in one batch."""
        if self._decodes and len(batch) > 1:  # a pair in both orders has the prompt in common too
            token_ids, chunk = [prompt.token_ids for prompt in batch], self._prefix_tokens
            prefixes = Prefixes(self.model, token_ids, self.pad_id, within=prefixes, chunk_tokens=chunk)
        if self._prefix_tokens:  # by what is left to read, which padding fills up to the longest of a pass
            batch = sorted(batch, key=lambda prompt: prefixes.shared(prompt.token_ids) - len(prompt.token_ids))
        new_tokens = [len(prompt.token_ids) - prefixes.shared(prompt.token_ids) for prompt in batch]
        # Half as many tokens as where text is written: here the known ones are not counted.
        for part in decoding.chunks(new_tokens, self._chunk_tokens // 2):
            prompts = batch[part.start : part.stop]
            token_ids = [prompt.token_ids for prompt in prompts]
            logits = decoding.prefill(self.model, token_ids, prefixes, self.pad_id, keep=False)[0]
            logprobs = logits.float().log_softmax(-1).cpu()
            if logprobs.isnan().any():
                raise decoding.not_a_number(self.name)
            for prompt, row in zip(prompts, logprobs, strict=True):
                yield prompt, row[prompt.label_ids].tolist()


class _StopStrings:
    """Whether a stop string is in a row's newest tokens; also a stopping criterion of `generate`."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int = 0):
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = 4 * max(map(len, stops)) + 1  # a character is at most four tokens

    def have_stopped(self, rows: list[list[int]]) -> list[bool]:
        """For each row's new tokens."""
        tails = [tokens[-self.tail :] for tokens in rows]
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        return [any(stop in text for stop in self.stops) for text in texts]

    def __call__(self, input_ids: Any, scores: Any, **_kwargs: Any) -> Any:
        import torch

        return torch.tensor(self.have_stopped(input_ids[:, self.width :].tolist()), device=input_ids.device)


def tokens_that_fit(model: Any) -> int:
    """Tokens whose keys and values fill half of the free memory, rounded down to a power of two.

    Rounded, so that a resumed run keeps its batches although free memory differs a little. The other half is for the
    rest of a forward pass. On a CPU at most 32,768: a larger batch takes memory from the machine's other programs and
    is no faster.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    tokens: int = max(1, free_memory(model.device) // 2 // token_bytes)
    if model.device.type == "cpu":
        tokens = min(tokens, 32768)
    return 1 << (tokens.bit_length() - 1)


def chunk_tokens(hidden: int, on_cpu: bool) -> int:
    """Most tokens of prompts in one forward pass of a model whose hidden states have so many numbers per token."""
    if not on_cpu:
        return CHUNK_TOKENS
    fitting = 1 << (max(1, CPU_CHUNK_NUMBERS // hidden).bit_length() - 1)
    return min(CPU_CHUNK_TOKENS, max(256, fitting))


def auto_dtype(device: str, parameters: int | None) -> str:
    """The dtype that `--dtype auto` is for weights that are not trained.

    bfloat16 on CUDA, and on a CPU that multiplies it for models that are large enough (`BFLOAT16_FROM`); float32
    elsewhere, and where the number of parameters is not known.
    """
    is_large = device == "cpu" and (parameters or 0) >= BFLOAT16_FROM and cpu_multiplies_bfloat16()
    return "bfloat16" if device.startswith("cuda") or is_large else "float32"


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 (AVX512-BF16 or AMX); elsewhere it is emulated and slow."""
    import torch

    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def free_memory(device: Any) -> int:
    """Bytes of free memory on a device."""
    import psutil
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


def fast_path(engine: Any) -> dict[str, Any]:
    """The manifest's fields of a local engine: {"fast_path": True, or "no: " and the reason, "weights_dtype": the one
    that the weights had}; of one that the command has started: {"engine": its description}. {} for a server that ran
    before."""
    if not isinstance(engine, LocalEngine):
        return dict(engine.manifest_fields) if hasattr(engine, "manifest_fields") else {}
    dtype = str(engine.model.dtype).removeprefix("torch.")
    return {"fast_path": fast_path_field(engine.slow_reason), "weights_dtype": dtype}


def fast_path_field(reason: str | None) -> bool | str:
    """A model's `slow_reason` as manifests and doctor.py report it."""
    return f"no: {reason}" if reason else True
