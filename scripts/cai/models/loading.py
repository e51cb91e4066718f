"""Models from a folder or a hub id: checked, then loaded for text, for training or as a reward model.

    engine = load_engine("tiny")
    policy, chat = load_policy("tiny"), load_chat("tiny")

Remote code is never run, and only safetensors weights are read. Weights are trained in float32 on a CPU; on a GPU the
forward pass runs in bfloat16 over float32 weights (`precision`). Leaves out quantised loading.
"""

import ctypes
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.base.paths import model_path
from cai.models.chat import TEMPLATE_REMEDY, Chat
from cai.models.decoding import slow_warning
from cai.models.engine import Engine
from cai.models.local import LocalEngine


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system with every large tensor.

    The tensors of a forward pass are megabytes each. To map, clear and unmap their pages again and again takes up to a
    third of the time on a CPU. Has no effect without glibc, and respects the environment's settings
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3), whose maximum is 1 << 25.
    for variable, option, size in (("MALLOC_TRIM_THRESHOLD_", -1, 1 << 30), ("MALLOC_MMAP_THRESHOLD_", -3, 1 << 25)):
        if variable not in os.environ:
            ctypes.CDLL(None).mallopt(option, size)


_loaded: dict[tuple[Any, ...], LocalEngine] = {}


def load_engine(
    model: str,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    endpoints: Sequence[str] = (),
) -> Engine:
    """The engine of a folder, a hub id, or `tiny`; this process keeps the last one that it loaded. Or a server's.

    Args:
        model: `openai:NAME` is the model NAME of the servers at `endpoints` (servers.py).
        batch_size, batch_tokens: bounds of a batch; see `LocalEngine`.
        device: cpu, cuda, cuda:1, mps; None: the best one, and of several GPUs one per process.
        dtype: float32, bfloat16, float16, or auto (bfloat16 on CUDA, float32 elsewhere).
    Raises:
        InputError: no such model, or it lacks config, weights, tokenizer or chat template.
    """
    if model.startswith("openai:"):
        from cai.models.servers import load_server

        return load_server(model, endpoints=endpoints, batch_size=batch_size)
    if endpoints:
        raise InputError(
            f"an endpoint with the local model {model}",
            where="--endpoint",
            expected="--model openai:NAME",
            remedy="Name the model as the server calls it",
        )
    path = check_model(model)
    folder = Path(path)
    key: tuple[Any, ...] = (path, device, dtype)
    if folder.is_dir():  # files that were written again are another model
        key += (folder.resolve(), *sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()))
    if key not in _loaded:
        release_engines()
        _loaded[key] = _load_local(model, device, dtype)
    engine = _loaded[key]
    engine.name = model
    engine.set_batches(batch_size, batch_tokens)
    return engine


def release_engines() -> None:
    """Forget the engine kept in this process, so that its memory is free for training."""
    _loaded.clear()


def find_model(model: str) -> str:
    """The folder or hub id that a name stands for, for every option that names a model.

    Raises InputError if it names a folder that does not exist: a path, a name that is not a valid hub id, or a name
    like `runs/sft` whose first part is a folder here, unless the hub's local cache has a model of that name.
    """
    path = str(model_path(model))
    if model.startswith("openai:") or Path(path).is_dir():
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not Path(path).exists()
    if is_hub_id and "/" in path and Path(path).parent.is_dir():
        from huggingface_hub import try_to_load_from_cache

        is_hub_id = isinstance(try_to_load_from_cache(path, "config.json"), str)
    if not is_hub_id:
        raise InputError("no such model folder", where=path, remedy="Check the path, or give a hub id")
    return path


def check_model(model: str, *, classifier: bool = False) -> str:
    """`find_model`, and the checks of a folder that need no loading.

    classifier: accept a reward model as well.
    Raises InputError naming the folder and the remedy.
    """
    path = find_model(model)
    folder = Path(path)
    if not folder.is_dir():
        return path  # the files of a hub or a server are not here
    names = {name for file in folder.iterdir() for name in (file.name, f"*{file.suffix}")}
    for expected, problem, remedy in _FILES:
        if not names & expected:
            raise InputError(f"the model folder has no {problem}", where=path, remedy=remedy)
    has_template = names & {"chat_template.jinja", "chat_template.json"}
    if not has_template and not _read_json(folder, "tokenizer_config.json").get("chat_template"):
        raise InputError("the model folder has no chat template", where=path, remedy=TEMPLATE_REMEDY)
    kinds = _read_json(folder, "config.json").get("architectures") or []
    if not classifier and kinds and all("ForSequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"this is a classifier or a reward model ({kinds[0]})", where=path, expected="a causal language model"
        )
    return path


