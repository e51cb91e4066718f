"""What answers: a causal language model with a chat template, on this machine.

    engine = load_engine("tiny")
    for index, answer in engine.generate([[{"role": "user", "content": "Hello"}]], Sampling(), seeds=[1]): ...

`generate` samples text, `score` reads the log-probabilities of a forced choice. Both take conversations
(lists of `{"role", "content"}`); one that ends with the assistant is continued, which is how a template
begins the answer.

A batch holds so many tokens (`--batch-tokens`) as memory allows, and is halved where it does not after all;
the loop itself is in cai/decoding.py. Leaves out: what a server does (`openai:NAME`, cai/servers.py), models
split over several GPUs, beam search, images, tools. Remote code is never run and only safetensors are read.
"""

import ctypes
import json
import os
import platform
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cai import cli, resources
from cai.decoding import (
    Prefixes,
    RowSampler,
    Sampling,
    chunks,
    common_prefix,
    decode,
    draw,
    not_a_number,
    prefill,
    slow_reason,
    slow_warning,
)
from cai.errors import CaiError, InputError, shorten

__all__ = ["Chat", "Generation", "LocalEngine", "RowSampler", "Sampling", "draw", "load_engine"]

# Batches of the most rows that are sorted by length together, and rows of them at most: more sort better,
# fewer answer sooner and use less memory.
WINDOW = 32
MOST_ROWS = 4096

# Most rows in one forward pass where nobody says.
BATCH_SIZE = 128

# Tokens of prompts in one forward pass. On a CPU more of them leave its cache, and are read more slowly.
CHUNK_TOKENS = {"cpu": 4096}
OTHER_CHUNK_TOKENS = 16384

# How models mark their reasoning: what opens it and what closes it.
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)

# Stands for a text while a template is tried out. `trim` leaves it alone.
_MARK = "Zx9MARKx9Z"


