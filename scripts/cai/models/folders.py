"""What a model folder holds, read before anything is loaded: its files, its kind, and what would go wrong with it.

    check_folder("runs/sft")           # InputError naming the folder and the remedy
    adapter_base("runs/lora")          # the model that an adapter belongs to; None for a complete model

Checked are the files, the chat template, the base of an adapter, and the package of a quantised checkpoint. A hub id
is checked as far as its files are in the local cache. Leaves out what takes the tokenizer or the weights
(models/loading.py).
"""

import json
import math
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from cai.base import run_settings
from cai.base.errors import InputError, shorten
from cai.base.paths import ADAPTER_CONFIG, gguf_file, named_base
from cai.models.gguf import TEMPLATE_REMEDY, resolve

# What a model folder must have: any of these files, what they are, and the remedy.
_CONFIG = ({"config.json", ADAPTER_CONFIG}, "config.json", "Give a folder written by save_pretrained()")
_WEIGHTS = (
    {"*.safetensors"},
    "weights in safetensors",
    "Save them with save_pretrained(), which writes model.safetensors",
)
_TOKENIZER = (
    {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json"},
    "tokenizer",
    "Save the model's tokenizer into it: tokenizer.save_pretrained(folder)",
)

LONGEST_HEADER = 100_000_000  # bytes, the format's own limit

# Files of quantised weights that transformers does not read without a quantization_config in config.json.
_FOREIGN_QUANTISATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def find_model(model: str) -> str:
    """The folder or hub id that a name stands for, for every option that names a model (of a GGUF file: `resolve`).

    Raises InputError if it names a folder that does not exist: a path, a name that is not a valid hub id, or a name
    like `runs/sft` whose first part is a folder here, unless the hub's local cache has a model of that name.
    """
    if model.startswith("openai:"):
        return model
    path = resolve(model)
    if Path(path).is_dir():
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not Path(path).exists()
    if is_hub_id and "/" in path and Path(path).parent.is_dir():
        is_hub_id = _cached_file(path, "config.json") is not None
    if not is_hub_id:
        raise InputError("no such model folder", where=path, remedy="Check the path, or give a hub id")
    return path


def check_folder(path: str, *, classifier: bool = False, training: bool = False) -> None:
    """The checks of a model that need no loading; notes a chat template that writes a date (run_settings).

    Args:
        path: of `find_model`.
        classifier: accept a reward model as well.
        training: the model is to be trained, which a quantised one can't be.
    Raises:
        InputError: naming the folder and the remedy.
    """
    folder = local_folder(path)
    if folder is None:
        run_settings.note_dated_template()  # it may write one: the hub's files are not here yet
        return
    if Path(path).is_dir():  # of a hub's model the cache may hold a part
        _check_files(path)
    if not classifier and (kinds := architectures(path)) and all("ForSequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"this is a classifier or a reward model ({kinds[0]})", where=path, expected="a causal language model"
        )
    check_quantisation(path, training=training)
    if "strftime_now" in template_text(path):
        run_settings.note_dated_template()


def _check_files(path: str) -> None:
    """Raise InputError unless the folder, or for an adapter the folder and its base, has the files of a model."""
    names = _file_names(Path(path))
    for expected, problem, remedy in (_CONFIG, _WEIGHTS):
        if not names & expected:
            raise InputError(f"the model folder has no {problem}", where=path, remedy=remedy)
    if adapter_base(path) is not None:
        _check_adapter(path)
    if any(local_folder(part) is None for part in adapter_chain(path)):
        return  # the base of an adapter is on the hub
    expected, problem, remedy = _TOKENIZER
    if not set().union(*map(_file_names, local_folders(path))) & expected:
        raise InputError(f"the model folder has no {problem}", where=path, remedy=remedy)
    if not template_text(path):
        raise InputError("the model folder has no chat template", where=path, remedy=TEMPLATE_REMEDY)


def _file_names(folder: Path) -> set[str]:
    """The names in a folder, and `*` with each suffix."""
    return {name for file in folder.iterdir() for name in (file.name, f"*{file.suffix}")}


# --- where the files are ------------------------------------------------------------------------------------------


def _cached_file(hub_id: str, name: str) -> str | None:
    """The path of a file of the hub in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(hub_id, name)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None


def local_folder(path: str) -> Path | None:
    """The folder of a model: itself, or of a hub id its snapshot in the local cache; None if it is not here."""
    if os.path.isdir(path):
        return Path(path)
    cached = _cached_file(path, "config.json") or _cached_file(path, ADAPTER_CONFIG)
    return Path(cached).parent if cached else None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model folder, {} if there is none. Raises InputError if it is not a JSON object."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=folder / name, remedy="Copy the folder again") from error


def read_config(path: str) -> dict[str, Any]:
    """config.json of a model, for an adapter that of its base; {} if it is not here."""
    folder = local_folder(adapter_chain(path)[-1])
    return read_json(folder, "config.json") if folder else {}


def architectures(path: str) -> list[str]:
    """The classes that a model names, such as LlamaForCausalLM; [] where that is not known."""
    if is_classifier_adapter(path):
        return ["an adapter ForSequenceClassification"]
    return read_config(path).get("architectures") or []


def is_classifier_adapter(path: str) -> bool:
    """Whether a model is an adapter with a classification head, such as a reward model's."""
    folder = local_folder(path)
    return folder is not None and read_json(folder, ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"


def template_text(path: str) -> str:
    """The chat templates of a model, of an adapter without one its base's; "" if there is none."""
    for folder in local_folders(path):
        texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("chat_template.j*"))]
        texts += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("additional_chat_templates/*.jinja"))]
        if template := read_json(folder, "tokenizer_config.json").get("chat_template"):
            texts.append(json.dumps(template))
        if texts:
            return "\n".join(texts)
    return ""