# What a model folder must have: any of these files, what they are, and the remedy.
_FILES = (
    ({"config.json", "adapter_config.json"}, "config.json", "Give a folder written by save_pretrained()"),
    ({"*.safetensors"}, "weights in safetensors", "Save them with save_pretrained(), which writes model.safetensors"),
    (
        {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json"},
        "tokenizer",
        "Save the model's tokenizer into it: tokenizer.save_pretrained(folder)",
    ),
)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model folder, {} if there is none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=folder / name, remedy="Copy the folder again") from error


@contextmanager
def _explain_errors(name: str, part: str = "model") -> Iterator[None]:
    """Turn what transformers raises for a model that can't be loaded into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the {part} can't be loaded: {shorten(error, 300)}",
            where=name,
            expected="a model folder, a hub id, or `tiny`",
            remedy="Check the path; offline, a hub id must be in the local cache",
        ) from error


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    with _explain_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False)


def load_weights(auto_class: Any, name: str, dtype: str, **arguments: Any) -> Any:
    """A model on the CPU, from complete safetensors weights.

    Args:
        auto_class: one of transformers' Auto classes. arguments: for its `from_pretrained`.
    Raises:
        InputError: no such model, or weights that lack a tensor.
    """
    import torch
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _explain_errors(name):
        model, info = auto_class.from_pretrained(
            model_path(name),
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them",
            where=name,
            expected="a complete model of its architecture",
        )
    return model


def _load_local(name: str, device: str | None, dtype: str) -> LocalEngine:
    import torch
    from transformers import AutoModelForCausalLM

    device = device or best_device(None)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(name)
    model = load_weights(AutoModelForCausalLM, name, inference_dtype(device, dtype))
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise CaiError(f"{name} does not fit the memory of {device}") from error
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise InputError(f"{device!r} can't be used: {shorten(error)}", where="--device") from error
    engine = LocalEngine(name, model, tokenizer)
    if engine.slow_reason:
        cli.warn(slow_warning(name, engine.slow_reason))
    return engine


def inference_dtype(device: str, dtype: str) -> str:
    """The dtype of weights that are not trained: auto is bfloat16 on CUDA, float32 elsewhere."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


def split_endpoint(name: str, endpoints: Sequence[str] = ()) -> tuple[str, tuple[str, ...]]:
    """(model, its servers) of a model's name. `openai:NAME@URL` names its own server, others take `endpoints`."""
    if not name.startswith("openai:"):
        return name, ()
    model, at, url = name.partition("@http")
    return model, (f"http{url}",) if at else tuple(endpoints)


def load_named_engine(name: str, endpoints: Sequence[str], loading: Mapping[str, Any]) -> Engine:
    """The engine of a model's name, which may include its server."""
    model, servers = split_endpoint(name, endpoints)
    return load_engine(model, endpoints=servers, **loading)


