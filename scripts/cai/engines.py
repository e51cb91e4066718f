"""What answers: a causal language model with a chat template, on this machine.

    engine = load_engine("tiny")
    for index, answer in engine.generate([[{"role": "user", "content": "Hello"}]], Sampling(), seeds=[1]): ...

`generate` samples text, `score` reads the log-probabilities of a forced choice. Both take conversations
(lists of `{"role", "content"}`); one that ends with the assistant is continued, which is how a template
begins the answer.

Leaves out: servers (`openai:`), models split over several GPUs, beam search, images, tools. Remote code is
never run and only safetensors are read.
"""

import copy
import json
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from cai import cli, resources
from cai.errors import CaiError, InputError, shorten

# Batches that are sorted by length together: more sort better, fewer answer sooner and use less memory.
WINDOW = 32

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
class Sampling:
    """How to sample: `temperature` 0 is greedy; `max_new_tokens` never counts the prompt."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One answer, stripped of thinking, control tokens and outer whitespace.

    finish: "stop" (the model ended, or a stop string came), "length" (cut at max_new_tokens), or "too_long"
    (prompt and max_new_tokens do not fit the model's context: nothing was generated, `text` is empty).
    tokens: new tokens, the end token included. prompt_tokens: tokens of the rendered conversation.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


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
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(
                f"the chat template refuses a conversation of {roles}: {shorten(error)}", where=self.name,
                expected="user and assistant in turn, the user first",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text. The template has written the BOS, if any: none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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
        except (TemplateError, TypeError):
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

    Attributes: name, model, tokenizer, chat, batch_size, context (tokens the model can hold, or None).
    """

    def __init__(self, name: str, model, tokenizer, batch_size: int):
        from transformers import GenerationConfig

        self.name, self.model, self.tokenizer, self.batch_size = name, model, tokenizer, batch_size
        self.chat = Chat(tokenizer, name)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None)
        self._shares_prefix = _shares_prefix(model, config)
        found = model.generation_config.eos_token_id
        ends = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id, self.chat.stop_id]
        self.stop_ids = sorted({int(i) for i in ends if i is not None and i < config.vocab_size})
        pad = tokenizer.pad_token_id
        if pad is None or pad >= config.vocab_size:
            pad = self.stop_ids[0] if self.stop_ids else 0
        self.pad_id = pad
        # A fresh one: a checkpoint's own sampling settings would act beside ours, unseen.
        model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=pad, eos_token_id=self.stop_ids or None
        )

    def generate(
        self, conversations: Iterable[Sequence[dict]], sampling: Sampling, seeds: Iterable[int],
        done: Container[int] = (),
    ) -> Iterator[tuple[int, Generation]]:
        """Answers as they are done, as (index of the conversation, Generation), not in order.

        A row's draws hang on its seed alone, so its text does not depend on its batch (in float32; in
        bfloat16 the logits themselves do).

        Args:
            conversations: read lazily, a window at a time.
            seeds: one a conversation.
            done: indices whose answers the caller has. A batch of nothing else is skipped; any other is as it
                would be without `done`, so that a resumed run rounds as one that never stopped.
        """
        numbered = enumerate(zip(conversations, seeds, strict=True))
        while window := list(islice(numbered, WINDOW * self.batch_size)):
            rows = []
            for index, (conversation, seed) in window:
                ids = self.chat.encode(self.chat.render(conversation))
                if self.context and len(ids) + sampling.max_new_tokens > self.context:
                    yield index, Generation("", "too_long", len(ids), 0)
                else:
                    rows.append((index, ids, seed, conversation[-1]["role"] == "assistant"))
            yield from self._in_batches(rows, partial(self._generate, sampling=sampling), done)

    def score(
        self, conversations: Iterable[Sequence[dict]], labels: Sequence[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        """Log-probabilities of each label as the next token, as (index, one a label), not in order.

        They are of the softmax over the whole vocabulary: what they lack to 1 went to other tokens. None
        stands for a conversation longer than the model's context. What all conversations of a window begin
        with is computed once, so it pays to call this with conversations that begin alike.

        Raises InputError if the labels are not single, different tokens where the conversation ends.
        """
        numbered = enumerate(conversations)
        known: dict[str, list[int]] = {}
        while window := list(islice(numbered, WINDOW * self.batch_size)):
            rows = []
            for index, conversation in window:
                ids, label_ids = self._before_label(conversation, labels, known)
                if self.context and len(ids) > self.context:
                    yield index, None
                else:
                    rows.append((index, ids, label_ids))
            if not rows:
                continue
            shared = _common_prefix([ids[:-1] for _, ids, _ in rows]) if self._shares_prefix else []
            cache = self._prefix_cache(shared) if shared and len(rows) > 1 else None
            yield from self._in_batches(rows, partial(self._score, cache=cache, shared=len(shared)))

    def _in_batches(self, rows: list[tuple], forward, done: Container[int] = ()) -> Iterator[tuple]:
        """`forward` over batches of like length, longest first; the batch is halved where memory runs out."""
        import torch

        rows = sorted(rows, key=lambda row: -len(row[1]))
        at = 0
        while at < len(rows):
            batch = rows[at : at + self.batch_size]
            if all(index in done for index, *_ in batch):
                at += len(batch)
                continue
            try:
                with torch.inference_mode():
                    results = forward(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    tokens = len(batch[0][1])
                    raise CaiError(f"one row of {tokens} tokens does not fit the GPU's memory") from error
                results = None
            if results is None:  # out here the failed batch's tensors are gone
                torch.cuda.empty_cache()
                self.batch_size = len(batch) // 2
                cli.warn(f"the GPU's memory is full: going on with --batch-size {self.batch_size}")
                continue
            at += len(batch)
            yield from results

    def _generate(self, batch: list[tuple], sampling: Sampling) -> list[tuple[int, Generation]]:
        """One batch of (index, ids, seed, continued)."""
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
        results = []
        for (index, prompt, _, continued), tokens in zip(batch, new, strict=True):
            length = next((n for n, token in enumerate(tokens) if token in self.stop_ids), None)
            text, stopped = self.chat.answer(tokens[:length], continued=continued, stop=sampling.stop)
            finish = "length" if length is None and not stopped else "stop"
            count = len(tokens) if length is None else length + 1
            results.append((index, Generation(text, finish, len(prompt), count)))
        return results

    def _before_label(self, conversation, labels: Sequence[str], known: dict) -> tuple[list[int], list[int]]:
        """Tokens before the choice, and the labels' ids there.

        The label is encoded together with what precedes it, as the model has seen it in training: "(" and "A"
        may be one token, and then it is that token which is asked for.
        """
        text = self.chat.render(conversation)
        ending = conversation[-1]["content"] if conversation[-1]["role"] == "assistant" else ""
        if ending not in known:
            encoded = [self.chat.encode(text + label) for label in labels]
            before = _common_prefix([ids[:-1] for ids in encoded])
            label_ids = [ids[-1] for ids in encoded]
            if len(set(label_ids)) < len(labels) or any(len(ids) != len(before) + 1 for ids in encoded):
                pieces = {label: self.tokenizer.convert_ids_to_tokens(ids[len(before) :][:4])
                          for label, ids in zip(labels, encoded, strict=True)}
                raise InputError(
                    f"the labels are not single, different tokens after {ending[-20:]!r}: {pieces}",
                    where=self.name, remedy="End the prefill so that they are, or use other labels",
                )
            known[ending] = label_ids
        ids = self.chat.encode(text + labels[0])
        if ids[-1] != known[ending][0]:
            raise InputError(f"{labels[0]!r} is not one token after {text[-20:]!r}", where=self.name)
        return ids[:-1], known[ending]

    def _prefix_cache(self, prefix: list[int]):
        """Keys and values of the tokens that all rows of a window begin with, as a cache of one row."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([prefix], device=self.model.device)
            return self._forward(ids, torch.tensor([len(prefix) - 1]), use_cache=True).past_key_values

    def _score(self, batch: list[tuple], cache, shared: int) -> list[tuple[int, list[float]]]:
        """One batch of (index, ids, label ids), its first `shared` tokens taken from `cache`.

        Padded on the right: what comes after the last token can't be seen from it, and distances stay true
        between prefix and rest, which a sliding window counts.
        """
        import torch

        if cache is None:
            shared = 0
        else:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(batch))
        rests = [ids[shared:] for _, ids, _ in batch]
        width = max(map(len, rests))
        padded = [rest + [self.pad_id] * (width - len(rest)) for rest in rests]
        ids = torch.tensor(padded, device=self.model.device)
        last = torch.tensor([len(rest) - 1 for rest in rests])
        logits = self._forward(ids, last, past_key_values=cache, use_cache=cache is not None).logits[:, 0]
        logprobs = logits.float().log_softmax(-1).cpu()
        if logprobs.isnan().any():
            raise _not_a_number(self.name)
        return [(index, logprobs[row, labels].tolist()) for row, (index, _, labels) in enumerate(batch)]

    def _forward(self, ids, last, **kwargs):
        """A forward pass whose logits are of column `last` of each row alone: (rows, 1, vocabulary)."""
        rows = range(len(last))
        # In front of the head, so that a large vocabulary's logits are never made for the other positions,
        # and whatever the model does after the head (capping, scaling) is still done.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _module, args: (args[0][rows, last.to(args[0].device)].unsqueeze(1),)
        )
        try:
            return self.model(input_ids=ids, **kwargs)
        finally:
            hook.remove()


class RowSampler:
    """A logits processor that does the sampling: one uniform number a row and step, from the row's seed.

    Args:
        seeds: one a row.
        width: columns of the prompt, so that the step is known.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], width: int):
        import torch

        self.sampling, self.width, self.failed = sampling, width, None
        draws = [np.random.Generator(np.random.Philox(key=s)).random(sampling.max_new_tokens) for s in seeds]
        self.draws = torch.tensor(np.array(draws), dtype=torch.float32)

    def __call__(self, input_ids, logits):
        """Logits (rows, vocabulary) to all -inf but the token drawn."""
        import torch

        step = input_ids.shape[1] - self.width
        failed = logits.isnan().any()
        self.failed = failed if self.failed is None else self.failed | failed
        if self.sampling.temperature == 0:
            return logits
        if self.draws.device != logits.device:
            self.draws = self.draws.to(logits.device)
        picked = draw(logits, self.draws[:, step : step + 1], self.sampling.temperature, self.sampling.top_p)
        return torch.full_like(logits, -torch.inf).scatter_(1, picked, 0.0)

    def check(self, name: str) -> None:
        """Raise CaiError if any logit was not a number."""
        if bool(self.failed):
            raise _not_a_number(name)


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


class _StopStrings:
    """Stopping criterion: a row is done when a stop string is in its newest tokens."""

    def __init__(self, tokenizer, stops: Sequence[str], width: int):
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = 4 * max(map(len, stops)) + 1  # a character is at most four tokens

    def __call__(self, input_ids, scores, **_kwargs):
        import torch

        ids = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return torch.tensor([any(s in text for s in self.stops) for text in texts], device=input_ids.device)


_loaded: dict[tuple, LocalEngine] = {}


def load_engine(
    model: str, *, batch_size: int = 32, device: str | None = None, dtype: str = "auto"
) -> LocalEngine:
    """The engine of a folder, a hub id, or `tiny`; the last one loaded is kept in this process.

    Args:
        device: cpu, cuda, cuda:1, mps; None takes the best there is.
        dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA, float32 elsewhere).
    Raises:
        InputError: no such model, or it lacks config, weights, tokenizer or chat template.
    """
    path = check_model(model)
    folder = Path(path)
    key = (path, device, dtype)
    if folder.is_dir():  # written anew since: another model
        key += (folder.resolve(), *sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()))
    if key not in _loaded:
        release_engines()
        _loaded[key] = _load(model, path, batch_size, device, dtype)
    engine = _loaded[key]
    engine.name, engine.batch_size = model, batch_size
    return engine


