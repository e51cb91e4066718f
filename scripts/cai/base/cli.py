"""What every command shares on its command line: options, errors, exit codes, summary, progress.

    @click.command(cls=Command)
    @cli.options("input", "output", "model", "seed", "limit")
    def main(...): ...

Leaves out what any single command does, and all heavy imports.
"""

import importlib.util
import inspect
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import click
from click.core import ParameterSource

from cai.base import engine_options, events, requests, run_settings
from cai.base.errors import LEAVE_OUT, CaiError
from cai.base.files import expand_patterns
from cai.base.paths import SCRIPTS

SOME_FAILED = 3

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ROWS = "rows"  # the entry of click's context that keeps a RowReport

_QUALIFICATIONS = "qualifications"  # the entry of click's context that keeps verdicts on models

_KEY_NAME = "key_name"  # the entry of click's context that keeps the value of --key-name

_EVENTS = "events"  # the entry of click's context that keeps the value of --events

_bar: Any = None  # the progress bar that was begun last


def _endpoint(function: _Function) -> _Function:
    """Add `--endpoint`, the options of requests, and `--key-name`, whose value `key_name` returns without any function
    passing it on."""
    function = click.option(
        "--key-name",
        metavar="NAME",
        expose_value=False,
        callback=lambda context, _option, value: context.meta.__setitem__(_KEY_NAME, value),
        help="Environment variable that holds the server's key.  [default: OPENAI_API_KEY]",
    )(requests.request_options(function))
    return click.option(
        "--endpoint",
        "endpoints",
        multiple=True,
        metavar="URL",
        help="Server of --model openai:NAME, such as http://localhost:8000/v1. Repeatable: replicas.",
    )(function)


def key_name() -> str:
    """Name of the environment variable that holds a server's key, as given on the command line."""
    context = click.get_current_context(silent=True)
    return (context.meta.get(_KEY_NAME) if context else None) or "OPENAI_API_KEY"


def _model(function: _Function) -> _Function:
    """Add `--model`, and `--date` for its chat template."""
    option = click.option(
        "--model",
        required=True,
        metavar="MODEL",
        help="A folder, a GGUF file, a hub id, `tiny` (bundled), or `smollm2`.",
    )
    return option(run_settings.date_option(function))


