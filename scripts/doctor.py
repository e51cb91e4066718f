"""Check that this machine can do what the other commands ask: packages, devices, memory, hub, endpoints, a model.

    python scripts/doctor.py --model tiny --json
    python scripts/doctor.py --hardware

Changes nothing but for a small file in each place that is to be written, which it removes. Runs where hardly anything
is installed, to say so. Leaves out speed, and models on a hub that are not in the local cache.
"""

import json
import operator
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path

try:
    import click
except ImportError:
    print(
        json.dumps(
            {
                "ok": False,
                "problems": [f"click is not installed for {sys.executable}"],
                "remedies": ["In the folder of this project: python3 -m venv .venv && .venv/bin/pip install ."],
                "notes": [],
            }
        )
    )
    sys.exit(3)

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.base.paths import ROOT

# What a step holds in memory is estimated for these: the defaults of the commands, for rows of this length.
TOKENS, NEW, ROWS, TRAINING_ROWS = 512, 256, 32, 8
LOW_DISK_GB = 5


@click.command(cls=cli.Command)
@click.option(
    "--model",
    metavar="MODEL",
    default=None,
    help="Check this one too: a folder, a hub id, `tiny`, or openai:NAME at --endpoint.",
)
@cli.options("endpoint")
@click.option("--output", default=".", show_default=True, metavar="PATH", help="Where results will go.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the hub and for each endpoint.",
)
@click.option(
    "--hardware",
    is_flag=True,
    help="Check nothing: print what each step needs in memory for models of common sizes, and on which GPU.",
)
@cli.options("device", "json")
def main(model, endpoints, output, timeout, hardware, device, as_json):
    """Check Python, packages, devices, memory, places to write, hub and endpoints, and a model.

    Ends with 0 if all is well and 3 if there are problems; each has its remedy.

    \b
    Example:
      python scripts/doctor.py --model tiny --json
    """
    if hardware:
        rows = hardware_rows()
        click.echo(json.dumps({"rows_of_tokens": TOKENS + NEW, "models": rows}) if as_json else hardware_table(rows))
        return
    found = Findings()
    report = {
        "python": check_python(found),
        "packages": check_packages(found, "openai" if endpoints else None),
        "devices": check_devices(found, device),
        "places": check_places(found, output),
        "hub": check_hub(found, timeout),
        "endpoints": [check_endpoint(found, url, model, timeout) for url in endpoints],
    }
    if model and not model.startswith("openai:"):
        report["model"] = check_local_model(found, model, report["devices"])
    elif model and not endpoints:
        found.problem(f"{model} without an endpoint", "Name its server with --endpoint URL")
    result = {
        "ok": not found.problems,
        "problems": found.problems,
        "remedies": found.remedies,
        "notes": found.notes,
        **report,
    }
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        show(result)
    if found.problems:
        click.get_current_context().exit(cli.SOME_FAILED)


class Findings:
    """Problems, each with the remedy at the same place, and notes on what is no problem yet."""

    def __init__(self):
        self.problems: list[str] = []
        self.remedies: list[str] = []
        self.notes: list[str] = []

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append(what)
        self.remedies.append(remedy)

    def note(self, what: str) -> None:
        self.notes.append(what)


# --- Python and packages ------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def check_python(found: Findings) -> dict:
    """The running version against `requires-python`."""
    version, wanted = ".".join(map(str, sys.version_info[:3])), project()["requires-python"]
    if not within(version, wanted):
        found.problem(f"Python {version}, and {wanted} is needed", "Make the virtual environment with a newer Python")
    return {
        "version": version,
        "wanted": wanted,
        "executable": sys.executable,
        "virtual_environment": sys.prefix != sys.base_prefix,
    }


def check_packages(found: Findings, extra: str | None = None) -> dict:
    """Each dependency, and those of an extra: the version installed and the bounds of pyproject.toml.

    Nothing is imported.
    """
    packages, told = {}, project()
    for requirement in [*told["dependencies"], *(told["optional-dependencies"][extra] if extra else ())]:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
            found.problem(f"{name} is not installed", f'pip install "{requirement}"')
        if version and not within(version, bounds):
            found.problem(f"{name} {version}, and {bounds} is needed", f'pip install "{requirement}"')
        packages[name] = {"version": version, "wanted": bounds}
    return packages


