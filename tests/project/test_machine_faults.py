"""Faults of the place: a full disk, a folder that is read-only, signals, pipes, clocks, memory, a changing input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import models
import pytest
from conftest import ROOT

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.sources import Source

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [{"id": f"r{n}", "prompt": f"How do I open gate {n}?"} for n in range(64)])
    return path


def line(rows, output, *more):
    arguments = (
        "--input",
        rows,
        "--output",
        output,
        "--model",
        models.folder("llama"),
        "--max-new-tokens",
        12,
        "--temperature",
        0,
        "--device",
        "cpu",
        "--batch-size",
        2,
        *more,
    )
    return [str(part) for part in arguments]


def launch(*arguments, before=(), command="generate", **more):
    """The command in a process of its own."""
    return subprocess.Popen(
        [*before, sys.executable, str(ROOT / "scripts" / f"{command}.py"), *arguments],
        env=ENVIRONMENT,
        text=True,
        # A shell starts what runs in its background with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


def until(condition, process, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def complete(path, count=64):
    assert [row["id"] for _, row in read_jsonl(path)] == [f"r{n}/0" for n in range(count)]
    assert not [p.name for p in path.parent.glob(f"{path.name}.*") if p.name != f"{path.name}.run.json"]


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(number, name, rows, tmp_path, invoke):
    output = tmp_path / "out.jsonl"
    process = launch(*line(rows, output, "--overwrite"))
    journal = tmp_path / "out.jsonl.partial"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and "Traceback" not in said
    assert f"error: stopped by {name}. What is done is kept; go on with: python " in said
    going_on = said.rpartition("go on with: ")[2]
    assert str(output) in going_on and "--overwrite" not in going_on, "that would throw away what is done"
    assert not (tmp_path / "out.jsonl.lock").exists() and not output.exists()
    done = journal.read_bytes().count(b"\n")
    assert journal.read_bytes().endswith(b"\n") and read_manifest(output)["status"] == "running"
    assert invoke("generate", *line(rows, output)).exit_code == 0
    complete(output)
    assert read_manifest(output)["tokens"]["rows"] == 64 - done


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_stops_a_training_and_it_goes_on_from_its_last_state(number, name, tmp_path, invoke):
    source, output = tmp_path / "in.jsonl", tmp_path / "sft"
    write_jsonl(
        source,
        [
            {
                "id": str(n),
                "prompt": f"Gate {n}?",
                "response": "x",
                "rounds": [{"principle": "p", "critique": "c", "revision": f"Ask the owner of {n}.", "flags": []}],
            }
            for n in range(16)
        ],
    )
    arguments = [
        str(part)
        for part in (
            "--input",
            source,
            "--output",
            output,
            "--model",
            models.folder("llama"),
            "--device",
            "cpu",
            "--batch-size",
            2,
            "--epochs",
            3,
            "--save-steps",
            1,
        )
    ]
    process = launch(*arguments, command="sft")
    until(lambda: any(output.glob("checkpoints/checkpoint-*/trainer_state.json")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and "Traceback" not in said
    assert f"error: stopped by {name}. What is done is kept; go on with: python " in said
    assert not (tmp_path / "sft.lock").exists() and read_manifest(output)["status"] == "running"
    assert invoke("sft", *arguments).exit_code == 0
    manifest = read_manifest(output)
    assert manifest["status"] == "done" and manifest["resumed"] == 1 and manifest["counts"]["steps"] == 24


# --- pipes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_no_work(rows, tmp_path):
    """`... 2>&1 | head -1`: what nobody reads is not said, and the rows are all written."""
    reading, writing = os.pipe()
    os.close(reading)
    output = tmp_path / "out.jsonl"
    process = launch(*line(rows, output), stdout=writing, stderr=writing)
    os.close(writing)
    assert process.wait(240) == 0
    complete(output)
    # Again, with nothing to do but to say so.
    reading, writing = os.pipe()
    os.close(reading)
    process = launch(*line(rows, output), stdout=writing)
    os.close(writing)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0 and "Traceback" not in said and "done already" in said


# --- the disk ----------------------------------------------------------------------------------------------------


def small_disk(folder, command: list[str], kilobytes: int) -> list[str]:
    """The command where `folder` is a disk of so many kilobytes; the test is skipped where that is not allowed."""
    mount = f'mount -t tmpfs -o size={kilobytes}k none "$1" && shift && exec "$@"'
    line = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder)]
    if not shutil.which("unshare") or subprocess.run([*line, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return [*line, *command]


SPEND = """
import json, os, subprocess, sys
folder, room, *command = sys.argv[1:]
# All but so many bytes of the disk are taken; then the command; then there is room, and the command again.
space = os.statvfs(folder)
ballast = os.path.join(folder, "ballast")
with open(ballast, "wb") as file:
    file.write(bytes(space.f_bavail * space.f_bsize - int(room)))