@dataclass(frozen=True)
class Generation:
    """One answer, stripped of thinking, control tokens and outer whitespace.

    finish: "stop" (the model ended, or a stop string came), "length" (cut at max_new_tokens), "too_long"
    (prompt and max_new_tokens do not fit the model's context), or "failed" (a server would not answer; `reason`
    says why). In the last two nothing was generated, and `text` is empty.
    tokens: new tokens, the end token included. prompt_tokens: tokens of the rendered conversation.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    reason: str = ""

    @property
    def lost(self) -> bool:
        """Whether there is no answer."""
        return self.finish in ("too_long", "failed")


class Chat:
    """A tokenizer with its chat template: conversation to text to tokens, and an answer's tokens to text.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what to call the model in an error.
    Attributes:
        opened: closing tag of the thinking that the prompt itself opens, or None.
        stop_id, stop_text: what the template ends an assistant's turn with, a control token or plain text.
    """

    def __init__(self, tokenizer, name: str = "the model"):
        self.tokenizer, self.name = tokenizer, name
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template", where=name, remedy=_TEMPLATE_REMEDY)
        self._control = _control_pattern(tokenizer)
        user = {"role": "user", "content": _MARK}
        # Multimodal templates read lists of parts and drop a plain string without a word.
        self._parts = False
        self._parts = _MARK not in self._try([user])
        if self._parts and _MARK not in self._try([user]):
            raise InputError("the chat template leaves out what the user says", where=name,
                             remedy=_TEMPLATE_REMEDY)
        # Some templates refuse a system role, others ignore it.
        system = {"role": "system", "content": _MARK}
        self._takes_system = _MARK in self._try([system, {**user, "content": "x"}])
        opening = self._try([user]).rpartition(_MARK)[2].rstrip()
        self.opened = next((close for open_, close in THINKING if opening.endswith(open_)), None)
        turns = [{**user, "content": "x"}, {"role": "assistant", "content": _MARK}]
        end = self._try(turns, False).rpartition(_MARK)[2]
        control = self._control and self._control.search(end)
        plain = (end[: control.start()] if control else end).strip()
        self.stop_text = plain or None
        self.stop_id = tokenizer.convert_tokens_to_ids(control[0]) if control and not plain else None

    def render(self, conversation: Sequence[dict]) -> str:
        """The text the model reads, up to where the assistant goes on.

        Control tokens spelled out in a message get a space after their first character, so that text from a
        record can't end a turn or begin another. A system message goes into the first user turn where the
        template takes none. Neighbours of the same role are joined: many templates insist on alternation.
        Raises InputError if the template refuses the conversation all the same.
        """
        from jinja2 import TemplateError

        messages = []
        for message in conversation:
            role, content = message["role"], self.neutralise(message["content"])
            if role == "system" and not self._takes_system:
                role = "user"
            if messages and messages[-1]["role"] == role:
                content = messages.pop()["content"] + "\n\n" + content
            messages.append({"role": role, "content": content})
        try:
            if messages[-1]["role"] != "assistant":
                return self._apply(messages, True)
            # Cut at a mark of our own: the template's trimming can't reach the end of what was begun.
            messages[-1]["content"] += _MARK
            text, found, _ = self._apply(messages, False).rpartition(_MARK)
            if not found:
                raise TemplateError("it leaves out the last message")
            return text
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(
                f"the chat template refuses a conversation of {roles}: {shorten(error)}", where=self.name,
                expected="user and assistant in turn, the user first",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text. The template has written the BOS, if any: none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each of many texts, in one call, which takes a fraction of the time."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def neutralise(self, text: str) -> str:
        """`text` with every control token broken up by a space."""
        while self._control and self._control.search(text):
            text = self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def answer(self, ids: Sequence[int], *, continued: bool, stop: Sequence[str] = ()) -> tuple[str, bool]:
        """An answer's text and whether a stop string ended it.

        Args:
            ids: new tokens before the end token.
            continued: the conversation ended with the assistant, whose answer this continues.
            stop: strings that end the answer; they are not part of it.
        """
        # Special tokens stay until the thinking is cut out: in some models they are all that marks it.
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cuts = [at for at in (text.find(s) for s in self.stops(stop)) if at >= 0]
        text = strip_thinking(text[: min(cuts, default=None)], opened=None if continued else self.opened)
        return (self._control.sub("", text) if self._control else text).strip(), bool(cuts)

    def stops(self, stop: Sequence[str]) -> list[str]:
        """The stop strings given and the template's own."""
        return [s for s in (*stop, self.stop_text) if s]

    def _try(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The rendered text, or "" where the template refuses."""
        from jinja2 import TemplateError

        try:
            return self._apply(messages, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, ArithmeticError):
            return ""

    def _apply(self, messages: list[dict], add_generation_prompt: bool) -> str:
        if self._parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        # Where a template can switch thinking off, it is off: the answer alone is wanted, and trained turns
        # look like that in those templates.
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )


def strip_thinking(text: str, opened: str | None = None) -> str:
    """`text` without the model's reasoning, also where it never came to an end.

    Args:
        opened: closing tag of a block that the prompt has opened; without it all of `text` is thinking.
    """
    if opened:
        text = text.partition(opened)[2]
    for open_, close in THINKING:
        text = re.sub(f"{re.escape(open_)}.*?(?:{re.escape(close)}|\\Z)", "", text, flags=re.DOTALL)
    return text.removeprefix("<|channel|>final<|message|>")  # an answer without thinking, where it has a tag too


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
        self, conversations: Iterable[Sequence[dict]], sampling: Sampling, seeds: Iterable[int],
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
            return [(index, ids, seed, continued) for (index, seed, continued), ids
                    in zip(rows, self.chat.encode_all(texts), strict=True)]

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
                rows, lambda batch, prefixes=prefixes, one=one: one(batch, sampling, prefixes),
                sampling.max_new_tokens, done,
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
            self.model, [ids for _, ids, _, _ in batch], prefixes, sampler, pad_id=self.pad_id,
            max_new_tokens=sampling.max_new_tokens, stop_ids=set(self.stop_ids), chunk_tokens=self._chunk_tokens,
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
            pieces = {label: self.tokenizer.convert_ids_to_tokens(ids[len(before) :][:4])
                      for label, ids in zip(labels, encoded, strict=True)}
            raise InputError(
                f"the labels are not single, different tokens after {ending[-20:]!r}: {pieces}",
                where=self.name, remedy="End the prefill so that they are, or use other labels",
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


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system with every large tensor.

    Tensors of a forward pass come and go by the megabyte; page by page their memory is mapped, cleared and
    unmapped again, which takes up to a third of the time on a CPU. Has no effect elsewhere than on glibc, and
    leaves alone what the environment says (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
    library = ctypes.CDLL(None)
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        library.mallopt(trim, 1 << 30)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library.mallopt(mmap, 1 << 25)  # the most that glibc takes


_loaded: dict[tuple, LocalEngine] = {}


def load_engine(
    model: str, *, batch_size: int | None = None, batch_tokens: int | None = None, device: str | None = None,
    dtype: str = "auto", endpoints: tuple[str, ...] = (),
):
    """The engine of a folder, a hub id, or `tiny`; the last one loaded is kept in this process. Or a server's.

    Args:
        model: `openai:NAME` is what servers at `endpoints` call NAME (cai/servers.py).
        batch_size, batch_tokens: bounds of a batch; see `LocalEngine`.
        device: cpu, cuda, cuda:1, mps; None takes the best there is, of several GPUs each process its own.
        dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA, float32 elsewhere).
    Raises:
        InputError: no such model, or it lacks config, weights, tokenizer or chat template.
    """
    if model.startswith("openai:"):
        from cai.servers import load_server

        return load_server(model, endpoints=endpoints, batch_size=batch_size)
    if endpoints:
        raise InputError(f"an endpoint with the local model {model}", where="--endpoint",
                         expected="--model openai:NAME", remedy="Say what the server calls the model")
    path = check_model(model)
    folder = Path(path)
    key = (path, device, dtype)
    if folder.is_dir():  # written anew since: another model
        key += (folder.resolve(), *sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()))
    if key not in _loaded:
        release_engines()
        _loaded[key] = _load(model, path, device, dtype)
    engine = _loaded[key]
    engine.name = model
    engine.set_batches(batch_size, batch_tokens)
    return engine


def fast_path(engine) -> dict[str, bool | str]:
    """The manifest's field of a local engine: {"fast_path": True, or "no: " and the reason}. {} for a server."""
    return {"fast_path": fast_path_field(engine.slow_reason)} if isinstance(engine, LocalEngine) else {}


