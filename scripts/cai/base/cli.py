"""What every command shares on its command line: options, errors, exit codes, summary, progress.

    @click.command(cls=Command)
    @cli.options("input", "output", "model", "seed", "limit")
    def main(...): ...

Leaves out what any single command does, and all heavy imports.
"""

import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from cai.base.errors import CaiError
from cai.base.paths import SCRIPTS

SOME_FAILED = 3

_KEY_NAME = "key_name"  # where click's context keeps what --key-name says


def _endpoint(function):
    """`--endpoint`, and `--key-name`, which `key_name` gives back: a name is passed on by nobody in between."""
    function = click.option(
        "--key-name",
        metavar="NAME",
        expose_value=False,
        callback=lambda ctx, _param, value: ctx.meta.__setitem__(_KEY_NAME, value),
        help="Variable of the environment that holds the server's key.  [default: OPENAI_API_KEY]",
    )(function)
    return click.option(
        "--endpoint",
        "endpoints",
        multiple=True,
        metavar="URL",
        help="Server of --model openai:NAME, such as http://localhost:8000/v1. Repeatable: replicas.",
    )(function)


def key_name() -> str:
    """Variable of the environment that holds the key of a server, as the command line says."""
    context = click.get_current_context(silent=True)
    return (context.meta.get(_KEY_NAME) if context else None) or "OPENAI_API_KEY"


# One spelling and one sentence each: a command names the options it takes.
_OPTIONS = {
    "input": click.option(
        "--input",
        "inputs",
        multiple=True,
        required=True,
        metavar="FILE",
        help="File of rows to read (JSONL, JSON, CSV, Parquet, text), or a dataset id. Repeatable.",
    ),
    "output": click.option("--output", required=True, metavar="PATH", help="Where the result goes."),
    "model": click.option("--model", required=True, metavar="MODEL", help="A folder, a hub id, or `tiny` (bundled)."),
    "endpoint": _endpoint,
    "constitution": click.option(
        "--constitution",
        default="harmlessness",
        show_default=True,
        metavar="NAME|FILE",
        help="A YAML file, or the name of one in constitutions/.",
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
    "device": click.option("--device", default=None, help="cpu, cuda, cuda:1, mps; by default the best there is."),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 where the device has it, float32 on a CPU.",
    ),
    "json": click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    "dry_run": click.option("--dry-run", is_flag=True, help="Say what would be done; load no model, write nothing."),
    "overwrite": click.option("--overwrite", is_flag=True, help="Start anew even if the output exists."),
}


def options(*names: str):
    """Decorator that adds the named shared options (keys of `_OPTIONS`), in this order."""

    def decorate(function):
        for name in reversed(names):
            function = _OPTIONS[name](function)
        return function

    return decorate