# --- adapters -----------------------------------------------------------------------------------------------------


def adapter_base(path: str) -> str | None:
    """The model that an adapter belongs to, a folder or a hub id (of a GGUF file: `resolve`); None for a complete
    model.

    Raises InputError for an adapter that names none.
    """
    folder = local_folder(path)
    base = named_base(folder) if folder else None
    return resolve(base) if base is not None and gguf_file(base) else base


def adapter_chain(path: str) -> list[str]:
    """A model, and for an adapter its base, which may be an adapter too: the last one has the weights."""
    chain = [path]
    while (base := adapter_base(chain[-1])) is not None:
        if base in chain:
            raise InputError(f"an adapter whose base is itself ({base})", where=path, remedy="Name its base there")
        chain.append(base)
    return chain


def local_folders(path: str) -> list[Path]:
    """The folders of `adapter_chain` that are here."""
    return [folder for part in adapter_chain(path) if (folder := local_folder(part))]


def weights_folder(model: str) -> Path:
    """The folder of a model's weights: of an adapter, its base's, which is what takes the memory."""
    return Path(adapter_chain(resolve(model))[-1])


def count_parameters(model: str) -> int | None:
    """Number of parameters in the safetensors files of a folder or of the hub's cache, from their headers; None where
    there are none, or where one can't be read, which loading explains."""
    folder, total = local_folder(str(weights_folder(model))), 0
    try:
        for file in folder.glob("*.safetensors") if folder else ():
            with file.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(min(length, LONGEST_HEADER)))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return total or None


def tokenizer_folder(path: str) -> str:
    """Where the tokenizer of a model is: the folder or hub id; of an adapter without one, its base."""
    for part in adapter_chain(path):
        folder = local_folder(part)
        if folder is None or _file_names(folder) & _TOKENIZER[0]:
            return part
    return path


def _check_adapter(path: str) -> None:
    """Raise InputError for an adapter whose base is not at hand, or that can't be merged into it."""
    chain = adapter_chain(path)
    base = chain[-1]
    settings = read_json(local_folders(path)[0], ADAPTER_CONFIG)
    kind = str(settings.get("peft_type"))
    if "PROMPT" in kind or kind in ("PREFIX_TUNING", "P_TUNING", "CPT", "CARTRIDGE"):
        raise InputError(
            f"an adapter of {base} that can't be merged into it ({kind} adds virtual tokens)",
            where=path,
            expected="LoRA or another adapter of weights",
            remedy="Serve it, and name it as openai:NAME with --endpoint",
        )
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base)
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if local_folder(base) is None and (not is_hub_id or is_offline):
        raise InputError(
            f"an adapter of {base}, which is not here: merge it first",
            where=path,
            expected="the base as a folder, or in the hub's local cache",
            remedy=f"Put the base where {ADAPTER_CONFIG} names it, or merge the two where it is (peft: "
            "merge_and_unload, then save_pretrained) and give the merged folder",
        )


# --- quantised checkpoints ----------------------------------------------------------------------------------------


def quantisation(path: str) -> dict[str, Any] | None:
    """The quantization_config of a model, for an adapter that of its base; None if it is not quantised."""
    config = read_config(path)
    parts = [config, *(part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict))]
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)