@dataclass
class RowReport:
    """What a command has left out of its inputs, and found in them.

    skipped: {file:line: why} of bad rows. repeated: {inputs: prompts that occur again}. inputs: what each `Source` has
    read, as {files: {name: SHA-256}, require, limit, reading}.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """For a manifest and a summary; what is 0 is not in it."""
        counts = {"skipped_rows": len(self.skipped), "repeated_prompts": sum(self.repeated.values())}
        return {name: number for name, number in counts.items() if number}


def row_report() -> RowReport:
    """The report of the command that is running; an empty one outside of a command."""
    context = click.get_current_context(silent=True)
    return RowReport() if context is None else context.meta.setdefault(_ROWS, RowReport())


def report_rows(inputs: str, skipped: dict[str, str], repeated: int) -> None:
    """Note bad rows that are left out and repeated prompts, for the summary, the manifests and the exit code."""
    report = row_report()
    skipped = {place: reason.replace(f", {LEAVE_OUT}", "") for place, reason in skipped.items()}
    if new := [reason for place, reason in skipped.items() if place not in report.skipped]:
        for reason in new[:5]:
            warn(f"left out: {reason}")
        warn(f"bad rows of {inputs} that are left out: {len(new)}")
    if repeated and inputs not in report.repeated:
        report.repeated[inputs] = repeated
        warn(
            f"{repeated} prompts of {inputs} repeat an earlier one; delete them unless they should count twice "
            "(export.py leaves them out)"
        )
    report.skipped.update(skipped)


def report_input(**description: Any) -> None:
    """Note what a `Source` has read, for the manifests (see `RowReport`)."""
    if description not in (inputs := row_report().inputs):
        inputs.append(description)


def report_qualification(verdict: str, is_fit: bool) -> None:
    """Note whether a model is fit for what this command does with it, for the summary and the manifests."""
    if context := click.get_current_context(silent=True):
        context.meta.setdefault(_QUALIFICATIONS, {})[verdict] = is_fit


def qualification_counts() -> dict[str, Any]:
    """{qualification: the verdicts, qualified: whether all models are fit} of this command; {} where none is known."""
    context = click.get_current_context(silent=True)
    verdicts = context.meta.get(_QUALIFICATIONS) if context else None
    return {"qualification": " | ".join(verdicts), "qualified": all(verdicts.values())} if verdicts else {}


def refuse_options(names: Collection[str], reason: str) -> None:
    """Raise UsageError for parameters on the command line that have no effect.

    Args:
        names: of the parameters.
        reason: why they have none.
    """
    context = click.get_current_context()
    flags = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if flags:
        raise click.UsageError(f"{', '.join(flags)} would have no effect: {reason}.")


def exit_if_failed(counts: Mapping[str, Any]) -> None:
    """Exit with 3 if the counts have failed or skipped rows."""
    if counts.get("failed") or counts.get("skipped_rows"):
        click.get_current_context().exit(SOME_FAILED)


def _keep_events(context: click.Context, _option: click.Parameter, path: str | None) -> None:
    """Keep the value of --events for `Command.invoke`; the steps of run.py, which lack it, leave it as it is."""
    if path is not None:
        context.meta[_EVENTS] = path


def _expand(_context: click.Context, _option: click.Parameter, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(expand_patterns(names))


def rows_option(name: str, *declarations: str, **settings: Any) -> Callable[[_Function], _Function]:
    """A repeatable option for files of rows; a pattern such as `part-*.jsonl` becomes the files that it matches."""
    return click.option(name, *declarations, multiple=True, metavar="FILE", callback=_expand, **settings)


# One spelling and one sentence for each: a command names the options it takes.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "input": rows_option(
        "--input",
        "inputs",
        required=True,
        help="File of rows to read (JSONL, JSON, CSV, Parquet, text), a pattern such as 'part-*.jsonl', a folder of "
        "save_to_disk, or a dataset id. Repeatable.",
    ),
    "output": click.option("--output", required=True, metavar="PATH", help="Where the result goes."),
    "model": _model,
    "date": run_settings.date_option,
    "reasoning_tags": run_settings.reasoning_option,
    "endpoint": _endpoint,
    "engine": engine_options.engine_options,
    "constitution": click.option(
        "--constitution",
        default="harmlessness",
        show_default=True,
        metavar="NAME|FILE",
        help="A YAML file, or the name of one in constitutions/.",
    ),
    "principle": click.option(
        "--principle",
        "principles",
        multiple=True,
        metavar="ID",
        help="Only this principle; repeatable.  [default: all]",
    ),
    "examples": click.option(
        "--examples",
        "most_examples",
        type=click.IntRange(min=0),
        default=None,
        metavar="N",
        help="Show at most N of the constitution's worked examples first; 0: none.  [default: all that fit; none for "
        "`tiny`, whose context they would fill]",
    ),
    "seed": click.option("--seed", default=0, show_default=True, help="Seed of every draw."),
    "limit": click.option("--limit", type=click.IntRange(min=1), default=None, help="Read only the first N rows."),
    "batch_size": click.option(
        "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Rows in one forward pass."
    ),
    "temperature": click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.7,
        show_default=True,
        help="Sampling temperature; 0 is greedy.",
    ),
    "top_p": click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        help="Nucleus sampling: the smallest set of tokens with this probability.",
    ),
    "max_new_tokens": click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Longest answer, in tokens; the prompt is not counted.",
    ),
    "device": click.option("--device", default=None, help="cpu, cuda, cuda:1, mps; by default the best available."),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on a GPU, and where nothing is trained on a CPU that is faster with it; else float32.",
    ),
    "events": click.option(
        "--events",
        metavar="FILE",
        expose_value=False,
        callback=_keep_events,
        help="Append JSON lines to this file while it runs: progress, warnings, figures, the end.",
    ),
    "json": click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    "dry_run": click.option("--dry-run", is_flag=True, help="Print what would be done; load no model, write nothing."),
    "overwrite": click.option("--overwrite", is_flag=True, help="Start again even if the output exists."),
}


def options(*names: str) -> Callable[[_Function], _Function]:
    """Decorator that adds the named shared options (keys of `_OPTIONS`), in this order."""

    def decorate(function: _Function) -> _Function:
        for name in reversed(names):
            function = _OPTIONS[name](function)
        return function

    return decorate


class _UsageError(click.ClickException):
    """An error in an option's value, printed as every other error."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        _print(f"error: {self.message}")


def given_options(*names: str) -> list[str]:
    """The options of the running command with these parameter names, as they were typed: what is left at its default
    is not among them."""
    context, words = click.get_current_context(), []
    for parameter in context.command.params:
        if parameter.name not in names or context.get_parameter_source(parameter.name) != ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name]
        for item in value if parameter.multiple else [value]:
            values = [] if getattr(parameter, "is_flag", False) else item if parameter.nargs > 1 else [item]
            words += [parameter.opts[0], *map(str, values)]
    return words