class Command(click.Command):
    """A click command that turns our errors into one line on stderr and the contract's exit codes.

    Adds `--debug`, which shows the traceback as well.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_set_debug,
                help="Show the traceback of an error.",
            )
        )

    def invoke(self, ctx):
        # A command that runs this one in its own process (run.py) takes the error, not a printed line.
        if ctx.parent is not None and not isinstance(ctx.parent.command, click.Group):
            return super().invoke(ctx)
        try:
            with _stopped_by_sigterm():
                result = super().invoke(ctx)
            _leave_the_others()
            return result
        except BrokenPipeError:
            # The reader went away (`| head`): not our failure, and nothing more can be said.
            _let_go(sys.stdout)
            ctx.exit(0)
        except (Exception, KeyboardInterrupt) as found:
            error = _told(found)
            if error is None:
                raise
            if ctx.meta.get("debug"):
                traceback.print_exc()
            _say(f"error: {error}")
            ctx.exit(error.exit_code)


def _leave_the_others() -> None:
    """Takes this process out of those that a launcher started: an interpreter that ends with PyTorch's threads for
    them still at work is aborted now and then, and a whole run counts as failed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _told(found: BaseException) -> CaiError | None:
    """What is said of an exception that the user or the machine has caused; None for a bug of ours."""
    if isinstance(found, CaiError):
        return found
    kept = f"What is done is kept; go on with: {command_line(again=True)}"
    if isinstance(found, KeyboardInterrupt):
        return CaiError(f"stopped by {str(found) or 'Ctrl-C'}. {kept}")
    kind, said = type(found).__name__, " ".join(str(found).split())[:300]
    # PyTorch says only in words what became of its memory and its files, and safetensors of its own.
    if isinstance(found, MemoryError) or kind == "OutOfMemoryError" or "allocate memory" in said:
        return CaiError(f"the memory is full ({said or kind}). Take a smaller --batch-size. {kept}")
    files = "PytorchStreamWriter" in said or (kind == "SafetensorError" and "os error" in said)
    if isinstance(found, OSError) or files:
        return CaiError(f"the system refuses ({said or kind}); --debug shows where. {kept}")
    return None


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: files are closed, locks given back. A second one ends the process at once.

    Not where a launcher started several processes: it wants them gone.
    """
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return

    def stop(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command_line(*, again: bool = False) -> str:
    """As typed; a command that run.py calls in its own process leaves its line in click's context.

    again: to go on with what was stopped, the process' own: with Python in front, and without --overwrite.
    """
    if again:
        return shlex.join(["python", *(part for part in sys.argv if part != "--overwrite")])
    context = click.get_current_context(silent=True)
    return (context.meta.get("command_line") if context else None) or shlex.join(sys.argv)


def _set_debug(ctx, _param, value):
    ctx.meta["debug"] = value


def warn(message: str) -> None:
    """One line on stderr."""
    _say(f"warning: {message}")


def note(message: str) -> None:
    """One line of progress on stderr."""
    _say(message)


def _say(message: str, err: bool = True) -> None:
    """A line on stderr or stdout; if its reader has gone away, the work goes on all the same."""
    try:
        click.echo(message, err=err)
    except BrokenPipeError:
        _let_go(sys.stderr if err else sys.stdout)


def _let_go(stream) -> None:
    """What else is written to the stream, and what is still in its buffer, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Stderr:
    """stderr for a progress bar, on whose reader the work does not depend."""

    def write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
        except BrokenPipeError:
            _let_go(sys.stderr)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except BrokenPipeError:
            _let_go(sys.stderr)

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


def finish(summary: dict, *, as_json: bool, next_command: str | None = None) -> None:
    """Print the summary and leave with 1 if it was `not_pushed`, with 3 if `failed` counts any record, else return.

    Args:
        summary: flat names to values, in the order to show them; nested values are shown as JSON.
        next_command: the line to run next, shown to people only and under "next" in JSON.
    """
    if next_command:
        summary = {**summary, "next": as_called(next_command)}
    if as_json:
        _say(json.dumps(summary, ensure_ascii=False), err=False)
    else:
        width = max(len(name) for name in summary)
        for name, value in summary.items():
            if isinstance(value, float):
                value = f"{value:.4g}"
            elif isinstance(value, dict | list):
                value = json.dumps(value, ensure_ascii=False)
            _say(f"{name:<{width}}  {value}", err=False)
    if summary.get("not_pushed"):
        click.get_current_context().exit(1)
    if summary.get("failed"):
        click.get_current_context().exit(SOME_FAILED)


def as_called(command: str) -> str:
    """A line `python scripts/...` with the folder by which this process was called, so that it runs from here."""
    folder = os.path.dirname(sys.argv[0])
    if not folder or os.path.realpath(folder) != str(SCRIPTS):
        return command
    return command.replace("python scripts/", f"python {shlex.quote(folder)}/", 1)


def progress(total: int, label: str):
    """A tqdm bar on stderr; when stderr is no terminal, a line at most every thirty seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit="row",
        file=_Stderr(),
        disable=None if terminal else False,
        mininterval=0.1 if terminal else 30,
        miniters=None if terminal else 1,
        leave=terminal,
        delay=0 if terminal else 30,
    )