def within(version: str, bounds: str) -> bool:
    """Whether a version meets bounds such as `>=2.8,<2.14`.

    The numbers alone are compared, so that a build of the maker's own (2.9.0+cpu) counts as its version. By itself,
    because the package for it may be what is missing.
    """

    def numbers(text: str) -> tuple[int, ...]:
        found = [int(part) for part in re.match(r"\d+(?:\.\d+)*", text)[0].split(".")]
        while found and not found[-1]:
            found.pop()  # 5 is 5.0
        return tuple(found)

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


def check_devices(found: Findings, asked: str | None) -> dict:
    """CPU and accelerators with their memory in GB (10⁹ bytes), and whether they compute in bfloat16."""
    total, free = memory()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {"cpu": {"cores": cpus, "memory_gb": total, "free_gb": free}, "accelerators": []}
    try:
        import torch
    except Exception as error:  # a broken build fails with anything, OSError for a missing library first of all
        found.problem(f"torch can't be imported: {shorten(error)}", "Install it: pip install --force-reinstall torch")
        return devices
    devices["cpu"]["bf16"] = True  # torch computes it on any CPU, slowly where there are no instructions for it
    for index in range(torch.cuda.device_count()):
        left, most = torch.cuda.mem_get_info(index)
        devices["accelerators"].append(
            {
                "name": f"cuda:{index}",
                "kind": torch.cuda.get_device_name(index),
                "memory_gb": round(most / 1e9, 1),
                "free_gb": round(left / 1e9, 1),
                "bf16": torch.cuda.get_device_capability(index) >= (8, 0),
            }
        )
    if torch.backends.mps.is_available():
        devices["accelerators"].append(
            {"name": "mps", "kind": "Apple GPU", "memory_gb": total, "free_gb": free, "bf16": True}
        )
    for one in devices["accelerators"]:
        if not one["bf16"]:
            found.note(f"{one['name']} ({one['kind']}) has no bfloat16: say --dtype float16 or float32")
    names = ["cpu", *(one["name"] for one in devices["accelerators"])]
    if asked and asked not in [*names, *(name.partition(":")[0] for name in names)]:
        found.problem(
            f"no device {asked}",
            f"Choose one of {', '.join(names)}; if a GPU is missing, look at "
            "nvidia-smi, CUDA_VISIBLE_DEVICES, and whether torch was installed for the CPU alone",
        )
    if not devices["accelerators"]:
        found.note("no GPU: `tiny` runs on the CPU; for models of billions of parameters use a GPU or an endpoint")
    return devices


def memory() -> tuple[float | None, float | None]:
    """(total, available) memory in GB that this process may use; None where the system does not say."""
    try:
        import psutil

        system = psutil.virtual_memory()
        total, free = system.total, system.available
    except ImportError:
        return None, None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(file).read_text().strip() if Path(file).is_file() else ""
        if limit.isdigit() and int(limit) < total:  # a container has less than its machine
            total = int(limit)
            free = min(free, total)
    return round(total / 1e9, 1), round(free / 1e9, 1)


# --- places -------------------------------------------------------------------------------------------------


def check_places(found: Findings, output: str) -> dict:
    """Free space, and whether a file can be written: the output's folder, the hub's cache, temporary files."""
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    places = {"output": output, "hub_cache": cache, "temporary": tempfile.gettempdir()}
    report = {}
    for name, place in places.items():
        folder = next(one for one in (Path(place).absolute(), *Path(place).absolute().parents) if one.exists())
        try:
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is a file")
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
            writable = True
        except OSError as error:
            writable = False
            remedy = {
                "output": "Name another --output",
                "hub_cache": "Set HF_HOME to a folder of yours",
                "temporary": "Set TMPDIR to a folder of yours",
            }[name]
            found.problem(f"cannot write to {place}: {error.strerror or error}", remedy)
        free = round(shutil.disk_usage(folder).free / 1e9, 1)
        if free < LOW_DISK_GB:
            found.note(f"{free} GB left at {place}: a checkpoint of 7B parameters takes about 15")
        report[name] = {"path": str(place), "writable": writable, "free_gb": free}
    return report


