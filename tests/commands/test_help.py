"""Every command's --help: quick to ask for, complete, and the same words for the same thing everywhere."""

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from functools import cache

import click
import pytest
from conftest import ROOT, load_command

COMMANDS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))

# What takes the caller's time to import; none of it is needed to say what a command does.
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft")

# What every step of the method takes, spelled so.
CONTRACT = {"--output", "--seed", "--limit", "--device", "--dtype", "--json", "--dry-run", "--overwrite"}


@cache
def asked(name: str, *words: str) -> subprocess.CompletedProcess:
    """`<name>.py <words> --help` in a process of its own, which then says what heavy modules it has loaded."""
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        f"    print('loaded:', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    script = str(ROOT / "scripts" / f"{name}.py")
    # run_path does not put the script's folder first in sys.path, as `python script.py` does.
    return subprocess.run(
        [sys.executable, "-c", code, script, *words, "--help"],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "scripts")},
    )


def parts(name: str) -> list[tuple[tuple[str, ...], click.Command]]:
    """(words after the script's name, click command): the command itself, or a group and its subcommands."""
    command = load_command(name)
    if not isinstance(command, click.Group):
        return [((), command)]
    return [((), command), *(((word,), sub) for word, sub in command.commands.items())]


ALL = [(name, *words) for name in COMMANDS for words, _ in parts(name)]


def command_of(words) -> click.Command:
    return dict(parts(words[0]))[words[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_loads_nothing_heavy(words):
    result = asked(*words)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "loaded: []"


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_a_purpose_an_example_and_every_option(words):
    command, text = command_of(words), " ".join(asked(*words).stdout.split())
    purpose = command.help.strip().splitlines()[0]
    assert purpose[0].isupper() and purpose[-1] in ".:" and purpose in text, "one line, one sentence"
    assert f"python scripts/{' '.join([f'{words[0]}.py', *words[1:]])} " in text.partition("Example:")[2]
    for option in command.params:
        if isinstance(option, click.Argument):
            assert option.metavar in text
        else:
            assert option.opts[-1] in text and option.help


# evaluate.py has a gate for figures; revise.py and run.py have one for revisions, which names its judge.
TWO_MEANINGS = {"--gate"}


def test_options_are_spelled_the_same_everywhere():
    ways = defaultdict(lambda: defaultdict(list))
    for words in ALL:
        for option in command_of(words).params:
            for flag in option.opts if isinstance(option, click.Option) else ():
                assert re.fullmatch("-n|--[a-z]+(-[a-z]+)*", flag), (words, flag)
                # One flag, one variable, one way of giving it, in whatever command.
                ways[flag][option.name, option.is_flag, option.nargs].append(words)
    assert {flag: dict(found) for flag, found in ways.items() if len(found) > 1}.keys() <= TWO_MEANINGS


NO_STEPS = ("tiny", "smollm2", "report", "figures", "push", "constitution", "doctor", "export", "merge")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NO_STEPS])
def test_every_step_takes_what_all_take(name):
    flags = {flag for option in load_command(name).params for flag in option.opts}
    assert flags >= CONTRACT
    assert "--input" in flags and flags & {"--model", "--policy"}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_the_example_is_understood(words):
    name = words[0]
    example = command_of(words).help.partition("Example:")[2].replace("\\\n", " ")
    python, script, *arguments = shlex.split(example)
    assert (python, script) == ("python", f"scripts/{name}.py")
    command = load_command(name)
    if isinstance(command, click.Group):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(name, arguments)  # an option it does not know is an error
