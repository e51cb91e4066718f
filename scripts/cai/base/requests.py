"""Requests to servers as a command sees them: their options, and the counts that progress, summary and manifest show.

    with_options = requests.request_options(command)
    requests.request_timeout(), requests.sends_seeds(), requests.request_counts()

Kept in click's context, so that no function has to pass them on. Leaves out the requests themselves
(models/servers.py), `--endpoint` and `--key-name` (cli.py).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import click
from click.core import ParameterSource

TIMEOUT = 120.0  # seconds, at most, for one request

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Entries of click's context.
_TIMEOUT, _UNSEEDED, _COUNTS = "request_timeout", "no_server_seed", "request_counts"
_FILE = "endpoints_file"


@dataclass
class RequestCounts:
    """What became of the requests of a command, or of a whole run.

    answered: how many got an answer. retried: attempts after which a request was sent again. silent: those of them
    that were given up because no answer came in time. failed: requests that no server would answer. waiting: requests
    under way.
    """

    answered: int = 0
    retried: int = 0
    silent: int = 0
    failed: int = 0
    waiting: int = 0

    @classmethod
    def read(cls, counts: object) -> "RequestCounts":
        """The counts as a manifest keeps them; zeros for what is not there or is not a count."""
        known = counts if isinstance(counts, Mapping) else {}
        numbers = {field.name: known.get(field.name, 0) for field in fields(cls)}
        return cls(**{name: number if isinstance(number, int) else 0 for name, number in numbers.items()})

    def __add__(self, other: "RequestCounts") -> "RequestCounts":
        return RequestCounts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __sub__(self, other: "RequestCounts") -> "RequestCounts":
        return RequestCounts(*(a - b for a, b in zip(self._values(), other._values(), strict=True)))

    def add(self, other: "RequestCounts") -> None:
        """Add to these counts, which others may hold."""
        for name, number in asdict(self + other).items():
            setattr(self, name, number)

    def __bool__(self) -> bool:
        return any(self._values())

    def _values(self) -> list[int]:
        return list(asdict(self).values())

    def describe(self, longest: float) -> str:
        """For a progress line. longest: seconds that the oldest request under way has waited."""
        return f"{self.waiting} waiting up to {longest:.0f} s, {self.retried} retried, {self.failed} failed"


@dataclass
class RequestReport:
    """The requests of the command that is running.

    unseeded: why sampled texts carry no seed, or "".
    """

    counts: RequestCounts
    unseeded: str = ""


def request_options(function: _Function) -> _Function:
    """Add `--endpoints-file`, `--request-timeout` and `--no-server-seed`."""
    function = click.option(
        "--endpoints-file",
        metavar="FILE",
        expose_value=False,
        callback=_keep(_FILE),
        help="Instead of --endpoint: a file with the address of a replica per line, which may come and go meanwhile.",
    )(function)
    return patience_options(function)


def patience_options(function: _Function) -> _Function:
    """Add `--request-timeout` and `--no-server-seed`: for a command whose models name their servers themselves."""
    function = click.option(
        "--no-server-seed",
        is_flag=True,
        expose_value=False,
        callback=_keep(_UNSEEDED),
        help="Send no seeds to servers, such as one that dies on them; sampled texts can't be repeated then.",
    )(function)
    return click.option(
        "--request-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        expose_value=False,
        callback=_keep(_TIMEOUT),
        help=f"Longest wait for one answer of a server; less where the others come sooner.  [default: {TIMEOUT:g}]",
    )(function)


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that keeps an option's value; where it is not given, an outer command's value stays."""

    def callback(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value:
            context.meta[key] = value

    return callback


def refuse_without_server(context: click.Context) -> None:
    """Raise UsageError for an option of requests on the command line, where no model is on a server.

    One that the command starts itself (`--engine`, where a command has it) is a server too.
    """
    typed = [
        option.opts[0]
        for option in context.command.params
        if option.name in (_TIMEOUT, _UNSEEDED, _FILE)
        and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
    ]
    own = any(
        context.get_parameter_source(name) == ParameterSource.COMMANDLINE for name in ("engine", "engine_command")
    )
    if typed and not own and not any(_names_server(value) for value in context.params.values()):
        raise click.UsageError(f"{', '.join(typed)} would have no effect: no model is on a server (openai:NAME).")
    if "--endpoints-file" in typed and (own or context.params.get("endpoints")):
        raise click.UsageError("--endpoints-file would have no effect: the servers are named otherwise.")


def _names_server(value: object) -> bool:
    """Whether an option's value is `openai:NAME`, maybe after `NAME=`, or has it among its parts."""
    if isinstance(value, str):
        return value.startswith("openai:") or "=openai:" in value
    return isinstance(value, list | tuple) and any(map(_names_server, value))


def command_options() -> list[str]:
    """These options as arguments of another command line; [] where none was given."""
    context = click.get_current_context(silent=True)
    meta = context.meta if context else {}
    timeout = ["--request-timeout", f"{meta[_TIMEOUT]:g}"] if _TIMEOUT in meta else []
    file = ["--endpoints-file", meta[_FILE]] if _FILE in meta else []
    return [*file, *timeout, *(["--no-server-seed"] if _UNSEEDED in meta else [])]


def endpoints_file() -> str | None:
    """The file of --endpoints-file."""
    context = click.get_current_context(silent=True)
    return context.meta.get(_FILE) if context else None


def request_timeout() -> float:
    """Seconds of --request-timeout."""
    context = click.get_current_context(silent=True)
    seconds: float | None = context.meta.get(_TIMEOUT) if context else None
    return seconds or TIMEOUT


def sends_seeds() -> bool:
    """Whether requests carry seeds: not with --no-server-seed."""
    context = click.get_current_context(silent=True)
    return not (context and context.meta.get(_UNSEEDED))


def begin_report(context: click.Context) -> None:
    """Start the report of a command."""
    context.meta[_COUNTS] = RequestReport(RequestCounts())


def request_report() -> RequestReport:
    """The report of the command that is running; an empty one outside of a command."""
    context = click.get_current_context(silent=True)
    new = RequestReport(RequestCounts())
    return new if context is None else context.meta.setdefault(_COUNTS, new)


def sum_counts(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{"requests": their sum} of the counts of several outputs; {} where none had a request."""
    total = sum((RequestCounts.read(each.get("requests")) for each in counts), RequestCounts())
    return {"requests": asdict(total)} if total else {}