class Command(click.Command):
    """A click command that turns our errors into one line on stderr and the exit codes of the contract.

    Adds `--debug`, which shows the traceback as well.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=lambda context, _option, value: context.meta.__setitem__("debug", value),
                help="Show the traceback of an error.",
            )
        )

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            context = super().make_context(*args, **kwargs)
            engine_options.check_options(context)
        except CaiError as error:  # of an option's value
            raise _UsageError(str(error)) from error
        requests.refuse_without_server(context)
        return context

    def invoke(self, ctx: click.Context) -> Any:
        ctx.meta[_ROWS] = RowReport()
        ctx.meta[_QUALIFICATIONS] = {}
        requests.begin_report(ctx)
        run_settings.forget_dated_template()
        # A command that runs this one in its own process (run.py) handles the error itself.
        if ctx.parent is not None and not isinstance(ctx.parent.command, click.Group):
            return super().invoke(ctx)
        path = ctx.meta.get(_EVENTS)
        if path and ctx.params.get("dry_run"):
            raise click.UsageError("--events would have no effect: --dry-run does no work.", ctx)
        try:
            with _interrupt_on_sigterm(), events.record(path, _name(ctx), _read_outcome, line=command_line()):
                result = super().invoke(ctx)
            _leave_process_group()
            return result
        except BrokenPipeError:
            # The reader went away (`| head`): not our failure, and nothing more can be printed.
            _discard(sys.stdout)
            ctx.exit(0)
        except (Exception, KeyboardInterrupt) as exception:
            error = _explain_error(exception)
            if error is None:
                raise
            if ctx.meta.get("debug"):
                traceback.print_exc()
            _print(f"error: {error}")
            ctx.exit(error.exit_code)


def _name(context: click.Context) -> str:
    """The command's name: `generate`, or with a subcommand `constitution coverage`."""
    function: Any = inspect.unwrap(context.command.callback)  # type: ignore[arg-type]
    is_part = context.parent is not None
    script = context.parent.info_name if is_part else function.__code__.co_filename  # type: ignore[union-attr]
    return f"{Path(str(script)).stem}{f' {context.info_name}' if is_part else ''}"


def _leave_process_group() -> None:
    """Leave the group of processes that a launcher started: an interpreter that ends while PyTorch's threads for the
    group still work is aborted now and then, and a finished run counts as failed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _explain_error(exception: BaseException) -> CaiError | None:
    """The error to print for an exception that the user or the machine has caused; None for a bug of ours."""
    if isinstance(exception, CaiError):
        return exception
    resume = f"What is done is kept; go on with: {command_line(again=True)}"
    if isinstance(exception, KeyboardInterrupt):
        return CaiError(f"stopped by {str(exception) or 'Ctrl-C'}. {resume}")
    kind, text = type(exception).__name__, " ".join(str(exception).split())[:300]
    # PyTorch and safetensors report a lack of memory and failures of files by their messages alone.
    if isinstance(exception, MemoryError) or kind == "OutOfMemoryError" or "allocate memory" in text:
        return CaiError(f"the memory is full ({text or kind}). Take a smaller --batch-size. {resume}")
    is_file_error = "PytorchStreamWriter" in text or (kind == "SafetensorError" and "os error" in text)
    if isinstance(exception, OSError) or is_file_error:
        return CaiError(f"the system refuses ({text or kind}); --debug shows where. {resume}")
    return None


def _read_outcome(exception: BaseException) -> tuple[int, str]:
    """(exit code, text of the error) of what leaves a command."""
    if isinstance(exception, click.exceptions.Exit):
        return exception.exit_code, ""
    if isinstance(exception, BrokenPipeError):
        return 0, ""
    if isinstance(exception, click.ClickException):
        return exception.exit_code, exception.format_message()
    error = _explain_error(exception)
    return (1, f"{type(exception).__name__}: {exception}") if error is None else (error.exit_code, str(error))


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM stop the command as Ctrl-C does: files are closed, locks released. A second one ends it at once.

    Not where a launcher started several processes: it wants them gone.
    """
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line(*, again: bool = False) -> str:
    """The command line as typed; a command that run.py calls in its own process finds its line in click's context.

    again: the line that resumes this process: with `python` in front and without --overwrite.
    """
    if again:
        return shlex.join(["python", *(part for part in sys.argv if part != "--overwrite")])
    context = click.get_current_context(silent=True)
    return (context.meta.get("command_line") if context else None) or shlex.join(sys.argv)