def release_engines() -> None:
    """Forget the engine kept in this process, so that its memory is free for training."""
    _loaded.clear()


def check_model(model: str, *, classifier: bool = False) -> str:
    """The folder or hub id that `model` stands for, checked as far as it can be without loading anything.

    classifier: a reward model will do as well.
    Raises InputError naming the folder and the remedy.
    """
    path = resources.model_path(model)
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
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=folder / name, remedy="Copy the folder again") from error


def _load(name: str, path: str, batch_size: int, device: str | None, dtype: str) -> LocalEngine:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
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
    return LocalEngine(name, model, tokenizer, batch_size)


def _control_pattern(tokenizer) -> re.Pattern | None:
    """What spells a control token: the special ones, and any added token that the chat template speaks of."""
    template = str(tokenizer.chat_template)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
    names = {t for t in [*added, *tokenizer.all_special_tokens] if len(t.strip()) > 1}
    # Longest first, so that a token is found before one that it begins with.
    longest_first = sorted(names, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def _common_prefix(lists: Sequence[list[int]]) -> list[int]:
    """What all the lists begin with: what the first and the last of them in sorted order do."""
    low, high = min(lists), max(lists)
    return low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _shares_prefix(model, config) -> bool:
    """Whether a cache of the prefix can stand for it: in attention over tokens, not in recurrent states."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not getattr(model, "_is_stateful", False) and kinds <= {"full_attention", "sliding_attention"}


def _not_a_number(name: str) -> CaiError:
    return CaiError(f"{name}: the model's logits are not numbers (NaN). Try --dtype float32 or bfloat16")
