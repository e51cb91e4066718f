"""A reward model's folder, and a copy of it that other engines read the same scores from.

    faults = find_faults("runs/mine/reward-model")
    write_folder("runs/mine/reward-model", "handover/reward", faults)

Engines differ in how they end a response, begin a text, pad, and find the head. The copy has a chat template that ends
where our own encoding ends (`chat.encode`), a padding token that ends nothing, and a head of one score without bias.
Leaves out adapters: engines read whole models.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.base import files
from cai.base.errors import InputError
from cai.models import folders, loading, scorer
from cai.models.chat import Chat, fix_template_date
from cai.models.gguf import resolve

# What a label is called that is the better one of two, or the worse one, in the configurations of public classifiers.
BETTER = ("chosen", "preferred", "accepted", "better", "good", "positive", "safe", "harmless", "helpful", "label_1")
WORSE = ("rejected", "refused", "worse", "bad", "negative", "unsafe", "harmful", "label_0")

# The head that engines look for, without being told.
HEAD = "score.weight"

# The file and the tensors of a head on top of a language model, as LLaMA-Factory reads them.
VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True)
class Fault:
    """What makes an engine read another score from a folder, or none.

    cause: a word of the table in references/handover.md. detail: with the value found.
    """

    cause: str
    detail: str


@dataclass(frozen=True)
class Head:
    """The layer that makes a score of the last hidden state, as it is stored.

    name, file: of its weights. weight: (labels, hidden), a tensor. bias: (labels,) or None. better: of two labels, the
    one that means the better response.
    """

    name: str
    file: Path
    weight: Any
    bias: Any
    better: int | None = None

    def score_row(self) -> tuple[Any, Any]:
        """(weight (hidden,), bias) of the one score: of two labels, the difference, which is a log-odds."""
        if self.better is None:
            return self.weight[0].float(), 0.0 if self.bias is None else float(self.bias[0])
        worse = 1 - self.better
        bias = 0.0 if self.bias is None else float(self.bias[self.better] - self.bias[worse])
        return self.weight[self.better].float() - self.weight[worse].float(), bias


def read_head(name: str) -> Head:
    """The head in a folder's weights.

    Raises InputError for an adapter, a folder without exactly one head, or two labels of which neither's name says
    which is better.
    """
    from safetensors import safe_open

    folder = resolve(name)
    if folders.adapter_base(folder) is not None:
        raise InputError(
            "an adapter, and engines read whole reward models",
            where=folder,
            remedy="Train one without --lora, or merge it into its base first",
        )
    config = folders.read_config(folder)
    hidden = (config.get("text_config") or config).get("hidden_size")
    heads = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        if file.name == VALUE_HEAD:
            continue
        with safe_open(str(file), "pt") as weights:
            names = set(weights.keys())
            for name in sorted(names):
                shape = weights.get_slice(name).get_shape()
                if len(shape) == 2 and shape[0] <= 2 and shape[1] == hidden and name.endswith(".weight"):
                    bias = f"{name.removesuffix('weight')}bias"
                    heads.append(
                        (name, file, weights.get_tensor(name), weights.get_tensor(bias) if bias in names else None)
                    )
    if len(heads) != 1:
        raise InputError(
            f"{len(heads)} matrices of one or two rows of {hidden}",
            where=folder,
            expected="a reward model with one head",
            remedy="Train one with reward_model.py",
        )
    head = Head(*heads[0])
    return head if head.weight.shape[0] == 1 else Head(*heads[0], better=_better_label(folder, config))


def _better_label(folder: str, config: dict[str, Any]) -> int:
    names = {int(number): str(name).lower() for number, name in (config.get("id2label") or {}).items()}
    names = names or {0: "label_0", 1: "label_1"}
    better = [number for number, name in names.items() if name in BETTER]
    worse = [number for number, name in names.items() if name in WORSE]
    if len(better) == 1 and len(names) == 2:
        return better[0]
    if len(worse) == 1 and len(names) == 2 and not better:
        return 1 - worse[0]
    raise InputError(
        f"two labels, {', '.join(names.values())}, and neither name says which response is better",
        where=Path(folder) / "config.json",
        expected=f"id2label with one of {', '.join(BETTER)}",
        remedy="Name them in id2label",
    )


# --- the chat template --------------------------------------------------------------------------------------


def load_chat(folder: str) -> Chat:
    """The chat of a reward model, with the ending that it was trained for (`reward_model.py --ending`)."""
    chat = loading.load_chat(folder)
    chat.set_ending(folders.read_config(folder).get(scorer.ENDING, "eos"))
    return chat


def scored_end(chat: Chat) -> str:
    """What follows the text of a response that our reward models are trained on (`chat.encode`)."""
    if chat.stop_id is not None:
        return str(chat.tokenizer.convert_ids_to_tokens(chat.stop_id)) + chat.tail
    return f"{chat.stop_text or ''}{chat.tokenizer.eos_token}"


def ending_template(chat: Chat) -> str:
    """The chat template, changed so that a finished conversation ends where `chat.encode` ends.

    Engines that render a conversation again read the same tokens from it as those that append a response's token ids.
    An end token that an engine has left in the response is not written twice. Reasoning is off, and the date fixed.
    """
    template = str(chat.tokenizer.get_chat_template()).removesuffix("\n")
    if "strftime_now" in template:
        template = fix_template_date(template, chat.date)
    if "enable_thinking" in template:
        template = "{% set enable_thinking = false %}" + template
    written, wanted = json.dumps(chat.turn_end), json.dumps(scored_end(chat))
    return (
        # A newline after the tag: the renderer removes the first one, which may be the template's.
        f"{{% set rendered %}}\n{template}{{% endset %}}"
        "{% if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' %}"
        f"{{{{ rendered.removesuffix({written}).removesuffix({wanted}) ~ {wanted} }}}}"
        "{% else %}{{ rendered }}{% endif %}"
    )


# --- faults -------------------------------------------------------------------------------------------------


def begins_with(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text."""
    plain, special = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
    return (
        list(special[: len(special) - len(plain)]) if special[len(special) - len(plain) :] == plain else list(special)
    )


