"""Engines as programs: where they are, their version, and the command line that serves a model.

    launcher = find_launcher(EngineChoice(engine="vllm"))
    launcher.command(Serving("my-org/my-model", name="my-model", port=8000))

Leaves out starting and stopping them (managed.py).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cai.base.engine_options import ENGINES, EngineChoice
from cai.base.errors import InputError
from cai.base.paths import model_path
from cai.models import folders
from cai.models.gguf import resolve

HOST = "127.0.0.1"

TOP_LOGPROBS = 20  # as many as the client asks for

SLOTS, SLOT_TOKENS = 8, 8192  # of llama-server: requests at once, and the most tokens of each

PROGRAMS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llama-server", "transformers-serve": "transformers"}

INSTALL = {
    "vllm": "pip install vllm, in an environment of its own",
    "sglang": 'pip install "sglang[all]", in an environment of its own',
    "llama.cpp": "https://github.com/ggml-org/llama.cpp, or a package of your system",
    "transformers-serve": 'pip install "transformers[serving]"',
}


@dataclass(frozen=True)
class Serving:
    """What a server is started with.

    model: a folder, a file or a hub id. name: what requests call it. device: cpu, cuda:1, ...; None: its own choice.
    """

    model: str
    name: str
    port: int | str
    dtype: str = "auto"
    device: str | None = None


@dataclass(frozen=True)
class Launcher:
    """An engine that can be started.

    words: how its command line begins. version: "unknown" where it does not tell.
    takes_name: whether it serves the model under a name of ours, else under the model's path.
    health: the path that answers 200 when it is ready.
    """

    choice: EngineChoice
    words: tuple[str, ...]
    version: str
    takes_name: bool = True
    health: str = "/v1/models"

    @property
    def label(self) -> str:
        """The engine and its version, for messages."""
        return f"{self.choice.label} {self.version}".removesuffix(" unknown")

    def command(self, serving: Serving) -> list[str]:
        """The command line. Raises InputError for a model that the engine can't serve."""
        if self.choice.engine is None:
            values = {name: str(getattr(serving, name)) for name in ("model", "port", "name", "dtype")}
            return [re.sub(r"\{(model|port|name|dtype)\}", lambda m: values[m[1]], word) for word in self.words]
        options = _OPTIONS[self.choice.engine](serving, self.choice)
        return [*self.words, *options, *split_words(self.choice.engine_args)]


def split_words(words: str) -> list[str]:
    """The words of --engine-args. Raises InputError for open quotes."""
    try:
        return shlex.split(words)
    except ValueError as error:
        raise InputError(f"not words ({error})", where="--engine-args", remedy="Check the quotes") from error


