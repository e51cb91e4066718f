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
from collections.abc import Mapping, Sequence
from pathlib import Path

from cai.base import cli, paths
from cai.base.errors import CaiError, InputError, shorten
from cai.base.paths import model_path
from cai.models.chat import TEMPLATE_REMEDY, Chat
from cai.models.decoding import slow_warning
from cai.models.local import LocalEngine


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
    model: str,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    endpoints: tuple[str, ...] = (),
):
    """The engine of a folder, a hub id, or `tiny`; the last one loaded is kept in this process. Or a server's.

    Args:
        model: `openai:NAME` is what servers at `endpoints` call NAME (cai/models/servers.py).
        batch_size, batch_tokens: bounds of a batch; see `LocalEngine`.
        device: cpu, cuda, cuda:1, mps; None takes the best there is, of several GPUs each process its own.
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
            remedy="Say what the server calls the model",
        )
    path = check_model(model)
    folder = Path(path)
    key = (path, device, dtype)
    if folder.is_dir():  # written anew since: another model
        key += (folder.resolve(), *sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()))
    if key not in _loaded:
        release_engines()
        _loaded[key] = _load_local(model, path, device, dtype)
    engine = _loaded[key]
    engine.name = model
    engine.set_batches(batch_size, batch_tokens)
    return engine


def release_engines() -> None:
    """Forget the engine kept in this process, so that its memory is free for training."""
    _loaded.clear()


def find_model(model: str) -> str:
    """The folder or hub id that a name stands for, for every option that names a model.

    Raises InputError if it names a folder that does not exist: a path, or no hub id, or a name like `runs/sft` whose
    first part is a folder here, unless the hub's local cache has a model of that name.
    """
    path = paths.model_path(model)
    if model.startswith("openai:") or Path(path).is_dir():
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not Path(path).exists()
    parent = path.rpartition("/")[0]
    if not is_hub_id or (parent and Path(parent).is_dir() and not _is_cached(path)):
        raise InputError("no such model folder", where=path, remedy="Check the path, or give a hub id")
    return path


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)


def check_model(model: str, *, classifier: bool = False) -> str:
    """`find_model`, and what can be checked of a folder without loading anything.

    classifier: a reward model will do as well.
    Raises InputError naming the folder and the remedy.
    """
    path = find_model(model)
    folder = Path(path)
    if not folder.is_dir():
        return path  # of a hub's or a server's files nothing is known here
    names = {f.name for f in folder.iterdir()}
    if not names & {"config.json", "adapter_config.json"}:
        raise InputError(
            "the model folder has no config.json", where=path, remedy="Give a folder written by save_pretrained()"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            "the model folder has no weights in safetensors",
            where=path,
            remedy="Save them with save_pretrained(), which writes model.safetensors",
        )
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json"}:
        raise InputError(
            "the model folder has no tokenizer",
            where=path,
            remedy="Save the model's tokenizer into it: tokenizer.save_pretrained(folder)",
        )
    beside = names & {"chat_template.jinja", "chat_template.json"}
    if not beside and not _json(folder, "tokenizer_config.json").get("chat_template"):
        raise InputError("the model folder has no chat template", where=path, remedy=TEMPLATE_REMEDY)
    kinds = _json(folder, "config.json").get("architectures") or []
    if not classifier and kinds and all("ForSequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"this is a classifier or a reward model ({kinds[0]})", where=path, expected="a causal language model"
        )
    return path


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


def _load_local(name: str, path: str, device: str | None, dtype: str) -> LocalEngine:
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
            path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the model can't be loaded: {shorten(error, 300)}",
            where=name,
            expected="a model folder, or the id of one that the hub or the local cache has",
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them",
            where=name,
            expected="a complete causal language model",
        )
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


def split_endpoint(name: str, endpoints: Sequence[str] = ()) -> tuple[str, tuple[str, ...]]:
    """(model, its servers) of a model's name; `openai:NAME@URL` says its server itself, others take `endpoints`."""
    if not name.startswith("openai:"):
        return name, ()
    model, at, url = name.partition("@http")
    return model, (f"http{url}",) if at else tuple(endpoints)


def load_named_engine(name: str, endpoints: Sequence[str], loading: Mapping):
    """The engine of a model's name, which may say its server."""
    model, servers = split_endpoint(name, endpoints)
    return load_engine(model, endpoints=servers, **loading)