def template_begin(chat: Chat) -> list[int]:
    """The begin-of-sequence token in a list if the chat template writes it, else []."""
    bos = chat.tokenizer.bos_token
    return (
        [chat.tokenizer.bos_token_id] if bos and chat.render([{"role": "user", "content": "x"}]).startswith(bos) else []
    )


def find_faults(folder: str, stored: Any | None = None) -> list[Fault]:
    """What in a reward model's folder makes engines disagree, without running it.

    stored: the tokenizer as the folder has it, before a padding token is chosen; None to read it.
    """
    folder = resolve(folder)
    head, config, chat = read_head(folder), folders.read_config(folder), load_chat(folder)
    stored = stored or loading.load_tokenizer(folder)
    faults = []
    if (end := chat.turn_end) != scored_end(chat):
        faults.append(
            Fault("extra token", f"the template ends a response with {end!r}, scores with {scored_end(chat)!r}")
        )
    if chat.tail:
        faults.append(
            Fault("missing token", f"trained to end with {chat.tail!r}, which engines that append ids leave out")
        )
    if begins_with(stored) != template_begin(chat):
        faults.append(Fault("bos", "the template and the tokenizer do not begin a text with the same token"))
    if stored.pad_token is None:
        faults.append(Fault("pad", "the tokenizer has no padding token; TRL pads with the end-of-text token"))
    elif stored.pad_token_id in (chat.stop_id, stored.eos_token_id) and stored.pad_token in scored_end(chat):
        faults.append(Fault("pad", f"the padding token {stored.pad_token!r} also ends a response"))
    if config.get("pad_token_id") is None and (config.get("text_config") or {}).get("pad_token_id") is None:
        faults.append(Fault("pad_token_id", "config.json does not name the padding token"))
    prefix = str(config.get("value_head_prefix", "score"))
    if head.name != HEAD or prefix != "score":
        faults.append(Fault("head name", f"the head is {head.name!r} (value_head_prefix {prefix!r}), not {HEAD!r}"))
    if head.bias is not None:
        faults.append(Fault("head bias", f"the head has a bias of {', '.join(f'{b:.4g}' for b in head.bias.tolist())}"))
    labels = config.get("id2label")
    if head.better is not None:
        names = (labels or {}).values()
        faults.append(Fault("label order", f"two labels ({', '.join(map(str, names)) or 'unnamed'}), not one score"))
    elif labels is None or len(labels) != 1:
        faults.append(Fault("num_labels", "config.json does not say that there is one label (id2label)"))
    return faults