def _vllm(serving: Serving, choice: EngineChoice) -> list[str]:
    parallel = (
        ("--tensor-parallel-size", choice.tensor_parallel_size),
        ("--data-parallel-size", choice.data_parallel_size),
    )
    return [
        *("serve", serving.model, "--host", HOST, "--port", str(serving.port)),
        *("--served-model-name", serving.name, "--dtype", serving.dtype),
        # Prompts of a step begin alike. The longest context for which there is memory. The sampling settings of
        # generation_config.json would act beside ours.
        *("--enable-prefix-caching", "--max-logprobs", str(TOP_LOGPROBS), "--max-model-len", "auto"),
        *("--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *(word for option, size in parallel if size > 1 for word in (option, str(size))),
    ]


def _sglang(serving: Serving, choice: EngineChoice) -> list[str]:
    parallel = ("--tp-size", choice.tensor_parallel_size), ("--dp-size", choice.data_parallel_size)
    return [
        *("-m", "sglang.launch_server", "--model-path", serving.model, "--host", HOST, "--port", str(serving.port)),
        *("--served-model-name", serving.name, "--dtype", serving.dtype, "--sampling-defaults", "openai"),
        *(word for option, size in parallel if size > 1 for word in (option, str(size))),
    ]


def _llama_cpp(serving: Serving, _choice: EngineChoice) -> list[str]:
    return [
        *("--model", find_gguf(serving.model), "--host", HOST, "--port", str(serving.port), "--alias", serving.name),
        *("--jinja", "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_TOKENS)),
    ]


def _transformers_serve(serving: Serving, _choice: EngineChoice) -> list[str]:
    return [
        *("serve", serving.model, "--host", HOST, "--port", str(serving.port), "--continuous-batching"),
        *("--dtype", serving.dtype, *(["--device", serving.device] if serving.device else [])),
    ]


_OPTIONS: dict[str, Callable[[Serving, EngineChoice], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "transformers-serve": _transformers_serve,
}


def find_gguf(model: str) -> str:
    """The one GGUF file of a model: the file itself, or that in its folder. Raises InputError if there is none."""
    path = Path(model)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(files) != 1 or not files[0].is_file():
        raise InputError(
            f"{len(files)} GGUF files",
            where=model,
            expected="one, which is what llama.cpp reads",
            remedy="Convert the model with llama.cpp's convert_hf_to_gguf.py, or take another engine",
        )
    return str(files[0])


def served_model(model: str, choice: EngineChoice) -> str:
    """The folder, file or hub id that an engine loads; of a GGUF file its folder, unless the engine reads the file.

    Raises InputError for an adapter, which it would not merge.
    """
    reads_gguf = choice.engine in (None, "llama.cpp")
    path = model_path(model) if reads_gguf else resolve(model)
    if base := folders.adapter_base(path):
        raise InputError(
            f"an adapter of {base}, which {choice.label} would not merge",
            where=model,
            remedy="Merge it with peft (merge_and_unload, save_pretrained), or leave --engine out",
        )
    return str(Path(path).resolve()) if Path(path).exists() else path


def find_launcher(choice: EngineChoice) -> Launcher:
    """The engine of a choice. Raises InputError if its executable is missing."""
    if choice.engine is None:
        words = shlex.split(choice.engine_command or "")
        if shutil.which(words[0]) is None:
            raise InputError(
                f"no such program: {words[0]}",
                where="--engine-command",
                expected="an executable file, or a program on PATH",
                remedy="Check its spelling",
            )
        return Launcher(choice, tuple(words), "unknown", any("{name}" in word for word in words))
    name = choice.engine
    path = find_program(name, choice.engine_path)
    if path is None:
        place = f"no such executable: {choice.engine_path}" if choice.engine_path else f"no {PROGRAMS[name]} on PATH"
        raise InputError(
            place,
            where="--engine-path" if choice.engine_path else "--engine",
            expected="the Python of sglang's environment" if name == "sglang" else f"{PROGRAMS[name]}, executable",
            remedy=f"Name it with --engine-path, or install it: {INSTALL[name]}. doctor.py lists what it finds",
        )
    return Launcher(choice, (path,), read_version(name, path), name != "transformers-serve", "/health")


def find_program(engine: str, path: str | None = None) -> str | None:
    """The executable of an engine, for sglang the Python that has it: `path`, or the one on PATH or beside this Python;
    None if there is none."""
    if path:
        return shutil.which(path)
    program = shutil.which(PROGRAMS[engine]) or shutil.which(PROGRAMS[engine], path=os.path.dirname(sys.executable))
    return _interpreter(program) if program and engine == "sglang" else program


def _interpreter(script: str) -> str | None:
    """The Python that runs a script, by its first line; None for another kind of file."""
    with open(script, "rb") as file:
        line = file.readline(400)
    words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
    return words[0] if words and "python" in Path(words[0]).name else None


def read_version(engine: str, path: str) -> str:
    """The version of an engine, without importing it; "unknown" where it does not tell."""
    if engine == "llama.cpp":
        command, pattern = [path, "--version"], r"version: (\S+)"
    else:
        package = engine.partition("-")[0]
        python = path if engine == "sglang" else _interpreter(path)
        code = f"from importlib.metadata import version as v; print('version:', v({package!r}))"
        command, pattern = [python or "", "-c", code], r"version: (\S+)"
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    version = re.search(pattern, process.stdout + process.stderr)
    return version[1] if version else "unknown"


def list_engines() -> list[dict[str, str]]:
    """{name, version, path} of each engine on PATH, or beside this Python."""
    paths = {name: find_program(name) for name in ENGINES}
    return [{"name": name, "version": read_version(name, path), "path": path} for name, path in paths.items() if path]
