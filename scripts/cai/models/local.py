"""A causal language model on this machine: it generates text and scores forced choices.

    for index, generation in engine.generate([[{"role": "user", "content": "Hello"}]], Sampling(), seeds=[1]): ...

`generate` samples text, `score` reads the log-probabilities of a forced choice. Both take conversations (lists of
`{"role", "content"}`); one that ends with the assistant is continued (a prefill).

A batch holds as many tokens (`--batch-tokens`) as memory allows, and is halved if it does not fit after all; the
decoding loop is in decoding.py. Leaves out models split over several GPUs, beam search, images and tools.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.models.chat import Chat
from cai.models.decoding import Prefixes, RowSampler, chunks, common_prefix, decode, not_a_number, prefill, slow_reason
from cai.models.engine import Generation, Sampling

# Batches of the most rows that are sorted by length together, and rows of them at most: more sort better,
# fewer answer sooner and use less memory.
WINDOW = 32

MOST_ROWS = 4096

# Most rows in one forward pass where nobody says.
BATCH_SIZE = 128

# Tokens of prompts in one forward pass. On a CPU more of them leave its cache, and are read more slowly.
CHUNK_TOKENS = {"cpu": 4096}

OTHER_CHUNK_TOKENS = 16384


class LocalEngine:
    """A transformers causal LM and its chat. Make one with `load_engine`.

    Attributes:
        name, model, tokenizer, chat.
        slow_reason: why the fast decoding loop is off, or None.
        context: tokens the model can hold, or None.
        batch_size: most rows in one forward pass.
        batch_tokens: most tokens in one batch, prompts with padding and new ones together.
    """

    def __init__(self, name: str, model, tokenizer, batch_size: int | None = None, batch_tokens: int | None = None):
        from transformers import GenerationConfig

        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.chat = Chat(tokenizer, name)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None)
        self.slow_reason = slow_reason(model)
        self._decodes = self.slow_reason is None
        found = model.generation_config.eos_token_id
        ends = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id, self.chat.stop_id]
        self.stop_ids = sorted({int(i) for i in ends if i is not None and i < config.vocab_size})
        pad = tokenizer.pad_token_id
        if pad is None or pad >= config.vocab_size:
            pad = self.stop_ids[0] if self.stop_ids else 0
        self.pad_id = pad
        # A fresh one: a checkpoint's own sampling settings would act beside ours.
        model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=pad, eos_token_id=self.stop_ids or None
        )
        self.set_batches(batch_size, batch_tokens)

    def set_batches(self, batch_size: int | None, batch_tokens: int | None) -> None:
        """Bound the batches; None: `BATCH_SIZE` rows, and as many tokens as memory holds."""
        self.batch_size = batch_size or BATCH_SIZE
        self.batch_tokens = batch_tokens or tokens_that_fit(self.model)

    def generate(
        self,
        conversations: Iterable[Sequence[dict]],
        sampling: Sampling,
        seeds: Iterable[int],
        done: Container[int] = (),
    ) -> Iterator[tuple[int, Generation]]:
        """Answers as they are done, as (index of the conversation, Generation), not in order.

        A row's draws hang on its seed alone, so its text does not depend on its batch (in float32; in
        bfloat16 the logits themselves do).

        Args:
            conversations: read lazily, a window ahead of the model, and in another thread.
            seeds: one a conversation.
            done: indices whose answers the caller has. A batch of nothing else is skipped; any other is as it
                would be without `done`, so that a resumed run rounds as one that never stopped.
        """

        def read(window):
            texts, rows = [], []
            for index, (conversation, seed) in window:
                texts.append(self.chat.render(conversation))
                rows.append((index, seed, conversation[-1]["role"] == "assistant"))
            return [
                (index, ids, seed, continued)
                for (index, seed, continued), ids in zip(rows, self.chat.encode_all(texts), strict=True)
            ]

        for window in self._windows(enumerate(zip(conversations, seeds, strict=True)), read, done):
            rows = []
            for row in window:
                if self.context and len(row[1]) + sampling.max_new_tokens > self.context:
                    yield row[0], Generation("", "too_long", len(row[1]), 0)
                else:
                    rows.append(row)
            prefixes = Prefixes(self.model, [row[1] for row in rows], self.pad_id, self._decodes and len(rows) > 1)
            one = self._generate if self._decodes else self._generate_otherwise
            yield from self._in_batches(
                rows,
                lambda batch, prefixes=prefixes, one=one: one(batch, sampling, prefixes),
                sampling.max_new_tokens,
                done,
            )

    def score(
        self, conversations: Iterable[Sequence[dict]], labels: Sequence[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        """Log-probabilities of each label as the next token, as (index, one a label), not in order.

        They are of the softmax over the whole vocabulary: what they lack to 1 went to other tokens. None
        stands for a conversation longer than the model's context. What conversations of a window begin with
        in common is computed once, so it pays to call this with conversations that begin alike.

        Raises InputError if the labels are not single, different tokens where the conversation ends.
        """
        known: dict[str, list[int]] = {}
        for window in self._windows(enumerate(conversations), lambda w: self._before_label(w, labels, known)):
            rows = []
            for row in window:
                if self.context and len(row[1]) > self.context:
                    yield row[0], None
                else:
                    rows.append(row)
            prefixes = Prefixes(self.model, [row[1] for row in rows], self.pad_id, self._decodes and len(rows) > 1)
            yield from self._in_batches(rows, lambda batch, prefixes=prefixes: self._score(batch, prefixes), 0)

    def _windows(self, numbered: Iterator[tuple], read, done: Container[int] = ()) -> Iterator[list]:
        """`read` of as many rows as are sorted together, the next of them while the model works on these.

        What is all `done` is passed over.
        """
        size = min(WINDOW * self.batch_size, MOST_ROWS)

        def following():
            while window := list(islice(numbered, size)):
                if not all(index in done for index, _ in window):
                    return read(window)
            return None

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(following)
            while (window := coming.result()) is not None:
                coming = thread.submit(following)
                yield window

    def _in_batches(self, rows: list[tuple], one, new: int, done: Container[int] = ()) -> Iterator[tuple]:
        """What `one` makes of batches of like length, longest first, as it is made.

        Where memory runs out the batch is halved, and its rows that are not answered yet are asked again.

        Args:
            rows: (index, token ids, ...).
            one: a batch to its (index, result).
            new: tokens that each row may grow by.
        """
        import torch

        rows = sorted(rows, key=lambda row: -len(row[1]))
        at = 0
        while at < len(rows):
            fits = max(1, min(self.batch_size, self.batch_tokens // (len(rows[at][1]) + new)))
            batch = rows[at : at + fits]
            at += len(batch)
            if all(index in done for index, *_ in batch):
                continue
            answered = set()
            full = False
            results = one(batch)
            while True:
                try:
                    with torch.inference_mode():  # not over the yield: the mode would be the caller's too
                        index, made = next(results)
                except StopIteration:
                    break
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        tokens = len(batch[0][1])
                        raise CaiError(f"one row of {tokens} tokens does not fit the GPU's memory") from error
                    full = True
                    break
                answered.add(index)
                yield index, made
            if full:  # out here the failed batch's tensors are gone
                del results
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                left = [row for row in batch if row[0] not in answered]
                self.batch_tokens = max(1, len(batch) // 2) * (len(batch[0][1]) + new)
                cli.warn(f"the memory is full: going on with --batch-tokens {self.batch_tokens}")
                rows, at = left + rows[at:], 0

    def _generate(self, batch: list[tuple], sampling: Sampling, prefixes: Prefixes) -> Iterator[tuple]:
        """One batch of (index, ids, seed, continued), row by row as they end."""
        sampler = RowSampler(sampling, [seed for _, _, seed, _ in batch])
        stops = self.chat.stops(sampling.stop)
        rows = decode(
            self.model,
            [ids for _, ids, _, _ in batch],
            prefixes,
            sampler,
            pad_id=self.pad_id,
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=set(self.stop_ids),
            chunk_tokens=self._chunk_tokens,
            stopped=_StopStrings(self.tokenizer, stops).found if stops else None,
        )
        for row, tokens in rows:
            sampler.check(self.name)
            yield self._answered(batch[row], tokens, sampling)

    def _generate_otherwise(self, batch: list[tuple], sampling: Sampling, _prefixes) -> Iterator[tuple]:
        """The same by transformers' own loop, for models whose memory is not a cache of rows."""
        import torch

        width = len(batch[0][1])
        ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, (_, prompt, _, _) in enumerate(batch):  # left padding: all answers begin in one column
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampler = RowSampler(sampling, [seed for _, _, seed, _ in batch], width)
        stops = self.chat.stops(sampling.stop)
        new = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=[sampler],
            stopping_criteria=[_StopStrings(self.tokenizer, stops, width)] if stops else None,
        )[:, width:].tolist()
        sampler.check(self.name)
        for row, tokens in zip(batch, new, strict=True):
            length = next((n + 1 for n, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
            yield self._answered(row, tokens[:length], sampling)

    def _answered(self, row: tuple, tokens: list[int], sampling: Sampling) -> tuple[int, Generation]:
        """(index, Generation) of a row (index, ids, seed, continued) and its new tokens, the end included."""
        index, prompt, _, continued = row
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        text, stopped = self.chat.answer(tokens[:-1] if ended else tokens, continued=continued, stop=sampling.stop)
        return index, Generation(text, "stop" if ended or stopped else "length", len(prompt), len(tokens))

    @property
    def _chunk_tokens(self) -> int:
        return CHUNK_TOKENS.get(self.model.device.type, OTHER_CHUNK_TOKENS)

    def _before_label(self, window: list[tuple], labels: Sequence[str], known: dict) -> list[tuple]:
        """(index, tokens before the choice, the labels' ids there) of each (index, conversation).

        The label is encoded together with what precedes it, as the model has seen it in training: "(" and "A"
        may be one token, and then it is that token which is asked for.
        """
        texts, endings = [], []
        for _, conversation in window:
            texts.append(self.chat.render(conversation))
            endings.append(conversation[-1]["content"] if conversation[-1]["role"] == "assistant" else "")
            if endings[-1] not in known:
                known[endings[-1]] = self._label_ids(texts[-1], endings[-1], labels)
        rows = []
        encoded = self.chat.encode_all([text + labels[0] for text in texts])
        for (index, _), text, ending, ids in zip(window, texts, endings, encoded, strict=True):
            if ids[-1] != known[ending][0]:
                raise InputError(f"{labels[0]!r} is not one token after {text[-20:]!r}", where=self.name)
            rows.append((index, ids[:-1], known[ending]))
        return rows

    def _label_ids(self, text: str, ending: str, labels: Sequence[str]) -> list[int]:
        """The token of each label after `text`; InputError if they are not single and different."""
        encoded = [self.chat.encode(text + label) for label in labels]
        before = common_prefix([ids[:-1] for ids in encoded])
        label_ids = [ids[-1] for ids in encoded]
        if len(set(label_ids)) < len(labels) or any(len(ids) != len(before) + 1 for ids in encoded):
            pieces = {
                label: self.tokenizer.convert_ids_to_tokens(ids[len(before) :][:4])
                for label, ids in zip(labels, encoded, strict=True)
            }
            raise InputError(
                f"the labels are not single, different tokens after {ending[-20:]!r}: {pieces}",
                where=self.name,
                remedy="End the prefill so that they are, or use other labels",
            )
        return label_ids

    def _score(self, batch: list[tuple], prefixes: Prefixes) -> Iterator[tuple[int, list[float]]]:
        """One batch of (index, ids, label ids)."""
        if self._decodes and len(batch) > 1:  # a pair in both orders has the prompt in common too
            prefixes = Prefixes(self.model, [ids for _, ids, _ in batch], self.pad_id, within=prefixes)
        # Half as many tokens as where text is written, for here the known ones are not counted among them.
        for part in chunks([len(ids) - prefixes.shared(ids) for _, ids, _ in batch], self._chunk_tokens // 2):
            rows = [batch[i] for i in part]
            logits = prefill(self.model, [ids for _, ids, _ in rows], prefixes, self.pad_id, keep=False)[0]
            logprobs = logits.float().log_softmax(-1).cpu()
            if logprobs.isnan().any():
                raise not_a_number(self.name)
            for row, (index, _, labels) in enumerate(rows):
                yield index, logprobs[row, labels].tolist()


class _StopStrings:
    """Whether a stop string is in a row's newest tokens; also a stopping criterion of `generate`."""

    def __init__(self, tokenizer, stops: Sequence[str], width: int = 0):
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = 4 * max(map(len, stops)) + 1  # a character is at most four tokens

    def found(self, rows: list[list[int]]) -> list[bool]:
        """Of each row's new tokens."""
        tails = [tokens[-self.tail :] for tokens in rows]
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        return [any(s in text for s in self.stops) for text in texts]

    def __call__(self, input_ids, scores, **_kwargs):
        import torch

        return torch.tensor(self.found(input_ids[:, self.width :].tolist()), device=input_ids.device)


def tokens_that_fit(model) -> int:
    """Tokens whose keys and values fill half of the memory that is free, rounded down to a power of two.

    Rounded, so that a run goes on with the batches it began with although memory differs a little. The other
    half is for what a forward pass needs besides. On a CPU never more than 32,768: a larger batch takes its
    memory from the other programs of the machine and is no faster.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    tokens = max(1, free_memory(model.device) // 2 // a_token)
    if model.device.type == "cpu":
        tokens = min(tokens, 32768)
    return 1 << (tokens.bit_length() - 1)


def free_memory(device) -> int:
    """Bytes that a device has left for us."""
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    return psutil.virtual_memory().available


def fast_path(engine) -> dict[str, bool | str]:
    """The manifest's field of a local engine: {"fast_path": True, or "no: " and the reason}. {} for a server."""
    return {"fast_path": fast_path_field(engine.slow_reason)} if isinstance(engine, LocalEngine) else {}


def fast_path_field(reason: str | None) -> bool | str:
    """What manifests and doctor.py say of a model's `slow_reason`."""
    return f"no: {reason}" if reason else True
