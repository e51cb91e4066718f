"""The options that let another engine run the models of this machine: a server that the command starts and stops.

    with_options = engine_options.engine_options(command)
    choice = engine_options.engine_choice()      # None: our own engine

Each command has its own choice, kept in click's context, so that no function has to pass it on; run.py writes it into
the lines of its steps. Leaves out the servers themselves (models/managed.py), and servers that run already
(`--endpoint`).
"""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from cai.base.errors import InputError

ENGINES = ("vllm", "sglang", "llama.cpp", "transformers-serve")

# Placeholders of --engine-command.
PLACEHOLDERS = ("model", "port", "name", "dtype")

# The parameters of commands that name a model which writes or judges text.
MODELS = ("model", "judge", "policy", "check", "gate", "critic", "reader")

_PARALLEL = ("tensor_parallel_size", "data_parallel_size")

# {parameter: settings of its click option}
_SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {
        "type": click.Choice(ENGINES),
        "help": "Start this server for the models of this machine, use it, and stop it at the end.  [default: our own "
        "engine]",
    },
    "engine_command": {
        "metavar": "COMMAND",
        "help": "Instead of --engine: the command line of any other OpenAI-compatible server, with {model}, {port}, "
        "{name} and {dtype} in it.",
    },
    "engine_path": {
        "metavar": "FILE",
        "help": "The engine's executable, of any environment (for sglang its Python).  [default: on PATH]",
    },
    "engine_args": {"metavar": "WORDS", "help": "Further options of the engine, such as '--max-model-len 8192'."},
    "tensor_parallel_size": {
        "type": click.IntRange(min=1),
        "metavar": "N",
        "help": "With --engine: GPUs over which each copy of the model is spread.  [default: 1]",
    },
    "data_parallel_size": {
        "type": click.IntRange(min=1),
        "metavar": "N",
        "help": "With --engine: copies of the model inside one server.  [default: 1]",
    },
    "replicas": {
        "type": click.IntRange(min=1),
        "metavar": "N",
        "help": "With --engine: servers to start, each on GPUs of its own.  [default: 1]",
    },
}

_OPTIONS = tuple(_SETTINGS)

_KEY = "engine_options"  # the entry of click's context: {command's context: {parameter: value}}

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a command.

    engine: one of ENGINES; None with `engine_command`, a command line with PLACEHOLDERS.
    engine_path: its executable; None: the one on PATH. engine_args: further words of its command line.
    tensor_parallel_size, data_parallel_size: GPUs that share one copy of the model; copies inside one server.
    replicas: servers.
    """

    engine: str | None = None
    engine_command: str | None = None
    engine_path: str | None = None
    engine_args: str = ""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    replicas: int = 1

    @property
    def name(self) -> str:
        """What identifies the engine in a fingerprint: its name, or its command line."""
        return self.engine or self.engine_command or ""

    @property
    def label(self) -> str:
        """The engine's name for messages: of a command line its first word."""
        return self.engine or shlex.split(self.name)[0]

    @property
    def copies(self) -> int:
        """Copies of the model, over all servers."""
        return self.data_parallel_size * self.replicas

    @property
    def gpus(self) -> int:
        """GPUs that it takes, where there are any."""
        return self.tensor_parallel_size * self.copies


def engine_options(function: _Function) -> _Function:
    """Add `--engine` and the options that belong to it, which `engine_choice` returns."""
    for name in reversed(_OPTIONS):
        flag = f"--{name.replace('_', '-')}"
        function = click.option(flag, expose_value=False, callback=_keep, **_SETTINGS[name])(function)
    return function


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value is not None:
        context.meta.setdefault(_KEY, {}).setdefault(context, {})[option.name] = value


def _values(context: click.Context | None) -> dict[str, Any]:
    """{parameter: value} of the options that were given to this very command."""
    values: dict[str, Any] = context.meta.get(_KEY, {}).get(context, {}) if context else {}
    return values


def engine_choice() -> EngineChoice | None:
    """The engine of the running command; None: our own."""
    values = _values(click.get_current_context(silent=True))
    return EngineChoice(**values) if values else None


def command_options() -> list[str]:
    """These options as arguments of another command line; [] where none was given."""
    values = _values(click.get_current_context(silent=True))
    return [word for name in _OPTIONS if name in values for word in (f"--{name.replace('_', '-')}", str(values[name]))]


def identify() -> dict[str, str]:
    """What the choice adds to the fingerprint of an output: the engine, not where or on how many devices it runs."""
    choice = engine_choice()
    return {"engine": choice.name} if choice else {}


def check_options(context: click.Context) -> None:
    """Raise UsageError for options of this module that would have no effect, and InputError for a command line that
    can't be used."""
    values = _values(context)
    if not values:
        return
    if "engine" in values and "engine_command" in values:
        raise click.UsageError("Give --engine or --engine-command, not both.", context)
    if "engine" not in values and "engine_command" not in values:
        _refuse(context, values, "without --engine the model runs in this process")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "an engine in several processes",
            where="--engine",
            remedy="Leave accelerate launch out: one process asks all servers, and --replicas takes all GPUs",
        )
    _check_models(context)
    _refuse(context, {"batch_tokens"}, "the engine bounds its batches itself")
    if values.get("engine") in ("llama.cpp", "transformers-serve"):
        _refuse(context, _PARALLEL, f"{values['engine']} does not take it")
    if values.get("engine") == "llama.cpp":
        _refuse(context, {"dtype"}, "the file decides the precision")
    if "engine_command" in values:
        _refuse(context, {"engine_path", "engine_args", *_PARALLEL}, "write it into --engine-command")
        _check_command(values["engine_command"])
        if "{dtype}" not in values["engine_command"]:
            _refuse(context, {"dtype"}, "--engine-command has no {dtype} in it")


def _refuse(context: click.Context, names: Any, reason: str) -> None:
    typed = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
    ]
    if typed:
        raise click.UsageError(f"{', '.join(typed)} would have no effect: {reason}.", context)


def _check_models(context: click.Context) -> None:
    """Raise UsageError where all models of the command are on servers that run already, or there is none."""
    names: list[str] = []
    for parameter in MODELS:
        value = context.params.get(parameter)
        names += value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []
    if all(name.partition("=")[2].startswith("openai:") or name.startswith("openai:") for name in names):
        reason = "no model runs on this machine (openai:NAME is on a server that runs already)"
        _refuse(context, {"engine", "engine_command"}, reason)


def _check_command(line: str) -> None:
    where, allowed = "--engine-command", ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"not a command line ({error})", where=where, remedy="Check its quotes") from error
    unknown = [name for name in re.findall(r"\{(\w+)\}", line) if name not in PLACEHOLDERS]
    if unknown:
        raise InputError(f"the placeholder {{{unknown[0]}}}", where=where, expected=f"of {allowed}")
    if not words or "{port}" not in line or "{model}" not in line:
        raise InputError(
            f"{line!r} has no {{port}} or no {{model}}",
            where=where,
            expected="a command line such as 'my-server --model {model} --port {port}'",
            remedy=f"Placeholders: {allowed}",
        )
