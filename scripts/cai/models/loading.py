"""Models from a folder, a GGUF file or a hub id: checked, then loaded for text, for training or as a reward model.

    engine = load_engine("tiny")
    policy, chat = load_policy("tiny"), load_chat("tiny")

Remote code is never run, and only safetensors weights are read. An adapter is merged into its base in memory. Weights
are trained in float32 on a CPU; on a GPU the forward pass runs in bfloat16 over float32 weights (`precision`). Leaves
out training quantised weights.
"""

import ctypes
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cai.base import cli, engine_options
from cai.base.errors import CaiError, InputError, shorten
from cai.base.paths import gguf_file
from cai.models import attention, folders, managed, packing
from cai.models.chat import Chat, check_embedding
from cai.models.decoding import config_context, slow_warning
from cai.models.decoding import context_length as context_length  # for the callers of this module
from cai.models.engine import Engine
from cai.models.folders import find_model as find_model  # for the callers of this module
from cai.models.gguf import resolve
from cai.models.local import LocalEngine, auto_dtype


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
    in_process: bool = False,
) -> Engine:
    """The engine of a folder, a hub id, or `tiny`; this process keeps the last one that it loaded. Or a server's.

    With `--engine` the model is served by that engine, which is started now (managed.py).

    Args:
        model: `openai:NAME` is the model NAME of the servers at `endpoints` (servers.py).
        batch_size, batch_tokens: bounds of a batch; see `LocalEngine`.
        device: cpu, cuda, cuda:1, mps; None: the best one, and of several GPUs one per process.
        dtype: float32, bfloat16, float16, or auto (`local.auto_dtype`).
        in_process: a `LocalEngine` in any case, for what needs the model itself.
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
    key: tuple[Any, ...] = (path, device, dtype)
    for folder in map(Path, filter(os.path.isdir, folders.adapter_chain(path))):
        # Files that were written again are another model.
        key += (folder.resolve(), *sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()))
    choice = None if in_process else engine_options.engine_choice()
    if choice:
        _loaded.clear()
        bounds = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        return managed.serve(model, choice, key=key, device=device, dtype=dtype, **bounds)
    if key not in _loaded:
        release_engines()
        _loaded[key] = _load_local(model, device, dtype)
    engine = _loaded[key]
    engine.name = model
    engine.chat.adopt_run_settings()
    engine.set_batches(batch_size, batch_tokens)
    return engine


def release_engines() -> None:
    """Forget the engine kept in this process, and stop one that it has started: their memory is free for training."""
    _loaded.clear()
    managed.stop_engines()


def check_model(model: str, *, classifier: bool = False, training: bool = False) -> str:
    """`find_model`, and what can be checked without loading weights: `folders.check_folder`, and that the embedding
    has every token.

    Args:
        classifier: accept a reward model as well.
        training: the model is to be trained, which a quantised one can't be.
    Raises:
        InputError: naming the folder and the remedy.
    """
    path = find_model(model)
    if model.startswith("openai:"):
        return path  # the files of a server are not here
    folders.check_folder(path, classifier=classifier, training=training)
    size = folders.vocabulary_size(path)
    if folders.local_folder(path) is None or size is None or not folders.lists_tokens_beyond(path, size):
        return path
    tokenizer = load_tokenizer(path)
    if getattr(tokenizer, "chat_template", None):
        check_embedding(Chat(tokenizer, path), folders.embedding_rows(path) or size)
    return path


@contextmanager
def _explain_errors(name: str, part: str = "model") -> Iterator[None]:
    """Turn what transformers raises for a model that can't be loaded into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search("size mismatch|mismatched|quantiz", str(error)):
            raise  # of the machine, not of the files
        raise InputError(
            f"the {part} can't be loaded: {shorten(error, 300)}",
            where=name,
            expected="a model folder, a hub id, or `tiny`",
            remedy="Check the path; offline, a hub id must be in the local cache",
        ) from error


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    path = resolve(name)
    with _explain_errors(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folders.tokenizer_folder(path), trust_remote_code=False)
    base = folders.adapter_base(path)
    if base is not None and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = load_tokenizer(base).chat_template
    return tokenizer


