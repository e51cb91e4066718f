"""What doctor.py checks: Python, packages, devices, places to write, the hub, endpoints, and a model.

    findings = Findings()
    check_packages(findings, "openai", "gguf")
    for problem, remedy in zip(findings.problems, findings.remedies): ...

Each check returns its part of the report and adds its problems to `Findings`. It imports what it needs itself, since
any package but click may be missing. Leaves out speed, and models on a hub that are not in the local cache.
"""

import json
import operator
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.base.paths import ROOT, gguf_file

LOW_DISK_GB = 5

_Report = dict[str, Any]


@dataclass
class Findings:
    """Problems, each with the remedy at the same index, and notes on what is not a problem yet."""

    problems: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, problem: str, remedy: str) -> None:
        self.problems.append(problem)
        self.remedies.append(remedy)

    def note(self, note: str) -> None:
        self.notes.append(note)


# --- Python and packages ------------------------------------------------------------------------------------


def _project() -> _Report:
    project: _Report = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def check_python(findings: Findings) -> _Report:
    """The running version against `requires-python`."""
    version, wanted = ".".join(map(str, sys.version_info[:3])), _project()["requires-python"]
    if not is_within(version, wanted):
        findings.problem(
            f"Python {version}, and {wanted} is needed", "Make the virtual environment with a newer Python"
        )
    return {
        "version": version,
        "wanted": wanted,
        "executable": sys.executable,
        "virtual_environment": sys.prefix != sys.base_prefix,
    }


def list_extras(model: str | None, endpoints: Sequence[str]) -> list[str]:
    """The extras of pyproject.toml that a model and its servers take."""
    is_gguf = False
    if model and not model.startswith("openai:"):
        with suppress(InputError):  # several files: the check of the model reports it
            is_gguf = gguf_file(model) is not None
    return [*(["openai"] if endpoints else []), *(["gguf"] if is_gguf else [])]


def check_packages(findings: Findings, *extras: str) -> _Report:
    """Each dependency, and those of some extras: the version installed and the bounds of pyproject.toml.

    Nothing is imported.
    """
    packages, project = {}, _project()
    for requirement in [
        *project["dependencies"],
        *(need for extra in extras for need in project["optional-dependencies"][extra]),
    ]:
        name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        bounds = requirement.removeprefix(name)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
            findings.problem(f"{name} is not installed", f'pip install "{requirement}"')
        if version and not is_within(version, bounds):
            findings.problem(f"{name} {version}, and {bounds} is needed", f'pip install "{requirement}"')
        packages[name] = {"version": version, "wanted": bounds}
    return packages


def is_within(version: str, bounds: str) -> bool:
    """Whether a version meets bounds such as `>=2.8,<2.14`.

    The numbers alone are compared, so that a build of the maker's own (2.9.0+cpu) counts as its version. Our own
    code, because the package for it may be the one that is missing.
    """

    def numbers(text: str) -> list[int]:
        digits = re.match(r"\d+(?:\.\d+)*", text)[0]  # type: ignore[index]
        return [int(part) for part in re.sub(r"(\.0+)+$", "", digits).split(".")]  # 5.0 is 5

    compare = {
        ">=": operator.ge,
        "<=": operator.le,
        "==": operator.eq,
        "!=": operator.ne,
        ">": operator.gt,
        "<": operator.lt,
    }
    parts = re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", bounds)
    return all(compare[sign](numbers(version), numbers(bound)) for sign, bound in parts)


# --- devices ------------------------------------------------------------------------------------------------


def check_devices(findings: Findings, requested: str | None) -> _Report:
    """CPU and accelerators with their memory in GB (10⁹ bytes), and whether they compute in bfloat16."""
    total, free = available_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu: _Report = {"cores": cores, "memory_gb": total, "free_gb": free}
    accelerators: list[_Report] = []
    try:
        import torch
    except Exception as error:  # a broken build fails with any error, OSError for a missing library first of all
        remedy = "Install it: pip install --force-reinstall torch"
        findings.problem(f"torch can't be imported: {shorten(error)}", remedy)
        return {"cpu": cpu, "accelerators": accelerators}
    cpu["bf16"] = True  # torch computes it on any CPU, slowly where there are no instructions for it
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        accelerators.append(
            {
                "name": f"cuda:{index}",
                "kind": torch.cuda.get_device_name(index),
                "memory_gb": round(total_bytes / 1e9, 1),
                "free_gb": round(free_bytes / 1e9, 1),
                "bf16": torch.cuda.get_device_capability(index) >= (8, 0),
            }
        )
    if torch.backends.mps.is_available():
        accelerators.append({"name": "mps", "kind": "Apple GPU", "memory_gb": total, "free_gb": free, "bf16": True})
    for device in accelerators:
        if not device["bf16"]:
            findings.note(f"{device['name']} ({device['kind']}) has no bfloat16: use --dtype float16 or float32")
    names = ["cpu", *(device["name"] for device in accelerators)]
    if requested and requested not in [*names, *(name.partition(":")[0] for name in names)]:
        findings.problem(
            f"no device {requested}",
            f"Choose one of {', '.join(names)}; if a GPU is missing, look at "
            "nvidia-smi, CUDA_VISIBLE_DEVICES, and whether torch was installed for the CPU alone",
        )
    if not accelerators:
        findings.note("no GPU: `tiny` runs on the CPU; for models of billions of parameters use a GPU or an endpoint")
    return {"cpu": cpu, "accelerators": accelerators}