def load_command(name: str) -> click.Command:
    """The click command of scripts/<name>.py."""
    module_name = f"command_{name}"
    if module_name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(module_name, SCRIPTS / f"{name}.py")
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    command: click.Command = sys.modules[module_name].main
    return command


def read_settings(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """{parameter: value} of a command line of scripts/<name>.py, defaults included; runs nothing."""
    return load_command(name).make_context(name, list(arguments)).params


def call_command(name: str, arguments: Sequence[str], line: str) -> int:
    """Run scripts/<name>.py in this process, its stdout on stderr; returns its exit code.

    line: its command line, for its manifests. Raises whatever the command raises.
    """
    context = click.get_current_context()
    debug, context.meta["command_line"] = context.meta.get("debug"), line
    try:
        with redirect_stdout(sys.stderr):
            return load_command(name).main(list(arguments), prog_name=name, standalone_mode=False, parent=context) or 0
    except click.Abort as error:  # what click makes of an interrupt, without its reason
        raise error.__cause__ or error from None
    finally:
        context.meta["debug"] = debug


def warn(message: str) -> None:
    """Print a warning on stderr."""
    events.emit("warning", text=message)
    _print(f"warning: {message}")


def note(message: str, *, is_event: bool = True) -> None:
    """Print a line of progress on stderr.

    is_event: for --events too; off where the events say the same.
    """
    if is_event:
        events.emit("progress", text=message)
    _print(message)


def _print(message: str, err: bool = True) -> None:
    """Print a line on stderr or stdout; if its reader has gone away, the work continues."""
    try:
        click.echo(message, err=err)
    except BrokenPipeError:
        _discard(sys.stderr if err else sys.stdout)


def _discard(stream: TextIO) -> None:
    """Send what is still in the stream's buffer, and all that follows, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Stderr:
    """stderr for a progress bar: the work does not depend on its reader."""

    def write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except BrokenPipeError:
            _discard(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def finish(
    summary: dict[str, Any], *, as_json: bool, next_command: str | None = None, alternative: str | None = None
) -> None:
    """Print the summary; exit with 3 if records failed or were skipped, else return.

    What is known of the models comes first. Where one is unfit, no line to run next is recommended.

    Args:
        summary: flat names to values, in the order to show them; nested values are shown as JSON.
        next_command: the line to run next, printed for people and under "next" in JSON.
        alternative: a line to run instead, printed as "or".
    """
    first: dict[str, Any] = {name: summary[name] for name in ("qualification", "qualified") if name in summary}
    summary = first | summary | row_report().counts
    if summary.get("qualified") is False:
        next_command = alternative = None
    for name, line in (("next", next_command), ("or", alternative)):
        if line:
            summary[name] = _from_here(line)
    events.emit_figures(summary)
    if as_json:
        _print(json.dumps(summary, ensure_ascii=False), err=False)
    else:
        width = max(len(name) for name in summary)
        for name, value in summary.items():
            if isinstance(value, float):
                value = f"{value:.4g}"
            elif isinstance(value, dict | list):
                value = json.dumps(value, ensure_ascii=False)
            _print(f"{name:<{width}}  {value}", err=False)
    exit_if_failed(summary)


def _from_here(command: str) -> str:
    """A line `python scripts/...` with the folder by which this process was called, so that it runs from here."""
    folder = os.path.dirname(sys.argv[0])
    if not folder or os.path.realpath(folder) != str(SCRIPTS):
        return command
    return command.replace("python scripts/", f"python {shlex.quote(folder)}/", 1)


def progress(total: int, label: str, done: int = 0, unit: str = "row") -> Any:
    """A tqdm bar on stderr; when stderr is no terminal, a line at most every thirty seconds. Also for --events.

    done: how many are done already.
    """
    from tqdm import tqdm

    global _bar
    terminal = sys.stderr.isatty()
    _bar = tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=unit,
        file=_Stderr(),
        disable=None if terminal else False,
        mininterval=0.1 if terminal else 30,
        miniters=None if terminal else 1,
        leave=terminal,
        delay=0 if terminal else 30,
    )
    events.watch_bar(_bar, label)
    return _bar


def show_in_progress(text: str) -> None:
    """Put `text` at the end of the progress bar that was begun last, and draw the bar if it is time, row or no row."""
    if _bar is None or _bar.disable:  # a closed one is disabled
        return
    _bar.set_postfix_str(text, refresh=False)
    now = time.time()
    if now >= _bar.start_t + _bar.delay and now >= _bar.last_print_t + _bar.mininterval:
        _bar.refresh()
        _bar.last_print_t = now