def load_weights(auto_class: Any, name: str, dtype: str, *, new_head: bool = False, **arguments: Any) -> Any:
    """A model on the CPU, from complete safetensors weights; an adapter is merged into its base.

    Args:
        auto_class: one of transformers' Auto classes. arguments: for its `from_pretrained`.
        new_head: what the class puts on top of the model's body may be missing and is then drawn at random.
    Raises:
        InputError: no such model, or weights that lack a tensor.
    """
    import torch
    from transformers.utils import logging

    path = resolve(name)
    if (base := folders.adapter_base(path)) is not None:
        body = load_weights(auto_class, base, dtype, new_head=new_head, **arguments)
        return _merge_adapter(body, path)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _explain_errors(name), quiet_report() if new_head else nullcontext(), _load_whole():
        model, info = auto_class.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not new_head or key.startswith(body))
    if missing:
        raise InputError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them",
            where=name,
            expected="a complete model of its architecture",
        )
    if (file := gguf_file(name)) is not None:
        # What an adapter names as its base: a cache may be cleared, and a package is elsewhere on another machine.
        model.name_or_path = name if name == "smollm2" else str(file.resolve())
    return model


@contextmanager
def _load_whole() -> Iterator[None]:
    """Load whole weights also where DeepSpeed's ZeRO-3 is configured already: transformers would shard them at once.

    The trainer shards the models that it trains. A reward model, a judge, and an adapter that the first process merges
    alone have no trainer, and their shards would be of no use.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


@contextmanager
def quiet_report() -> Iterator[None]:
    """Without transformers' report of missing and unused weights, which a new head is expected to cause."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _silence_old_name() -> None:
    """Silence the deprecation warning of `is_gradient_checkpointing`, a name that peft and TRL still use."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _merge_adapter(model: Any, path: str) -> Any:
    """The base with an adapter merged into its weights. It is named after the adapter: an adapter trained on top of it
    belongs to both.

    Args:
        model: the base of the adapter.
        path: of the adapter.
    Raises:
        InputError: the adapter does not fit the base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    folder, rows = str(folders.local_folder(path)), folders.embedding_rows(path)
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            _silence_old_name()
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (UserWarning, KeyError, AttributeError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(
            f"the adapter can't be merged into {folders.adapter_base(path)}: {shorten(error, 300)}",
            where=path,
            expected="an adapter that was trained on this base",
            remedy="Check base_model_name_or_path in its adapter_config.json",
        ) from error
    merged.name_or_path = merged.config._name_or_path = path
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # peft froze the base
    return merged


def _load_local(name: str, device: str | None, dtype: str) -> LocalEngine:
    import torch
    from transformers import AutoModelForCausalLM

    device = device or best_device(None)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(name)
    is_quantised = folders.quantisation(resolve(name)) is not None
    placement: dict[str, Any] = {"device_map": {"": device}} if is_quantised and device != "cpu" else {}
    model = load_weights(AutoModelForCausalLM, name, inference_dtype(device, dtype, name), **placement)
    check_embedding(Chat(tokenizer, name), model.get_input_embeddings().weight.shape[0])
    try:
        model = (model if placement else model.to(device)).eval()
    except torch.OutOfMemoryError as error:
        raise CaiError(f"{name} does not fit the memory of {device}") from error
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise InputError(f"{device!r} can't be used: {shorten(error)}", where="--device") from error
    if attention.suits(model):
        attention.use(model)
    if packing.suits(model):
        packing.pack(model)
    engine = LocalEngine(name, model, tokenizer)
    if engine.slow_reason:
        cli.warn(slow_warning(name, engine.slow_reason))
    return engine


def inference_dtype(device: str, dtype: str, model: str) -> str:
    """The dtype of a model's weights that are not trained: auto is `auto_dtype`."""
    return auto_dtype(device, folders.count_parameters(model)) if dtype == "auto" else dtype


def split_endpoint(name: str, endpoints: Sequence[str] = ()) -> tuple[str, tuple[str, ...]]:
    """(model, its servers) of a model's name. `openai:NAME@URL` names its own server, others take `endpoints`."""
    if not name.startswith("openai:"):
        return name, ()
    model, at, url = name.partition("@http")
    return model, (f"http{url}",) if at else tuple(endpoints)


def check_sampling(engine: Engine, temperature: float) -> None:
    """Test whether a server stands a seed, where texts are to be sampled; before anything is written.

    Raises InputError if the server dies on it.
    """
    check_seeds = getattr(engine, "check_seeds", None)  # engines on this machine have none
    if temperature > 0 and check_seeds:
        check_seeds()


def load_named_engine(
    name: str,
    endpoints: Sequence[str],
    loading: Mapping[str, Any],
    temperature: float = 0.0,
    *,
    in_process: bool = False,
) -> Engine:
    """The engine of a model's name, which may include its server.

    Args:
        temperature: of the texts that will be sampled; see `check_sampling`.
        in_process: as for `load_engine`.
    """
    model, servers = split_endpoint(name, endpoints)
    engine = load_engine(model, endpoints=servers, in_process=in_process, **loading)
    check_sampling(engine, temperature)
    return engine


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


def device_memory(device: str | None) -> int | None:
    """Bytes of memory of the GPU that this process trains on; None on a CPU, or where it is not known."""
    import torch

    if on_cpu(device) or not torch.cuda.is_available():
        return None
    # `choose_device` leaves one GPU visible, a launcher one per process.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return int(torch.cuda.get_device_properties(index).total_memory)


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
    if device in (None, "cuda"):
        managed.keep_gpus(visible if visible[0] else map(str, range(count)))
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen


def precision(
    device: str | None, dtype: str, lora: bool = False, parameters: int | None = None
) -> tuple[str, str | None]:
    """(dtype of the weights, dtype of the autocast forward pass or None).

    auto on a CPU is float32, with a forward pass in bfloat16 where `auto_dtype` takes it for so many `parameters`. On a
    GPU it keeps the trained weights in float32, because the eight bits of a bfloat16 mantissa lose an AdamW
    step of 1e-5. A frozen LoRA base is held in bfloat16, its adapters in float32.
    """
    if dtype == "auto":
        if on_cpu(device):
            return "float32", "bfloat16" if auto_dtype("cpu", parameters) == "bfloat16" else None
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
    size = _config(path).get_text_config().vocab_size
    size = folders.embedding_rows(resolve(path)) or size
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = _spare_token(tokenizer, size)
    chat = Chat(tokenizer, path)
    check_embedding(chat, size)
    return chat


def _spare_token(tokenizer: Any, size: int) -> str:
    """A token to pad with that does not end an answer: a reward model reads its score before the padding.

    size: rows of the embedding, beyond which no token can be taken.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = [token.content for number, token in added if token.special and number < size]
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
    load = partial(load_weights, AutoModelForCausalLM)
    return _load_trainable(load, path, _config(path, dropout), precision(device, dtype, lora)[0])


def load_reward_model(path: str, device: str | None = None, dtype: str = "auto", *, lora: bool = False) -> Any:
    """A sequence classifier with one output, one score per sequence, and without dropout.

    A causal language model's folder gives the body only: the head is new, drawn from torch's global generator (seed it
    first). InputError if the folder holds neither, the head has another width, or the architecture has no head.
    """
    config = _config(path, dropout=False)
    is_trained = is_classifier(path)
    labels = folders.head_rows(resolve(path)) or config.num_labels
    if is_trained and labels != 1:
        raise InputError(
            f"a classifier with {labels} classes",
            where=path,
            expected="one score (num_labels 1)",
            remedy="Use a reward model, or a causal language model",
        )
    return _load_trainable(_load_scorer, path, config, precision(device, dtype, lora)[0])


def _load_scorer(path: str, dtype: str, config: Any) -> Any:
    """The weights of a sequence classifier with one output: a reward model's, or a language model's under a new head.

    config: of the model, of an adapter that of its base.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config.num_labels = 1
    base = folders.adapter_base(resolve(path))
    if base is None:
        new_head = not is_classifier(path)
        return load_weights(AutoModelForSequenceClassification, path, dtype, new_head=new_head, config=config)
    if folders.is_classifier_adapter(resolve(path)):
        if folders.head_rows(resolve(path)) is None and not is_classifier(base):
            raise InputError(
                f"an adapter of {base} with no head for scores in it",
                where=path,
                expected="the head among its weights (modules_to_save)",
                remedy="Train a reward model with reward_model.py",
            )
        return _merge_adapter(_load_scorer(base, dtype, config), path)
    language_model = load_weights(AutoModelForCausalLM, path, dtype, config=_config(path, dropout=False))
    with _load_whole():
        model = AutoModelForSequenceClassification.from_config(config, dtype=language_model.dtype)
    body = getattr(language_model, language_model.base_model_prefix)
    getattr(model, model.base_model_prefix).load_state_dict(body.state_dict())
    model.name_or_path = model.config._name_or_path = path
    return model


def load_merged(path: Path, dtype: Any) -> Any:
    """An adapter that was just trained, merged into its base, on the CPU.

    Args:
        path: of the adapter, without a tokenizer.
        dtype: of torch.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(dtype).removeprefix("torch.")
    if not folders.is_classifier_adapter(str(path)):
        return load_weights(AutoModelForCausalLM, str(path), name)
    config = AutoConfig.from_pretrained(folders.adapter_chain(str(path))[-1], trust_remote_code=False)
    return _load_scorer(str(path), name, config)


def check_can_score(path: str) -> None:
    """`check_model` of a model that a reward model is trained from.

    Raises InputError unless transformers has a sequence classifier of its architecture.
    """
    from transformers import AutoModelForSequenceClassification

    check_model(path, classifier=True, training=True)
    config = _config(path)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InputError(
            f"transformers has no sequence classifier of the kind {config.model_type}",
            where=path,
            expected="an architecture with a classification head, such as Llama, Qwen, Gemma, Mistral, GPT-2, OPT",
            remedy="Train the reward model from another model with the same tokenizer, or use dpo.py, which needs none",
        )


def is_classifier(path: str) -> bool:
    """Whether a model is a sequence classifier. Raises InputError if there is no such model."""
    check_model(path, classifier=True)
    kinds = folders.architectures(resolve(path)) or _config(path).architectures or []
    return any("SequenceClassification" in kind for kind in kinds)


def _config(path: str, dropout: bool = True) -> Any:
    from transformers import AutoConfig

    check_model(path, classifier=True)
    with _explain_errors(path):
        base = folders.adapter_chain(resolve(path))[-1]
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if not dropout:  # in the configuration, because attention reads its rate there and is no module of its own
        for name, rate in vars(config).items():
            if "drop" in name and isinstance(rate, float):
                setattr(config, name, 0.0)
    return config


def read_context(path: str) -> int | None:
    """Tokens that a model's positions reach, by its configuration; None where it has no limit."""
    return config_context(_config(path))


def read_blocks(path: str) -> int:
    """How many blocks a model has, by its configuration."""
    return int(_config(path).get_text_config().num_hidden_layers)


def _load_trainable(load: Callable[..., Any], path: str, config: Any, dtype: str) -> Any:
    """`load` of (path, dtype, config), with the memory for training made free."""
    release_engines()  # training needs the memory of a model that was kept for generating
    if on_cpu(None):
        keep_freed_memory()
    _silence_old_name()
    # Of an adapter on a GGUF file, whose vocabulary is indeed not modified.
    warnings.filterwarnings("ignore", message="Could not find a config file in (smollm2|.*gguf) ", category=UserWarning)
    return load(path, dtype, config=config)