def available_memory() -> tuple[float | None, float | None]:
    """(total, available) memory in GB that this process may use; None where the system does not tell."""
    try:
        import psutil
    except ImportError:
        return None, None
    total, free = psutil.virtual_memory()[:2]
    for file in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        limit = file.read_text().strip() if file.is_file() else ""
        if limit.isdigit():  # a container has less than its machine
            total, free = min(total, int(limit)), min(free, int(limit))
    return round(total / 1e9, 1), round(free / 1e9, 1)


# --- places to write ----------------------------------------------------------------------------------------


def check_places(findings: Findings, output: str) -> _Report:
    """Free space, and whether a file can be written: the output's folder, the hub's cache, temporary files."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    places = {
        "output": (output, "Name another --output"),
        "hub_cache": (os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"), "Set HF_HOME to a folder of yours"),
        "temporary": (tempfile.gettempdir(), "Set TMPDIR to a folder of yours"),
    }
    report = {}
    for name, (path, remedy) in places.items():
        absolute = Path(path).absolute()
        folder = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
        writable = True
        try:
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is a file")
            tempfile.NamedTemporaryFile(dir=folder).close()
        except OSError as error:
            writable = False
            findings.problem(f"cannot write to {path}: {error.strerror or error}", remedy)
        free = round(shutil.disk_usage(folder).free / 1e9, 1)
        if free < LOW_DISK_GB:
            findings.note(f"{free} GB free at {path}: a checkpoint of 7B parameters takes about 15")
        report[name] = {"path": str(path), "writable": writable, "free_gb": free}
    return report


# --- the hub and endpoints ----------------------------------------------------------------------------------


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the host that was named: redirects are not followed."""

    def redirect_request(self, *_: object) -> None:
        return None


