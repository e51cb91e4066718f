"""Safety classifiers: guard models that write a verdict, and sequence classifiers.

for row, reading in safety_reader("my-org/my-guard", ())(rows): print(reading["class"])
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data.dialogue import as_messages
from cai.models import chat, folders, loading
from cai.models.decoding import context_length
from cai.models.engine import Message, RowRequest, Sampling
from cai.models.local import LocalEngine

_GUARD_TOKENS = 24  # the verdict and, of what is unsafe, the names of its categories


def safety_reader(name: str, unsafe: Sequence[str], **options: Any) -> "Classifier | Guard":
    """Tells safe from unsafe: a guard model that writes its verdict, or a sequence classifier.

    options: arguments of `load_engine`, or of `Classifier`.
    """
    from transformers import AutoConfig

    path = loading.find_model(name)
    folders.check_quantisation(path)
    try:
        kinds = folders.architectures(path) or AutoConfig.from_pretrained(path, trust_remote_code=False).architectures
    except (OSError, ValueError):
        kinds = None  # the classifier reports what is wrong with it
    kinds = kinds or []
    if not any(kind.endswith("ForCausalLM") for kind in kinds):
        return Classifier(name, unsafe, **options)
    if unsafe:
        raise InputError("a guard model that writes text has no labels", where=name, remedy="Leave --unsafe-label out")
    return Guard(name, **options)


class _GuardChat(chat.Chat):
    """The chat of a model whose template asks about a conversation, whoever spoke last in it."""

    def render(self, conversation: Sequence[Message]) -> str:
        text = super().render(conversation)  # up to the end of the response
        mark = "Zx7ENDx7Z"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        return text + self._apply(turns, True).rpartition(mark)[2]


class Guard:
    """A guard model that writes `safe` or `unsafe` and then the categories, as Llama Guard does; `Safety: Safe` too.

    The question is the model's own chat template around the conversation. The answer is read strictly: a first line
    that is anything else, such as `controversial`, is no verdict.
    """

    def __init__(self, name: str, **options: Any):
        loaded: Any = loading.load_engine(name, in_process=True, **options)
        self.engine = LocalEngine(name, loaded.model, loaded.tokenizer, loaded.batch_size)
        self.engine.chat = _GuardChat(loaded.tokenizer, name)

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each row with class `unsafe` or `safe` and the answer (`said`), not in order; class None if the answer can't
        be read or the row is too long."""
        requests = (RowRequest(row["id"], _turns(row), row=row) for row in rows)
        for request, generation in self.engine.generate(requests, Sampling(_GUARD_TOKENS, 0.0)):
            verdict = re.match(r"(?:safety: ?)?(safe|unsafe)[ \t]*(?:\n|$)", generation.text, re.IGNORECASE)
            yield request.row, {"class": verdict[1].lower() if verdict else None, "said": shorten(generation.text)}


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [*as_messages(row["prompt"]), {"role": "assistant", "content": row["response"]}]


class Classifier:
    """A sequence-classification model that reads a conversation: safe or unsafe.

    Args:
        name: a folder or hub id.
        unsafe: labels that mean harm; empty: those whose names mean harm. Raises InputError if there are none.
    """

    NAMES = re.compile(r"unsafe|harm(?!less)|toxic|danger|violat|hate", re.IGNORECASE)

    def __init__(
        self,
        name: str,
        unsafe: Sequence[str] = (),
        *,
        batch_size: int = 32,
        device: str | None = None,
        dtype: str = "auto",
    ):
        from transformers import AutoModelForSequenceClassification

        if (base := folders.adapter_base(loading.find_model(name))) is not None:
            raise InputError(
                f"an adapter of {base}: merge it first",
                where=name,
                expected="a complete classifier, with the names of its labels",
                remedy="With peft: merge_and_unload, then save_pretrained with the tokenizer",
            )
        device = device or loading.best_device(None)
        tokenizer = self.tokenizer = loading.load_tokenizer(name)
        weights_dtype = loading.inference_dtype(device, dtype, name)
        model = loading.load_weights(AutoModelForSequenceClassification, name, weights_dtype)
        self.unsafe = self._unsafe_labels(name, model.config.id2label, unsafe)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        model.config.pad_token_id = tokenizer.pad_token_id  # else a decoder may read its verdict off the padding
        self.model, self.batch_size = model.to(device).eval(), batch_size
        self.chat = chat.Chat(tokenizer, name) if getattr(tokenizer, "chat_template", None) else None
        self.context = context_length(model)
        self.has_several_labels = model.config.problem_type == "multi_label_classification"

    def _unsafe_labels(self, name: str, labels: dict[int, str], unsafe: Sequence[str]) -> list[int]:
        """The numbers of the labels that mean harm, by the caller's names or by the labels' own."""
        numbers = {str(label).casefold(): number for number, label in labels.items()}
        if unknown := [label for label in unsafe if label.casefold() not in numbers]:
            raise InputError(f"no label {unknown[0]!r}", where=name, expected=f"of {', '.join(labels.values())}")
        if unsafe:
            return [numbers[label.casefold()] for label in unsafe]
        harmful = [
            number
            for label, number in numbers.items()
            if self.NAMES.search(label) and not re.match(r"(not|non|no)[\W_]", label)
        ]
        if not harmful or len(harmful) == len(labels):
            raise InputError(
                f"of the labels {', '.join(map(str, labels.values()))} none is named unsafe, or all are",
                where=name,
                remedy="Name them with --unsafe-label",
            )
        return harmful

    def encode(self, row: dict[str, Any]) -> list[int]:
        """Token ids of the conversation: by the tokenizer's chat template, or as plain lines where there is none."""
        if self.chat:
            return [*chain(*chat.encode(self.chat, as_messages(row["prompt"]), row["response"]))]
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in _turns(row))
        token_ids: list[int] = self.tokenizer(text)["input_ids"]
        return token_ids

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each row with class `unsafe` or `safe` and `p_unsafe`; class None if it is too long."""
        rows = iter(rows)
        while batch := list(islice(rows, self.batch_size)):
            encoded = [self.encode(row) for row in batch]
            fitting = [i for i, ids in enumerate(encoded) if not self.context or len(ids) <= self.context]
            p_unsafe: list[float | None] = [None] * len(batch)
            for i, p in zip(fitting, self._read([encoded[i] for i in fitting]), strict=True):
                p_unsafe[i] = p
            for row, p_row in zip(batch, p_unsafe, strict=True):
                if p_row is None:
                    yield row, {"class": None, "p_unsafe": None}
                else:
                    yield row, {"class": "unsafe" if p_row > 0.5 else "safe", "p_unsafe": round(p_row, 4)}

    def _read(self, encoded: list[list[int]]) -> list[float]:
        """The probability of harm of each sequence of token ids."""
        import torch

        if not encoded:
            return []
        inputs = self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits.float()
        if self.has_several_labels:
            return list(logits.sigmoid()[:, self.unsafe].amax(-1).tolist())
        return list(logits.softmax(-1)[:, self.unsafe].sum(-1).tolist())