def is_main_process() -> bool:
    """Whether this process is the one that writes (under a launcher: rank 0)."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu(device: str | None) -> bool:
    """Whether training runs on the CPU: asked for, or nothing better is there."""
    import torch

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return forced or device == "cpu" or not torch.accelerator.is_available()


def best_device(device: str | None) -> str:
    """The device asked for, or the best there is."""
    import torch

    return "cpu" if on_cpu(device) else device or torch.accelerator.current_accelerator().type


def choose_device(device: str | None) -> None:
    """Show this process only the GPU it trains on; several GPUs take a launcher, one process each.

    Trainer takes the first visible GPU, or all of them at once by data parallelism, which TRL refuses.
    To be called before anything has touched CUDA. Raises InputError if a GPU is asked for that is not there
    or can no longer be chosen.
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

    auto on a GPU keeps the trained weights in float32, because an AdamW step of 1e-5 is lost in the eight
    bits of a bfloat16 mantissa; a frozen LoRA base is held in bfloat16, its adapters in float32.
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
    from transformers import AutoTokenizer

    folder = check_model(path, classifier=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tokenizer can't be loaded: {shorten(error, 200)}",
            where=path,
            remedy="Check the path; offline, a hub id must be in the local cache",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token", where=path, remedy="Set its eos_token")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _spare_token(tokenizer)
    return Chat(tokenizer, path)


def _spare_token(tokenizer) -> str:
    """A token to pad with that ends no answer, since a reward model reads its score before the padding."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in special if "pad" in token.lower() or "reserved" in token.lower()]
    return next(iter([*spare, *filter(None, [tokenizer.unk_token])]), tokenizer.eos_token)


def load_policy(path: str, device: str | None = None, dtype: str = "auto", *, lora: bool = False, dropout: bool = True):
    """A causal language model to train; the trainer moves it to its device. InputError if there is none.

    dropout: as the model's configuration has it, or none.
    """
    from transformers import AutoModelForCausalLM

    check_model(path)
    config = _config(path, dropout)
    return _load_pretrained(AutoModelForCausalLM, path, config, precision(device, dtype, lora)[0])


def load_reward_model(path: str, device: str | None = None, dtype: str = "auto", *, lora: bool = False):
    """A sequence classifier with one output, one score per sequence, and without dropout.

    From a causal language model's folder the body is taken and the head is new, drawn from torch's global
    generator (seed it first). InputError if the folder holds neither or the head has another width.
    """
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    check_model(path, classifier=True)
    config = _config(path, dropout=False)
    if any("SequenceClassification" in name for name in config.architectures or []) and config.num_labels != 1:
        raise InputError(
            f"a classifier with {config.num_labels} classes",
            where=path,
            expected="one score (num_labels 1)",
            remedy="Use a reward model, or a causal language model",
        )
    config.num_labels = 1
    with suppress_seqcls_warning():
        return _load_pretrained(AutoModelForSequenceClassification, path, config, precision(device, dtype, lora)[0])


def is_classifier(path: str) -> bool:
    """Whether a model is a sequence classifier. Raises InputError if there is no such model."""
    check_model(path, classifier=True)
    return any("SequenceClassification" in name for name in _config(path, dropout=True).architectures or [])


def _config(path: str, dropout: bool):
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error
    if not dropout:  # in the configuration, because attention reads its rate there and is no module of its own
        for name, rate in vars(config).items():
            if "drop" in name and isinstance(rate, float):
                setattr(config, name, 0.0)
    return config


def _load_pretrained(auto_class, path: str, config, dtype: str):
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    release_engines()  # a model kept for generating would take the memory that training needs
    if on_cpu(None):
        keep_freed_memory()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, info = auto_class.from_pretrained(
            model_path(path),
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(path, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them",
            where=path,
            expected="a complete model of its architecture",
        )
    return model


def _not_loaded(path: str, error: Exception) -> InputError:
    return InputError(
        f"the model can't be loaded: {shorten(error, 200)}",
        where=path,
        expected="a model folder, a hub id, or `tiny`",
        remedy="Check the path; offline, a hub id must be in the local cache",
    )


def context_length(model) -> int | None:
    """Tokens that the model's positions reach, None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