# --- writing ------------------------------------------------------------------------------------------------


def write_folder(
    source: str, target: str | Path, faults: Sequence[Fault], *, value_head: bool = False, is_temporary: bool = False
) -> None:
    """Write a copy of a reward model's folder that all engines read alike.

    Weights that stay as they are become hard links where the file system has them: they are never written to.

    Args:
        faults: of `find_faults`; of those of the head, the weights are written again.
        value_head: add the head as LLaMA-Factory reads it.
        is_temporary: weights become symbolic links.
    """
    folder, target = Path(resolve(source)), Path(target)
    target.mkdir(parents=True)
    head = read_head(str(folder))
    changed = {fault.cause for fault in faults} & {"head name", "head bias", "label order"}
    for file in sorted(folder.iterdir()):
        is_weights = file.suffix == ".safetensors" and file.name != VALUE_HEAD
        if is_weights and not (changed and file == head.file):
            (os.symlink if is_temporary else _link)(file.resolve(), target / file.name)
        elif file.name == "model.safetensors.index.json":
            text = file.read_text(encoding="utf-8")
            files.write_text(target / file.name, text.replace(json.dumps(head.name), json.dumps(HEAD)))
    if changed:
        _rewrite_head(head, target / head.file.name)
    tokenizer = _write_tokenizer(str(folder), target)
    config = folders.read_config(str(folder))
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": tokenizer.pad_token_id}
    config.pop("value_head_prefix", None)
    config.pop("num_labels", None)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "pad_token_id": tokenizer.pad_token_id}
    files.write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    if value_head:
        _write_value_head(head, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite_head(head: Head, target: Path) -> None:
    """The file that holds the head again, with one score and no bias under the name that engines look for."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(head.file)
    weight = tensors.pop(head.name)
    tensors.pop(f"{head.name.removesuffix('weight')}bias", None)
    tensors[HEAD] = head.score_row()[0][None].to(weight.dtype).contiguous()
    save_file(tensors, target, metadata={"format": "pt"})


def _write_tokenizer(folder: str, target: Path) -> Any:
    """The tokenizer with the template of `ending_template`, a padding token that ends nothing, and no other beginning
    than the template's."""
    chat = load_chat(folder)
    tokenizer = chat.tokenizer
    tokenizer.pad_token = _choose_padding(chat)
    begin = template_begin(chat)
    if begins_with(tokenizer) != begin:
        _set_beginning(tokenizer, begin)
    tokenizer.chat_template = ending_template(chat)
    tokenizer.save_pretrained(target)
    return tokenizer


def _choose_padding(chat: Chat) -> str:
    """The padding token that `load_chat` has chosen, or another control token if that one ends a response.

    Raises InputError if every control token does.
    """
    tokenizer, end = chat.tokenizer, scored_end(chat)
    candidates = [
        tokenizer.pad_token,
        *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
    ]
    for token in candidates:
        if token and token not in end:
            return str(token)
    raise InputError(
        "no control token is left to pad with",
        where=chat.name,
        expected="a token that does not end a response",
        remedy="Add a padding token to the tokenizer",
    )


def _set_beginning(tokenizer: Any, begin: Sequence[int]) -> None:
    """Have the tokenizer itself begin a text with these tokens."""
    from tokenizers import processors

    names = tokenizer.convert_ids_to_tokens(list(begin))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*names, "$A"]), special_tokens=list(zip(names, begin, strict=True))
    )


def _write_value_head(head: Head, target: Path) -> None:
    """The head in the file that LLaMA-Factory reads beside a language model's weights."""
    import torch
    from safetensors.torch import save_file

    weight = head.score_row()[0][None].contiguous()
    tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}
    save_file(tensors, target / VALUE_HEAD, metadata={"format": "pt"})