def is_main_process() -> bool:
    """Whether this process is the one that writes (under a launcher: rank 0)."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu(device: str | None) -> bool:
    """Whether training runs on the CPU: by choice, or because there is no accelerator."""
    import torch

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return forced or device == "cpu" or not torch.accelerator.is_available()


def best_device(device: str | None) -> str:
    """The device of the caller, or the best one of this machine."""
    import torch

    return "cpu" if on_cpu(device) else device or str(torch.accelerator.current_accelerator().type)


def choose_device(device: str | None) -> None:
    """Make only one GPU visible to this process; several GPUs need a launcher, one process each.

    Trainer takes the first visible GPU, or all of them at once by data parallelism, which TRL refuses. Call this
    before anything uses CUDA. Raises InputError if the GPU does not exist or can no longer be chosen.
    """
    import torch

    if device not in (None, "cpu", "mps") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise InputError(f"unknown device: {device!r}", where="--device", expected="cpu, cuda, cuda:1 or mps")
    count = torch.cuda.device_count()
    index = int((device or "").partition(":")[2] or 0)
    if device and device.startswith("cuda") and index >= count:
        raise InputError(
            f"no such device: {device}", where="--device", remedy=f"PyTorch sees {count} CUDA devices here"
        )
    if device in ("cpu", "mps") or "LOCAL_RANK" in os.environ or count <= 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = visible[index] if len(visible) > index and visible[0] else str(index)
    if torch.cuda.is_initialized():
        raise InputError(
            f"{count} GPUs are visible and CUDA is already in use in this process",
            where="--device",
            remedy=f"Set CUDA_VISIBLE_DEVICES={chosen} before the start, or use `accelerate launch`",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen


def precision(device: str | None, dtype: str, lora: bool = False) -> tuple[str, str | None]:
    """(dtype of the weights, dtype of the autocast forward pass or None).

    auto on a GPU keeps the trained weights in float32, because the eight bits of a bfloat16 mantissa lose an AdamW
    step of 1e-5. A frozen LoRA base is held in bfloat16, its adapters in float32.
    """
    if dtype == "auto":
        if on_cpu(device):
            return "float32", None
        return ("bfloat16" if lora else "float32"), "bfloat16"
    if dtype == "float16":
        if on_cpu(device):
            raise InputError("float16 does not train on a CPU", where="--dtype", remedy="Leave it at auto")
        return "float32", "float16"
    return dtype, None if dtype == "float32" else dtype


def load_chat(path: str) -> Chat:
    """A model's tokenizer, padding on the right, with its chat template.

    Raises InputError if the folder has none, or one without a chat template or an end-of-text token.
    """
    check_model(path, classifier=True)
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token", where=path, remedy="Set its eos_token")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _spare_token(tokenizer)
    return Chat(tokenizer, path)


def _spare_token(tokenizer: Any) -> str:
    """A token to pad with that does not end an answer: a reward model reads its score before the padding."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in special if "pad" in token.lower() or "reserved" in token.lower()]
    return str([*spare, *filter(None, [tokenizer.unk_token, tokenizer.eos_token])][0])


def load_policy(
    path: str, device: str | None = None, dtype: str = "auto", *, lora: bool = False, dropout: bool = True
) -> Any:
    """A causal language model to train; the trainer moves it to its device. InputError if there is none.

    dropout: as the model's configuration has it, or none.
    """
    from transformers import AutoModelForCausalLM

    check_model(path)
    return _load_trainable(AutoModelForCausalLM, path, _config(path, dropout), precision(device, dtype, lora)[0])


def load_reward_model(path: str, device: str | None = None, dtype: str = "auto", *, lora: bool = False) -> Any:
    """A sequence classifier with one output, one score per sequence, and without dropout.

    A causal language model's folder gives the body only: the head is new, drawn from torch's global generator (seed it
    first). InputError if the folder holds neither or the head has another width.
    """
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    config = _config(path, dropout=False)
    if is_classifier(path) and config.num_labels != 1:
        raise InputError(
            f"a classifier with {config.num_labels} classes",
            where=path,
            expected="one score (num_labels 1)",
            remedy="Use a reward model, or a causal language model",
        )
    config.num_labels = 1
    with suppress_seqcls_warning():
        weights_dtype, _ = precision(device, dtype, lora)
        return _load_trainable(AutoModelForSequenceClassification, path, config, weights_dtype)


def is_classifier(path: str) -> bool:
    """Whether a model is a sequence classifier. Raises InputError if there is no such model."""
    return any("SequenceClassification" in name for name in _config(path).architectures or [])


def _config(path: str, dropout: bool = True) -> Any:
    from transformers import AutoConfig

    check_model(path, classifier=True)
    with _explain_errors(path):
        config = AutoConfig.from_pretrained(model_path(path), trust_remote_code=False)
    if not dropout:  # in the configuration, because attention reads its rate there and is no module of its own
        for name, rate in vars(config).items():
            if "drop" in name and isinstance(rate, float):
                setattr(config, name, 0.0)
    return config


def _load_trainable(auto_class: Any, path: str, config: Any, dtype: str) -> Any:
    release_engines()  # training needs the memory of a model that was kept for generating
    if on_cpu(None):
        keep_freed_memory()
    return load_weights(auto_class, path, dtype, config=config)