first = subprocess.run(command, capture_output=True, text=True)
names = sorted(os.listdir(folder))
os.unlink(ballast)
second = subprocess.run(command, capture_output=True, text=True)
output = os.path.join(folder, "out.jsonl")
ids = [json.loads(line)["id"] for line in open(output)] if os.path.isfile(output) else None
print(json.dumps({"first": [first.returncode, first.stderr], "names": names, "ids": ids,
                  "second": [second.returncode, second.stderr]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 8192])
def test_a_full_disk_is_said_and_what_is_done_is_kept(room, rows, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *line(rows, disk / "out.jsonl")]
    ran = subprocess.run(
        small_disk(disk, [sys.executable, "-c", SPEND, str(disk), str(room), *command], 256),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    found = json.loads(ran.stdout)
    code, said = found["first"]
    assert code in (1, 2) and "No space left on device" in said and "Traceback" not in said
    assert "out.jsonl" not in found["names"]
    code, said = found["second"]
    assert code == 0, said
    assert found["ids"] == [f"r{n}/0" for n in range(64)]


@pytest.mark.slow
def test_a_full_disk_while_weights_are_saved(tmp_path):
    disk, source = tmp_path / "disk", tmp_path / "in.jsonl"
    disk.mkdir()
    write_jsonl(
        source,
        [
            {
                "id": str(n),
                "prompt": f"Gate {n}?",
                "response": "x",
                "rounds": [{"principle": "p", "critique": "c", "revision": f"Ask the owner of {n}.", "flags": []}],
            }
            for n in range(8)
        ],
    )
    command = [
        sys.executable,
        str(ROOT / "scripts" / "sft.py"),
        "--input",
        str(source),
        "--output",
        str(disk / "sft"),
        "--model",
        str(models.folder("llama")),
        "--device",
        "cpu",
        "--save-steps",
        "1",
        "--epochs",
        "1",
    ]
    ran = subprocess.run(
        small_disk(disk, [sys.executable, "-c", SPEND, str(disk), "100000", *command], 4096),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    found = json.loads(ran.stdout)
    code, said = found["first"]
    assert code == 1 and "Traceback" not in said, said
    assert "No space left" in said or "os error 28" in said or "PytorchStreamWriter" in said
    assert found["second"][0] == 0, found["second"][1]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(rows, tmp_path):
    """Made by a mount, since permissions do not hold for the superuser."""
    place = tmp_path / "place"
    place.mkdir()
    mount = 'mount -t tmpfs -o ro none "$1" && shift && exec "$@"'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(place)]
    small_disk(place, ["true"], 64)
    process = launch(*line(rows, place / "out.jsonl"), before=unshare)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in said
    assert f"{place}/out.jsonl: cannot write" in said and "Check --output" in said


@pytest.mark.parametrize(
    ("command", "found", "expected"), [("generate", "a folder", "a file"), ("sft", "a file", "a folder")]
)
def test_an_output_of_the_other_kind(command, found, expected, invoke, rows, tmp_path):
    output = tmp_path / "out"
    if command == "generate":
        output.mkdir()
    else:
        output.write_text("mine")
        write_jsonl(rows, [{"prompt": "x", "rounds": [{"principle": "p", "critique": "c", "revision": "r"}]}])
    result = invoke(command, "--input", rows, "--output", output, "--model", models.folder("llama"))
    assert result.exit_code == 2 and f"{output}: {found}; expected {expected}" in result.stderr
    assert output.is_dir() if command == "generate" else output.read_text() == "mine"


# --- the input ---------------------------------------------------------------------------------------------------


def test_an_input_that_grows_while_it_is_read(tmp_path, capsys):
    """Rows that came after the check are left out with a warning, and take nobody's id."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_jsonl(one, [{"prompt": f"a{n}"} for n in range(5)])
    write_jsonl(other, [{"id": "last", "prompt": "b"}])
    source = Source([str(one), str(other)])
    read = iter(source)
    first = next(read)
    with open(one, "ab") as file:
        file.write(b'{"prompt": "more"}\n{"prompt": "torn in the mid')
    found = [first, *read]
    assert [row["prompt"] for row in found] == ["a0", "a1", "a2", "a3", "a4", "b"]
    assert found[-1]["id"] == "last"
    assert f"{one} has grown since it was checked: what was added is left out" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_an_input_that_changes_while_it_is_read_is_an_error(change, tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_jsonl(one, [{"prompt": f"a{n}" * 20_000} for n in range(5)])
    write_jsonl(other, [{"id": "last", "prompt": "b"}])
    source = Source([str(one), str(other)])
    read, found = iter(source), []
    found.append(next(read))
    raw = one.read_bytes()
    one.write_bytes(raw[: raw.index(b"\n") + 1] if change == "shorter" else raw.replace(b"a4", b"c4"))
    with pytest.raises(CaiError, match=r"one\.jsonl: it changed while it was read") as error:
        found.extend(read)
    assert error.value.exit_code == 1 and "last" not in [row["id"] for row in found]


def test_an_input_that_is_still_being_written_is_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [{"prompt": "a"}, {"prompt": "b"}])

    def more(row, where, line):
        with open(path, "ab") as file:
            file.write(b'{"prompt": "c"}\n' if line == 2 else b"")

    with pytest.raises(InputError, match="it changed while it was read"):
        Source([str(path)], check=more)


# --- the clock and the memory ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clock_that_was_set_back_changes_nothing(rows, tmp_path, invoke):
    """What is on disk comes from a time that is still to come."""
    output = tmp_path / "out.jsonl"
    process = launch(*line(rows, output))
    journal = tmp_path / "out.jsonl.partial"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3, process)
    process.kill()
    process.communicate()
    later = time.time() + 10 * 365 * 86400
    for path in (rows, journal, tmp_path / "out.jsonl.run.json"):
        os.utime(path, (later, later))
    manifest = tmp_path / "out.jsonl.run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "started": "2099-01-01T00:00:00+00:00"}))
    assert invoke("generate", *line(rows, output)).exit_code == 0
    complete(output)
    assert read_manifest(output)["seconds"] >= 0


HUNGRY = """
import resource, runpy, sys
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_memory_that_runs_out_is_said(tmp_path):
    rows = tmp_path / "in.jsonl"
    with open(rows, "wb") as file:
        file.write(b'{"prompt": "' + b"x" * (200 << 20) + b'"}\n')
    ran = subprocess.run(
        [sys.executable, "-c", HUNGRY, str(ROOT / "scripts" / "generate.py"), *line(rows, tmp_path / "out.jsonl")],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT / "scripts")},
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert "error: the memory is full" in ran.stderr and "--batch-size" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("bytearray(1 << 60)", "the memory is full"),
        ("__import__('torch').empty(1 << 50)", "the memory is full"),
        (
            "open('/dev/full', 'w', buffering=1).write('x\\n')",
            "the system refuses ([Errno 28] No space left on device)",
        ),
        ("1 / 0", None),
    ],
)
def test_what_the_machine_refuses_is_no_bug_of_ours(code, said):
    """And what is a bug stays one, with its traceback."""
    import click
    from click.testing import CliRunner

    @click.command(cls=cli.Command)
    def command():
        eval(code)

    result = CliRunner().invoke(command)
    assert result.exit_code == 1
    if said is None:
        assert isinstance(result.exception, ZeroDivisionError)
    else:
        assert f"error: {said}" in result.stderr and "go on with: python " in result.stderr