def quantisation_name(settings: dict[str, Any]) -> str:
    """How a checkpoint is quantised, in words: its method, and its bits if they are named."""
    is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else "an unnamed method")
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    return f"{method}, {bits} bits" if bits else str(method)


def check_quantisation(path: str, *, training: bool = False) -> None:
    """Raise InputError for a quantised checkpoint that is to be trained, or that can't be loaded here.

    What loading takes is the library's own knowledge: its check names the package or the device that is missing.
    """
    folder, settings = local_folder(adapter_chain(path)[-1]), quantisation(path)
    if settings is None:
        foreign = [name for name in _FOREIGN_QUANTISATION if folder and (folder / name).is_file()]
        if foreign:
            raise InputError(
                f"a quantised checkpoint that transformers does not read ({foreign[0]} without a quantization_config "
                "in config.json)",
                where=path,
                remedy="Take the unquantised model, or serve this one and use openai:NAME with --endpoint",
            )
        return
    name = quantisation_name(settings)
    if training:
        raise InputError(
            f"a quantised checkpoint ({name}) can't be trained",
            where=path,
            expected="weights in float32, bfloat16 or float16",
            remedy="Take the model that it was quantised from; a quantised one can answer, judge and be measured",
        )
    if reason := quantisation_problem(settings):
        raise InputError(
            f"a quantised checkpoint ({name}) that can't be loaded here: {reason}",
            where=path,
            remedy="Install what is missing, take the unquantised model, or serve it and use openai:NAME",
        )


def quantisation_problem(settings: dict[str, Any]) -> str | None:
    """Why a checkpoint with this quantization_config can't be loaded on this machine, or None."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        if not AutoHfQuantizer.supports_quant_method(dict(settings)):
            return "transformers does not know the method"
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # each method has its own errors for a package, a version or a device
        return shorten(error, 300)
    return None


# --- tokens beyond the embedding ----------------------------------------------------------------------------------


def vocabulary_size(path: str) -> int | None:
    """Rows of the embedding by config.json; None where it does not tell."""
    config = read_config(path)
    parts = [config, *(config.get(name) for name in ("text_config", "llm_config", "language_config"))]
    sizes = [part["vocab_size"] for part in parts if isinstance(part, dict) and isinstance(part.get("vocab_size"), int)]
    return sizes[0] if sizes else None


@cache
def _largest_token_id(folder: Path, _changed: int) -> int:
    """The largest token id that a tokenizer's files list; read again when the file has changed."""
    tokenizer = read_json(folder, "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary or ()) - 1]
    numbers += [token.get("id") for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
    numbers += read_json(folder, "added_tokens.json").values()
    decoder = read_json(folder, "tokenizer_config.json").get("added_tokens_decoder")
    numbers += [int(number) for number in (decoder if isinstance(decoder, dict) else {}) if str(number).isdigit()]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def lists_tokens_beyond(path: str, size: int) -> bool:
    """Whether the files of a model's tokenizer list a token that an embedding of `size` rows does not have.

    Also true where there is no tokenizer.json, which alone lists them all.
    """
    folder = local_folder(tokenizer_folder(path))
    if folder is None or not (folder / "tokenizer.json").is_file():
        return True
    return _largest_token_id(folder, (folder / "tokenizer.json").stat().st_mtime_ns) >= size


def embedding_rows(path: str) -> int | None:
    """Rows of the embedding that an adapter brings along (tokens were added before it was trained), or None."""
    return _adapter_rows(path, r"(embed_tokens|wte|embed_in|word_embeddings|lm_head)\.(base_layer\.)?weight$")


def _adapter_rows(path: str, pattern: str) -> int | None:
    """Rows of the first matrix in an adapter's weights whose name has the pattern, or None."""
    from safetensors import SafetensorError, safe_open

    if adapter_base(path) is None:
        return None
    for file in sorted(folder.glob("adapter*.safetensors")) if (folder := local_folder(path)) else []:
        try:
            with safe_open(str(file), "pt") as weights:
                for name in weights.keys():  # noqa: SIM118, not a dict
                    if "lora_" not in name and re.search(pattern, name):
                        return int(weights.get_slice(name).get_shape()[0])
        except (SafetensorError, OSError):
            continue
    return None


def head_rows(path: str) -> int | None:
    """Rows of the classification head that an adapter brings along, or None."""
    return _adapter_rows(path, r"\.(score|classifier|classification_head)(\.\w+)*\.weight$")