def fetch(url: str, timeout: float, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """(status, the first 100 kB) of a GET, after `timeout` seconds at most in all.

    In a thread that is not waited for: a server that sends a byte now and then would outlast any timeout of a socket.
    Raises OSError.
    """
    answers: list[tuple[int, bytes] | Exception] = []

    def get() -> None:
        request = urllib.request.Request(url, headers=headers or {})
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout) as reply:
                answers.append((reply.status, reply.read(100_000)))
        except urllib.error.HTTPError as error:
            answers.append((error.code, b""))
        except (OSError, ValueError) as error:
            answers.append(error)
        except Exception as error:  # http.client's own errors: whatever is wrong, it is no answer
            answers.append(OSError(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(timeout)
    if not answers:
        raise TimeoutError(f"no answer in {timeout:g} s")
    if isinstance(answers[0], Exception):
        raise OSError(shorten(getattr(answers[0], "reason", None) or answers[0]))
    return answers[0]


def check_hub(findings: Findings, timeout: float) -> _Report:
    """Whether the model hub answers. That it does not is a note: a folder or the cache will do."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {"checked": False, "reason": "HF_HUB_OFFLINE is set"}
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    started = time.monotonic()
    try:
        status, _ = fetch(f"{address}/api/models?limit=1", timeout)
        reached, reason = status < 500, f"HTTP {status}"
    except OSError as error:
        reached, reason = False, str(error)
    if not reached:
        findings.note(f"the hub does not answer ({reason}): give models as folders, and set HF_HUB_OFFLINE=1")
    return {"checked": True, "reached": reached, "reason": reason, "seconds": round(time.monotonic() - started, 2)}


def check_endpoint(findings: Findings, url: str, model: str | None, timeout: float) -> _Report:
    """Whether an OpenAI-compatible server answers /models, and has the model of `openai:NAME`."""
    from cai.models.endpoints import check_endpoints

    try:
        [address] = check_endpoints(model or "openai:any", [url])
    except InputError as error:
        findings.problem(str(error).rstrip("."), "Give the base address, such as http://localhost:8000/v1")
        return {"url": None, "reached": False}
    key = os.environ.get(cli.key_name())
    started = time.monotonic()
    try:
        status, body = fetch(f"{address}/models", timeout, {"Authorization": f"Bearer {key}"} if key else {})
    except OSError as error:
        findings.problem(f"{address} does not answer: {error}", "Start the server, or check host, port and firewall")
        return {"url": address, "reached": False}
    seconds = round(time.monotonic() - started, 2)
    report: _Report = {"url": address, "reached": True, "status": status, "seconds": seconds}
    if status in (401, 403):
        problem = "refuses the key" if key else "wants a key"
        findings.problem(f"{address} {problem} (HTTP {status})", f"Set {cli.key_name()} in the environment")
    elif status != 200:
        remedy = "Check that the address ends like the server's (/v1)"
        findings.problem(f"{address}/models answers HTTP {status}", remedy)
    else:
        try:
            report["models"] = [str(entry["id"]) for entry in json.loads(body)["data"]][:20]
        except (ValueError, KeyError, TypeError, RecursionError):
            findings.problem(f"{address}/models is no list of models", "Check that the server is OpenAI-compatible")
    if "models" in report and model and model.startswith("openai:"):
        name = model.removeprefix("openai:")
        if name in report["models"]:
            return report | _check_answers(findings, address, model, timeout)
        findings.problem(f"{address} has no model {name!r}", f"It has: {', '.join(report['models']) or 'none'}")
    return report


def _check_answers(findings: Findings, address: str, model: str, timeout: float) -> _Report:
    """{answers, logprobs}: whether the model answers a small question there, and with log-probabilities.

    Some servers take the field and ignore it in silence; a judge then has to write its letter.
    """
    from cai.models.servers import load_server

    try:
        engine = load_server(model, endpoints=[address], timeout=timeout, patience=timeout)
        logprobs = engine.scores_choices
    except CaiError as error:
        findings.problem(
            f"{address} lists {model} and does not answer as it: {str(error).rstrip('.')}",
            "Look at the server's log; with a slow server raise --timeout",
        )
        return {"answers": False, "logprobs": None}
    if not logprobs:
        findings.note(
            f"{address} gives no log-probabilities: as a judge it writes a letter, which says less than a soft "
            "label (references/judging.md)"
        )
    return {"answers": True, "logprobs": logprobs}


# --- engines ------------------------------------------------------------------------------------------------


def list_engines() -> list[_Report]:
    """Name, version and path of each engine on PATH that --engine can start."""
    from cai.models import launchers

    return list(launchers.list_engines())


# --- a model ------------------------------------------------------------------------------------------------


def check_local_model(findings: Findings, model: str, devices: _Report) -> _Report:
    """Tokenizer, chat template, pad token and context of a model, and for each step whether it fits.

    Loads no weights. Reward models are checked too.
    """
    report: _Report = {"name": model}
    try:
        from cai.models import folders
        from cai.models.chat import Chat
        from cai.models.loading import check_model, load_tokenizer

        path = check_model(model, classifier=True)
    except ImportError as error:
        findings.problem(f"the model can't be looked at: {shorten(error)}", "Install the packages first: pip install .")
        return report
    except InputError as error:
        findings.problem(str(error).rstrip("."), "Fix the folder as it says, or name another --model")
        return report
    folder = _cached_folder(folders.adapter_chain(path)[-1])
    if folder is None:
        findings.problem(
            f"{model} is neither a folder nor in the local cache",
            f"Download it (hf download {shorten(model)}), or give a folder",
        )
        return report
    try:
        chat = Chat(load_tokenizer(path), model)
    except InputError as error:
        findings.problem(str(error).rstrip("."), "Take the instruction-tuned model, or add its chat template")
        return report
    except Exception as error:  # whatever a foreign tokenizer file makes the library raise
        findings.problem(f"the tokenizer of {model} can't be loaded: {shorten(error)}", "Copy the model's folder again")
        return report
    if gguf_file(model) is not None:
        findings.note(f"a GGUF file: its weights are kept in float32 in {path}, which is made again if it is deleted")
    fast_path = _check_fast_path(findings, folder)
    return {
        **report,
        **_describe_files(findings, path, chat),
        **_describe_chat(findings, chat),
        "fast_path": fast_path,
        "fits": _check_memory(findings, folder, devices),
    }


def _cached_folder(path: str) -> str | None:
    """The folder of a local model or of a hub id in the local cache, or None."""
    if Path(path).is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(path, local_files_only=True))
    except Exception:  # not cached, or no id: huggingface_hub has a dozen errors for it
        return None


def _describe_files(findings: Findings, path: str, chat: Any) -> _Report:
    """What the model's files say of it: the base of an adapter, quantisation, tokens and context."""
    from cai.models import folders
    from cai.models.hardware import NEW, TOKENS
    from cai.models.loading import read_context

    base, settings = folders.adapter_base(path), folders.quantisation(path)
    if base is not None:
        findings.note(f"an adapter of {base}: each command merges it in memory, which takes the memory of the base")
    if settings is not None:
        findings.note(
            f"a quantised checkpoint ({folders.quantisation_name(settings)}): it answers, judges and is measured; "
            "sft, reward_model, dpo, ppo and grpo refuse to train it"
        )
    size = folders.embedding_rows(path) or folders.vocabulary_size(path)
    pad = chat.tokenizer.pad_token_id
    if size is not None and pad is not None and pad >= size:
        findings.note("the pad token is beyond the model's embedding: another one is taken in its place")
    if "strftime_now" in folders.template_text(path):
        findings.note("the chat template writes the date: a run keeps that of its first day, or that of --date")
    context = read_context(path)
    if context is not None and context < TOKENS:
        findings.note(
            f"the context is {context} tokens: longer rows are left out of training whatever --max-length says, and "
            f"text steps fail where a prompt and --max-new-tokens ({NEW} by default) exceed it"
        )
    return {
        "adapter_of": base,
        "quantised": None if settings is None else folders.quantisation_name(settings),
        "embedding": size,
        "context": context,
    }


def _describe_chat(findings: Findings, chat: Any) -> _Report:
    """What the chat template does, and which tokens end and pad."""
    from cai.models.reasoning import THINKING

    tokenizer = chat.tokenizer
    pad, end = tokenizer.pad_token, tokenizer.eos_token
    if end is None:
        remedy = "Set eos_token in tokenizer_config.json"
        findings.problem("the tokenizer has no end-of-text token: answers would never stop", remedy)
    if pad is None:
        findings.note("no pad token: training takes a reserved one, or the end token")
    elif pad == end:
        findings.note("the pad token is the end token: training masks by length, which is right with these commands")
    if chat.opened:
        findings.note(f"the chat template opens the model's thinking: it is closed with {chat.opened} and cut out")
    stop = end if chat.stop_id is None else tokenizer.convert_ids_to_tokens(chat.stop_id)
    return {
        "chat_template": True,
        "takes_system": chat._takes_system,
        "thinks": bool(chat.opened) or any(mark in str(tokenizer.chat_template) for mark, _ in THINKING),
        "ends_turns_with": chat.stop_text or stop,
        "pad_token": pad,
        "eos_token": end,
        "vocabulary": len(tokenizer),
    }


def _check_fast_path(findings: Findings, folder: str) -> bool | str | None:
    """Whether the fast decoding loop can run the model, or "no: " and why not; None if its config does not tell.

    The model is made without memory for its weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cai.models.decoding import slow_reason
    from cai.models.local import fast_path_field

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a foreign config.json makes the library raise
        findings.note(f"it is not known whether the fast decoding loop can run the model: {shorten(error)}")
        return None
    reason = slow_reason(model)
    if reason:
        findings.note(
            f"the fast decoding loop can't run the model, because {reason}: writing text and judging take "
            "several times as long"
        )
    return fast_path_field(reason)


def _check_memory(findings: Findings, folder: str, devices: _Report) -> _Report:
    """{step: {needs_gb, fits}} on the largest device. {} for an architecture that models/estimate.py does not know."""
    from cai.models.estimate import shape_of
    from cai.models.hardware import NEW, TOKENS, step_memory

    shape = shape_of(folder)
    if shape is None:
        findings.note("its config.json does not tell how much memory the model takes")
        return {}
    largest = max(devices["accelerators"], key=lambda device: device["free_gb"] or 0, default=None)
    name, free = (largest["name"], largest["free_gb"]) if largest else ("cpu", devices["cpu"]["free_gb"])
    needs = step_memory(shape, gpu=name not in ("cpu", "mps"))
    steps = {step: {"needs_gb": total, "fits": free is None or total < free} for step, total in needs.items()}
    tight = [step for step, need in steps.items() if not need["fits"]]
    if len(tight) == len(steps):
        findings.problem(
            f"the model fits for no step ({name} has {free} GB free)",
            "Take a smaller model or a larger device, or serve it and use openai:NAME with --endpoint",
        )
    elif tight:
        findings.note(
            f"with rows of {TOKENS + NEW} tokens there is too little memory for: {'; '.join(tight)}. "
            "Smaller batches, --lora or another device help"
        )
    return {"device": name, "free_gb": free, "rows_of_tokens": TOKENS + NEW, "steps": steps}