def fast_path_field(reason: str | None) -> bool | str:
    """What manifests and doctor.py say of a model's `slow_reason`."""
    return f"no: {reason}" if reason else True


def release_engines() -> None:
    """Forget the engine kept in this process, so that its memory is free for training."""
    _loaded.clear()


def check_model(model: str, *, classifier: bool = False) -> str:
    """The folder or hub id that `model` stands for, checked as far as it can be without loading anything.

    classifier: a reward model will do as well.
    Raises InputError naming the folder and the remedy.
    """
    path = resources.model_path(model)
    if model.startswith("openai:"):
        return path  # of the server's folders nothing is known here
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise InputError("no such model folder", where=path, remedy="Check the path, or give a hub id")
        return path
    names = {f.name for f in folder.iterdir()}
    if not names & {"config.json", "adapter_config.json"}:
        raise InputError("the model folder has no config.json", where=path,
                         remedy="Give a folder written by save_pretrained()")
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError("the model folder has no weights in safetensors", where=path,
                         remedy="Save them with save_pretrained(), which writes model.safetensors")
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json"}:
        raise InputError("the model folder has no tokenizer", where=path,
                         remedy="Save the model's tokenizer into it: tokenizer.save_pretrained(folder)")
    beside = names & {"chat_template.jinja", "chat_template.json"}
    if not beside and not _json(folder, "tokenizer_config.json").get("chat_template"):
        raise InputError("the model folder has no chat template", where=path, remedy=_TEMPLATE_REMEDY)
    kinds = _json(folder, "config.json").get("architectures") or []
    if not classifier and kinds and all("ForSequenceClassification" in kind for kind in kinds):
        raise InputError(f"this is a classifier or a reward model ({kinds[0]})", where=path,
                         expected="a causal language model")
    return path


_TEMPLATE_REMEDY = (
    "Take the instruction-tuned model, or put its chat template beside it as chat_template.jinja "
    "(a Jinja file over `messages`, each with role and content)"
)


def _json(folder: Path, name: str) -> dict:
    """A JSON file of a model folder, {} if there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=folder / name, remedy="Copy the folder again") from error


def _load(name: str, path: str, device: str | None, dtype: str) -> LocalEngine:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the model can't be loaded: {shorten(error, 300)}", where=name,
            expected="a model folder, or the id of one that the hub or the local cache has",
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"the weights lack {len(missing)} tensors, {missing[0]} among them", where=name,
                         expected="a complete causal language model")
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch says both for a device that is not there
        if isinstance(error, torch.OutOfMemoryError):
            raise CaiError(f"{name} does not fit the memory of {device}") from error
        raise InputError(f"{device!r} can't be used: {shorten(error)}", where="--device") from error
    engine = LocalEngine(name, model, tokenizer)
    if engine.slow_reason:
        cli.warn(slow_warning(name, engine.slow_reason))
    return engine


def _control_pattern(tokenizer) -> re.Pattern | None:
    """What spells a control token: the special ones, and any added token that the chat template speaks of."""
    template = str(tokenizer.chat_template)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
    names = {t for t in [*added, *tokenizer.all_special_tokens] if len(t.strip()) > 1}
    # Longest first, so that a token is found before one that it begins with.
    longest_first = sorted(names, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None