# --- what lies elsewhere ------------------------------------------------------------------------------------


def fetch(url: str, timeout: float, headers: dict | None = None) -> tuple[int, bytes]:
    """(status, the first 100 kB) of a GET, after `timeout` seconds at most in all.

    In a thread that is not waited for: a server that sends a byte now and then would hold up any timeout of a socket.
    Raises OSError.
    """
    import threading
    import urllib.error
    import urllib.request

    class SameHost(urllib.request.HTTPRedirectHandler):
        """A key is for the host that was named: redirects are not followed."""

        def redirect_request(self, *_):
            return None

    answer: list = []

    def ask():
        request = urllib.request.Request(url, headers=headers or {})
        try:
            with urllib.request.build_opener(SameHost).open(request, timeout=timeout) as reply:
                answer.append((reply.status, reply.read(100_000)))
        except urllib.error.HTTPError as error:
            answer.append((error.code, b""))
        except (OSError, ValueError) as error:
            answer.append(error)
        except Exception as error:  # http.client's own errors: whatever is wrong, it is no answer
            answer.append(OSError(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not answer:
        raise TimeoutError(f"no answer in {timeout:g} s")
    if isinstance(answer[0], Exception):
        raise OSError(shorten(getattr(answer[0], "reason", None) or answer[0]))
    return answer[0]


def check_hub(found: Findings, timeout: float) -> dict:
    """Whether the model hub answers. That it does not is a note: a folder or the cache will do."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {"checked": False, "reason": "HF_HUB_OFFLINE is set"}
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    started = time.monotonic()
    try:
        status, _ = fetch(f"{address}/api/models?limit=1", timeout)
        reached = status < 500
        reason = f"HTTP {status}"
    except OSError as error:
        reached, reason = False, str(error)
    if not reached:
        found.note(f"the hub does not answer ({reason}): give models as folders, and set HF_HUB_OFFLINE=1")
    return {"checked": True, "reached": reached, "reason": reason, "seconds": round(time.monotonic() - started, 2)}


def check_endpoint(found: Findings, url: str, model: str | None, timeout: float) -> dict:
    """Whether an OpenAI-compatible server answers /models, and has the model of `openai:NAME`."""
    from cai.models.servers import check_endpoints

    try:
        [address] = check_endpoints(model or "openai:any", [url])
    except InputError as error:
        found.problem(str(error).rstrip("."), "Give the base address, such as http://localhost:8000/v1")
        return {"url": None, "reached": False}
    key_name = cli.key_name()
    key = os.environ.get(key_name)
    started = time.monotonic()
    report = {"url": address, "reached": False}
    try:
        status, body = fetch(f"{address}/models", timeout, {"Authorization": f"Bearer {key}"} if key else {})
    except OSError as error:
        found.problem(f"{address} does not answer: {error}", "Start the server, or check host, port and firewall")
        return report
    report |= {"reached": True, "status": status, "seconds": round(time.monotonic() - started, 2)}
    if status in (401, 403):
        found.problem(
            f"{address} refuses the key (HTTP {status})" if key else f"{address} wants a key (HTTP {status})",
            f"Set {key_name} in the environment",
        )
    elif status != 200:
        found.problem(f"{address}/models answers HTTP {status}", "Check that the address ends like the server's (/v1)")
    else:
        try:
            report["models"] = [str(one["id"]) for one in json.loads(body)["data"]][:20]
        except (ValueError, KeyError, TypeError, RecursionError):
            found.problem(f"{address}/models is no list of models", "Check that the server is OpenAI-compatible")
            return report
        name = (model or "").removeprefix("openai:")
        if model and model.startswith("openai:"):
            if name in report["models"]:
                report |= check_chat(found, address, model, timeout)
            else:
                found.problem(f"{address} has no model {name!r}", f"It has: {', '.join(report['models']) or 'none'}")
    return report


def check_chat(found: Findings, address: str, model: str, timeout: float) -> dict:
    """{answers, logprobs}: whether the model answers a small question there, and with log-probabilities.

    Some servers take the field and ignore it in silence; a judge then has to write its letter.
    """
    from cai.base.errors import CaiError
    from cai.models.servers import load_server

    try:
        engine = load_server(model, endpoints=[address], timeout=timeout, patience=timeout)
        logprobs = engine.scores_choices
    except CaiError as error:
        found.problem(
            f"{address} lists {model} and does not answer as it: {str(error).rstrip('.')}",
            "Look at the server's log; with a slow server raise --timeout",
        )
        return {"answers": False, "logprobs": None}
    if not logprobs:
        found.note(
            f"{address} gives no log-probabilities: as a judge it writes a letter, which says less than a soft "
            "label (references/judging.md)"
        )
    return {"answers": True, "logprobs": logprobs}


# --- a model ------------------------------------------------------------------------------------------------


def check_local_model(found: Findings, model: str, devices: dict) -> dict:
    """Tokenizer, chat template and pad token of a model, and for each step whether it fits. Loads no weights."""
    report = {"name": model}
    try:
        from cai.models.chat import Chat
        from cai.models.loading import check_model

        path = check_model(model)
    except ImportError as error:
        found.problem(f"the model can't be looked at: {shorten(error)}", "Install the packages first: pip install .")
        return report
    except InputError as error:
        found.problem(str(error).rstrip("."), "Mend the folder as it says, or name another --model")
        return report
    local = cached_folder(path)
    if local is None:
        found.problem(
            f"{model} is neither a folder nor in the local cache",
            f"Download it (hf download {shorten(model)}), or give a folder",
        )
        return report
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
        chat = Chat(tokenizer, model)
    except InputError as error:
        found.problem(str(error).rstrip("."), "Take the instruction-tuned model, or add its chat template")
        return report
    except Exception as error:  # whatever a foreign tokenizer file makes the library raise
        found.problem(f"the tokenizer of {model} can't be loaded: {shorten(error)}", "Copy the model's folder again")
        return report
    report |= describe_chat(found, chat)
    report["fast_path"] = check_fast_path(found, local)
    report["fits"] = fits(found, local, devices)
    return report


def cached_folder(path: str) -> str | None:
    """The folder of a local model or of a hub id in the local cache, or None."""
    if Path(path).is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(path, local_files_only=True)
    except Exception:  # not cached, or no id: huggingface_hub has a dozen errors for it
        return None


def describe_chat(found: Findings, chat) -> dict:
    """What the chat template does, and which tokens end and pad."""
    from cai.models.chat import THINKING

    tokenizer = chat.tokenizer
    pad, end = tokenizer.pad_token, tokenizer.eos_token
    if end is None:
        found.problem(
            "the tokenizer has no end-of-text token: answers would never stop", "Set eos_token in tokenizer_config.json"
        )
    if pad is None:
        found.note("no pad token: training takes a reserved one, or the end token")
    elif pad == end:
        found.note("the pad token is the end token: training masks by length, which is right with these commands")
    thinks = chat.opened or next((one for one, _ in THINKING if one in str(tokenizer.chat_template)), None)
    if chat.opened:
        found.note(f"the chat template opens the model's thinking: it is closed with {chat.opened} and cut out")
    return {
        "chat_template": True,
        "takes_system": chat._takes_system,
        "thinks": bool(thinks),
        "ends_turns_with": chat.stop_text
        or (end if chat.stop_id is None else tokenizer.convert_ids_to_tokens(chat.stop_id)),
        "pad_token": pad,
        "eos_token": end,
        "vocabulary": len(tokenizer),
    }


def check_fast_path(found: Findings, folder: str) -> bool | str | None:
    """Whether the fast decoding loop can run the model, or "no: " and why not; None if its config does not say.

    The model is made without memory for its weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cai.models.decoding import slow_reason
    from cai.models.local import fast_path_field

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # whatever a foreign config.json makes the library raise
        found.note(f"whether the fast decoding loop can run the model can't be told: {shorten(error)}")
        return None
    if reason := slow_reason(model):
        found.note(
            f"the fast decoding loop can't run the model, because {reason}: writing text and judging take "
            "several times as long"
        )
    return fast_path_field(reason)


def step_memory(shape, gpu: bool) -> dict[str, float]:
    """{step: GB} of tensors at its peak, for rows of TOKENS + NEW tokens, by `cai.estimate`.

    Text steps with ROWS rows in a batch, training with TRAINING_ROWS; on a GPU in bfloat16 with checkpointing,
    else in float32.
    """
    from cai.models.estimate import gigabytes, text_memory, training_memory

    size = 2 if gpu else 4
    text = {"size": size, "rows": ROWS, "longest": TOKENS, "chunk": ROWS * TOKENS}
    tokens, lora = TRAINING_ROWS * (TOKENS + NEW), {"lora_rank": 16, "frozen_size": size}
    training = {"autocast": gpu, "checkpointing": gpu}
    full = training_memory(shape, tokens=tokens, **training)
    light = training_memory(shape, tokens=tokens, **training, **lora)
    frozen = shape.parameters * size  # a model without gradients: the reference, the reward model
    needs = {
        "generate, critique, revise": text_memory(shape, new=NEW, **text),
        "judge": text_memory(shape, new=0, **text),
        # A reward model reads two responses a row, but has no logits over the vocabulary, which take more.
        "sft, reward_model (--lora)": light,
        "sft, reward_model (--full)": full,
        "dpo (--lora)": training_memory(shape, tokens=2 * tokens, **training, **lora),
        "dpo (--full)": {**training_memory(shape, tokens=2 * tokens, **training), "reference": frozen},
        # A value model of the policy's size is trained beside it; under LoRA the reference is the policy without
        # its adapters.
        "ppo (--lora)": {**light, "value": sum(light.values()), "reward": frozen},
        "ppo (--full)": {**full, "value": sum(full.values()), "reward": frozen, "reference": frozen},
    }
    return {step: gigabytes(parts)["total"] for step, parts in needs.items()}


def fits(found: Findings, folder: str, devices: dict) -> dict:
    """{step: {needs_gb, fits}} on the largest device, by `cai.estimate`. {} for an architecture it does not know."""
    from cai.models.estimate import shape_of

    shape = shape_of(folder)
    if shape is None:
        found.note("how much memory the model takes can't be told from its config.json")
        return {}
    best = max(devices["accelerators"], key=lambda one: one["free_gb"] or 0, default=None)
    device = best or {"name": "cpu", **devices["cpu"]}
    report = {"device": device["name"], "free_gb": device["free_gb"], "rows_of_tokens": TOKENS + NEW, "steps": {}}
    for step, total in step_memory(shape, gpu=best is not None and best["name"] != "mps").items():
        report["steps"][step] = {"needs_gb": total, "fits": device["free_gb"] is None or total < device["free_gb"]}
    tight = [step for step, one in report["steps"].items() if not one["fits"]]
    if len(tight) == len(report["steps"]):
        found.problem(
            f"the model fits for no step ({device['name']} has {device['free_gb']} GB free)",
            "Take a smaller model or a larger device, or serve it and use openai:NAME with --endpoint",
        )
    elif tight:
        found.note(
            f"with rows of {TOKENS + NEW} tokens there is too little memory for: {'; '.join(tight)}. "
            "Smaller batches, --lora or another device help"
        )
    return report


# --- models of common sizes ---------------------------------------------------------------------------------

# From the published config.json of each: layers, hidden, inner, heads, key heads, head size, vocabulary, and whether
# the output layer is the embedding again.
PUBLISHED = {
    "Llama 3.2 1B": (16, 2048, 8192, 32, 8, 64, 128_256, True),
    "Llama 3.2 3B": (28, 3072, 8192, 24, 8, 128, 128_256, True),
    "Llama 3.1 8B": (32, 4096, 14_336, 32, 8, 128, 128_256, False),
    "Qwen2.5 14B": (48, 5120, 13_824, 40, 8, 128, 152_064, False),
    "Qwen2.5 32B": (64, 5120, 27_648, 40, 8, 128, 152_064, False),
    "Llama 3.1 70B": (80, 8192, 28_672, 64, 8, 128, 128_256, False),
}
# What CUDA, its kernels and Python take beside the tensors.
BESIDE_GB = 2


def published_shape(layers, hidden, inner, heads, kv_heads, head_size, vocabulary, tied):
    """The shape of a Llama-like decoder; its parameters counted matrix by matrix (biases and norms left out)."""
    from cai.models.estimate import Shape

    attention = 2 * hidden * head_size * (heads + kv_heads)
    count = layers * (attention + 3 * hidden * inner) + vocabulary * hidden * (1 if tied else 2)
    return Shape(count, layers, hidden, inner, heads, kv_heads, head_size, vocabulary)


def hardware_rows() -> list[dict]:
    """[{model, parameters, steps: {step: {needs_gb, gpu}}}]; gpu is the smallest known one that holds it, or None."""
    from cai.models.estimate import GPUS

    rows = []
    for name, sizes in PUBLISHED.items():
        shape = published_shape(*sizes)
        steps = {}
        for step, total in step_memory(shape, gpu=True).items():
            holding = [(memory, gpu) for gpu, (memory, *_) in GPUS.items() if memory >= total + BESIDE_GB]
            steps[step] = {"needs_gb": total, "gpu": min(holding)[1] if holding else None}
        rows.append({"model": name, "parameters": shape.parameters, "steps": steps})
    return rows


def hardware_table(rows: list[dict]) -> str:
    """The rows in Markdown: GB, and the smallest GPU that holds them."""
    steps = list(rows[0]["steps"])
    lines = [["step", *(row["model"] for row in rows)], ["---"] * (1 + len(rows))]
    for step in steps:
        found = [row["steps"][step] for row in rows]
        lines.append([step, *(f"{one['needs_gb']:.0f} GB: {one['gpu'] or 'several'}" for one in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- for people ---------------------------------------------------------------------------------------------


def show(result: dict) -> None:
    """A line for each thing checked, then the problems with their remedies."""
    python, cpu, hub = result["python"], result["devices"]["cpu"], result["hub"]
    lines = [
        ("Python", f"{python['version']} ({python['wanted']})"),
        ("packages", ", ".join(f"{name} {one['version']}" for name, one in result["packages"].items())),
        ("CPU", f"{cpu['cores']} cores, {cpu['free_gb']} of {cpu['memory_gb']} GB free"),
    ]
    lines += [
        (
            one["name"],
            f"{one['kind']}, {one['free_gb']} of {one['memory_gb']} GB free, bfloat16 {'yes' if one['bf16'] else 'no'}",
        )
        for one in result["devices"]["accelerators"]
    ]
    lines += [
        (
            name.replace("_", " "),
            f"{one['path']}: {'writable' if one['writable'] else 'NOT writable'}, {one['free_gb']} GB free",
        )
        for name, one in result["places"].items()
    ]
    lines += [("hub", f"answers in {hub['seconds']} s" if hub.get("reached") else hub["reason"])]
    lines += [
        (
            "endpoint",
            f"{one['url']}: {', '.join(one.get('models', ())) or 'no answer'}"
            + ("" if one.get("logprobs") is None else f", log-probabilities {'yes' if one['logprobs'] else 'NO'}"),
        )
        for one in result["endpoints"]
    ]
    if chat := result.get("model"):
        lines += [
            ("model", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in chat.items() if key != "fits"))
        ]
        for step, one in (chat.get("fits") or {}).get("steps", {}).items():
            lines += [("", f"{step}: about {one['needs_gb']} GB, {'fits' if one['fits'] else 'does NOT fit'}")]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        click.echo(f"{name:<{width}}  {text}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    for problem, remedy in zip(result["problems"], result["remedies"], strict=True):
        click.echo(f"problem: {problem}\n  remedy: {remedy}")
    click.echo("ok" if result["ok"] else f"{len(result['problems'])} problems")


if __name__ == "__main__":
    main()
