"""Engines that a command starts: a stub with vLLM's options, a real program with a real server, in all their fates.

pytest -n 0 tests/models/test_managed.py
PATH=$PATH:/path/to/environment/bin pytest -n 0 tests/models/test_managed.py -k real     # with vLLM itself
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from cai.base.paths import TINY
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.models import launchers

GENERATE = ("--max-new-tokens", 16, "--json")


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """`stub(**behaviour)` sets how the engine behaves; it returns the options that name it. `stub.starts`: a folder."""
    program = tmp_path / "environment" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{(ROOT / 'tests' / 'stub_engine.py').read_text()}")
    program.chmod(0o755)
    starts = tmp_path / "starts"
    starts.mkdir()

    def behave(**behaviour):
        monkeypatch.setenv("STUB_ENGINE", json.dumps({"state": str(starts), **behaviour}))
        return ["--engine", "vllm", "--engine-path", str(program)]

    behave.starts, behave.program = starts, program
    return behave


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"id": str(number), "prompt": f"Question number {number}?"} for number in range(24)])
    return path


def commands(starts: Path) -> list[list[str]]:
    """The command lines of the engines that were started."""
    return [json.loads(text) for path in starts.iterdir() if (text := path.read_text()) != "child"]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def started(starts: Path) -> list[int]:
    return [int(path.name) for path in starts.iterdir()]


def all_gone(starts: Path) -> bool:
    return not any(map(lives, started(starts)))


def begin(tmp_path, prompts, options, name="rows") -> subprocess.Popen:
    """generate.py with the stub, in a process of its own."""
    command = [sys.executable, ROOT / "scripts" / "generate.py", "--input", prompts, "--model", "tiny"]
    command += [*GENERATE, *options, "--output", tmp_path / f"{name}.jsonl"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_an_engine_is_started_used_described_and_stopped(stub, prompts, invoke, tmp_path):
    output = tmp_path / "rows.jsonl"
    options = [*stub(), "--engine-args", "--max-model-len 400", "--dtype", "float32"]
    result = invoke("generate", "--input", prompts, "--model", "tiny", *options, *GENERATE, "--output", output)
    assert result.exit_code == 0, result.output
    assert [row["response"] for _, row in read_jsonl(output)] == [f"Answer to Question number {n}?" for n in range(24)]
    assert all_gone(stub.starts)
    [command] = commands(stub.starts)
    assert command[:2] == ["serve", str(TINY)] and command[-2:] == ["--max-model-len", "400"]
    assert command[command.index("--dtype") + 1] == "float32"

    manifest = json.loads(Path(f"{output}.run.json").read_text())
    assert manifest["fingerprint"]["engine"] == "vllm" and len(manifest["fingerprint"]["weights"]) == 64
    engine = manifest["engine"]
    assert (engine["name"], engine["restarts"], engine["replicas"]) == ("vllm", 0, 1)
    assert engine["log_probabilities"] and engine["continues_prefill"] and not engine["seeds"]
    assert manifest["reproducible_sampling"].startswith("no: ")  # vLLM on a CPU gets no seeds
    assert f"{stub.program} serve {TINY} --host 127.0.0.1 --port '{{port}}'" in engine["command"]
    following = json.loads(result.stdout.splitlines()[-1])["next"]
    assert f"--engine vllm --engine-path {stub.program} --engine-args '--max-model-len 400'" in following
    assert "--model tiny" in following and "127.0.0.1" not in following


@pytest.mark.slow
def test_rows_of_one_engine_are_not_continued_by_another(stub, prompts, invoke, tmp_path):
    line = ["--input", prompts, "--model", "tiny", *GENERATE, "--output", tmp_path / "rows.jsonl"]
    assert invoke("generate", *line, *stub()).exit_code == 0
    result = invoke("generate", *line)
    assert result.exit_code == 2 and 'engine was "vllm", now null' in result.output
    again = invoke("generate", *line, *stub(), "--replicas", 2)  # where it runs is no part of what it is
    assert again.exit_code == 0 and "is done already" in again.output and len(commands(stub.starts)) == 1


@pytest.mark.slow
def test_a_judge_reads_the_engines_log_probabilities(stub, invoke, tmp_path):
    pair = {"id": "1", "prompt": "Hi", "response_a": "One", "response_b": "Two"}
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    line = ["--input", tmp_path / "pairs.jsonl", "--model", "tiny", "--output", tmp_path / "labels.jsonl"]
    result = invoke("judge", *line, *stub())
    assert result.exit_code == 0, result.output
    [(_, row)] = read_jsonl(tmp_path / "labels.jsonl")
    assert row["p_a"] == pytest.approx(0.5) and len(row["verdicts"]) == 2  # it always prefers the first letter
    assert all_gone(stub.starts)


@pytest.mark.slow
def test_a_policy_and_its_reader_share_one_engine(stub, invoke, tmp_path):
    rows = [{"id": str(n), "prompt": f"Question {n}?", "kind": "benign"} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ["--input", tmp_path / "prompts.jsonl", "--model", "tiny", "--judge", "tiny", "--max-new-tokens", 16]
    result = invoke("evaluate", *line, *stub(), "--output", tmp_path / "rates.jsonl")
    assert result.exit_code == 3, result.output  # a reader that always prefers the first letter has no verdict
    assert len(commands(stub.starts)) == 1 and all_gone(stub.starts)
    for name in ("rates.responses.jsonl", "rates.classes.jsonl"):
        manifest = json.loads((tmp_path / f"{name}.run.json").read_text())
        assert manifest["engine"]["name"] == "vllm" == manifest["fingerprint"]["engine"]


@pytest.mark.slow
def test_the_model_and_another_take_turns(stub, invoke, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "Question?", "kind": "benign"}])
    line = ["--input", tmp_path / "prompts.jsonl", "--model", "tiny", "--judge", other, "--max-new-tokens", 16]
    result = invoke("evaluate", *line, *stub(), "--output", tmp_path / "rates.jsonl")
    assert result.exit_code == 3, result.output  # a reader that always prefers the first letter has no verdict
    assert {command[1] for command in commands(stub.starts)} == {str(TINY), str(other)} and all_gone(stub.starts)


@pytest.mark.slow
def test_steps_of_a_run_share_one_engine_until_training_stops_it(stub, invoke, tmp_path):
    line = ["--model", "tiny", "--frames", "none", "--smoke", "--rl", "none", *stub(), "--output", tmp_path / "run"]
    result = invoke("run", *line)
    assert result.output.count("starting a server of vllm for tiny\n") == 1, result.output
    folder = tmp_path / "run" / "smoke"
    assert sorted(command[1] for command in commands(stub.starts)) == sorted([str(TINY), str(folder / "sft")])
    assert all_gone(stub.starts)
    for name in ("01-responses", "02-critique-1", "03-revision-1"):
        manifest = json.loads((folder / f"{name}.jsonl.run.json").read_text())
        assert manifest["fingerprint"]["engine"] == "vllm" and manifest["counts"]["requests"]["answered"] == 8
    assert "engine" not in json.loads((folder / "sft.run.json").read_text())["fingerprint"]


def test_the_plan_of_a_run_names_the_engine_where_a_model_of_this_machine_is_asked(stub, invoke, tmp_path):
    server = "openai:critic@http://127.0.0.1:9/v1"
    line = ["--model", "tiny", "--critic", server, "--rl", "dpo", "--rounds", 1, "--output", tmp_path / "run"]
    result = invoke("run", *line, *stub(), "--replicas", 2, "--dry-run")
    assert result.exit_code == 0, result.output
    with_engine = {
        words[1].partition("scripts/")[2]: "--engine" in words for words in map(str.split, steps(result.output))
    }
    asked = {"generate.py", "judge.py", "evaluate.py"}
    assert with_engine == {f"{name}.py": f"{name}.py" in asked for name in STEPS}
    assert "--replicas 2 --batch-size 128" in result.output


def test_the_price_of_a_run_spreads_text_steps_over_gpus(invoke, tmp_path):
    line = ["--model", "size:70b", "--prompts", 100, "--rl", "none", "--gpu", "h100", "--dry-run", "--json"]
    line += ["--output", tmp_path / "run", "--engine", "vllm"]
    one, four = (
        {step["name"]: step["memory_gb"] for step in json.loads(invoke("run", *line, *more).stdout)["steps"]}
        for more in ([], ["--tensor-parallel-size", 4])
    )
    assert one["responses"] > 141 and four["responses"] == pytest.approx(one["responses"] / 4, rel=0.01)
    assert one["sft"] == four["sft"]  # trained by this process


STEPS = ("evaluate", "generate", "critique", "revise", "sft", "judge", "dpo", "report")


def steps(script: str) -> list[str]:
    return [text for text in script.replace("\\\n", " ").splitlines() if "scripts/" in text]


@pytest.mark.slow
def test_a_constitution_is_measured_through_an_engine(stub, prompts, invoke, tmp_path):
    line = ["--input", prompts, "--limit", 2, "--model", "tiny", *stub(), "--output", tmp_path / "coverage.jsonl"]
    line += ["--constitution", "property-only"]
    result = invoke("constitution", "coverage", *line)
    assert result.exit_code == 0, result.output
    assert len(commands(stub.starts)) == 1 and all_gone(stub.starts)


@pytest.mark.slow
def test_a_command_line_serves_as_engine(stub, prompts, invoke, tmp_path):
    stub()
    command = f"{stub.program} serve {{model}} --port {{port}} --served-model-name={{name}}"
    line = ["--input", prompts, "--model", "tiny", "--engine-command", command, *GENERATE]
    result = invoke("generate", *line, "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "rows.jsonl.run.json").read_text())["fingerprint"]["engine"] == command
    assert all_gone(stub.starts)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_command_that_is_ended_leaves_no_engine(stub, prompts, tmp_path, number):
    options = stub(seconds=1, starts_child=True, ignores_sigterm=number == signal.SIGKILL)
    process = begin(tmp_path, prompts, [*options, "--batch-size", "1"])
    assert wait_for(lambda: (tmp_path / "rows.jsonl.partial").exists() and len(started(stub.starts)) == 2)
    assert all(map(lives, started(stub.starts)))
    process.send_signal(number)
    assert wait_for(lambda: all_gone(stub.starts), 10), "the engine still runs"
    text, _ = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1), text


@pytest.mark.slow
def test_an_engine_whose_supervisor_is_killed_dies_and_is_started_again(stub, prompts, tmp_path):
    process = begin(tmp_path, prompts, [*stub(seconds=0.1), "--batch-size", "1"])
    assert wait_for(lambda: (tmp_path / "rows.jsonl.partial").exists())
    [pid] = started(stub.starts)
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    assert wait_for(lambda: not lives(pid), 10)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "vllm on port" in text and "started again (1 of 2)" in text
    assert len(list(read_jsonl(tmp_path / "rows.jsonl"))) == 24 and all_gone(stub.starts)


@pytest.mark.slow
def test_two_commands_at_once_have_two_ports(stub, prompts, tmp_path):
    processes = [begin(tmp_path, prompts, stub(seconds=0.1), name) for name in ("one", "two")]
    assert wait_for(lambda: len(started(stub.starts)) == 2)
    for process in processes:
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 0, text
    ports = [command[command.index("--port") + 1] for command in commands(stub.starts)]
    assert len(set(ports)) == 2 and all_gone(stub.starts)


def test_replicas_share_the_requests_past_a_proxy(stub, prompts, invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("no_proxy", "example.org")
    line = ["--input", prompts, "--model", "tiny", *stub(), "--replicas", 2, *GENERATE]
    result = invoke("generate", *line, "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert len(commands(stub.starts)) == 2 and all_gone(stub.starts)
    assert json.loads((tmp_path / "rows.jsonl.run.json").read_text())["engine"]["replicas"] == 2


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_and_no_row_is_lost(stub, prompts, invoke, tmp_path):
    line = ["--input", prompts, "--model", "tiny", *stub(die_at=10), *GENERATE, "--batch-size", 4]
    result = invoke("generate", *line, "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert "vllm on port" in result.output and "been ended by SIGKILL; it is started again (1 of 2)" in result.output
    assert [row["prompt_id"] for _, row in read_jsonl(tmp_path / "rows.jsonl")] == [str(n) for n in range(24)]
    assert json.loads((tmp_path / "rows.jsonl.run.json").read_text())["engine"]["restarts"] == 1
    assert len(commands(stub.starts)) == 2 and all_gone(stub.starts)


@pytest.mark.slow
def test_an_engine_that_always_dies_stops_the_command_with_its_log(stub, prompts, invoke, tmp_path):
    output = tmp_path / "rows.jsonl"
    line = ["--input", prompts, "--model", "tiny", *GENERATE, "--batch-size", 2, "--output", output]
    result = invoke("generate", *line, *stub(die_at=6, dies_always=True))
    assert result.exit_code == 1, result.output
    assert "error: vllm has been ended by SIGKILL, after it was started again 2 times" in result.output
    assert "RuntimeError: CUDA error: device-side assert triggered" in result.output.partition("its log:")[2]
    assert len(commands(stub.starts)) == 3 and all_gone(stub.starts) and not output.exists()
    done = len(Path(f"{output}.partial").read_text().splitlines())
    assert 0 < done < 24
    assert invoke("generate", *line, *stub()).exit_code == 0
    assert len(list(read_jsonl(output))) == 24


@pytest.mark.slow
def test_a_port_that_another_program_takes_is_given_up(stub, prompts, invoke, tmp_path):
    line = ["--input", prompts, "--model", "tiny", *GENERATE, "--output", tmp_path / "rows.jsonl"]
    taken = "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use"
    result = invoke("generate", *line, *stub(fails_first=taken))
    assert result.exit_code == 0, result.output
    first, second = (command[command.index("--port") + 1] for command in commands(stub.starts))
    assert first != second


FAILURES = {
    "OSError: [Errno 28] No space left on device": "Make room on the disk",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "--tensor-parallel-size",
    "ValueError: Model architectures ['FooForCausalLM'] are not supported for now.": "leave --engine out",
    "something else": "Start it yourself to see its whole log: ",
}


@pytest.mark.parametrize("log", FAILURES)
def test_an_engine_that_does_not_start_shows_its_log_and_a_remedy(stub, prompts, invoke, tmp_path, log):
    line = ["--input", prompts, "--model", "tiny", *GENERATE, "--output", tmp_path / "out" / "rows.jsonl"]
    result = invoke("generate", *line, *stub(fails=log))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    error = result.output.partition("error: ")[2]
    assert "vllm" in error and "does not serve tiny: it has ended with exit code 1" in error
    assert log in error and FAILURES[log] in error
    assert len(commands(stub.starts)) == 1 and all_gone(stub.starts)


def test_a_wrong_option_of_the_engine_shows_its_log(stub, prompts, invoke, tmp_path):
    line = ["--input", prompts, "--model", "tiny", *GENERATE, "--output", tmp_path / "rows.jsonl"]
    result = invoke("generate", *line, *stub(), "--engine-args", "--no-such-option 3")
    assert result.exit_code == 2
    assert "unrecognized arguments: --no-such-option 3" in result.output and "Check --engine-args" in result.output


WRONG = {
    "--engine vllm --engine-path /no/such/vllm": "no such executable: /no/such/vllm",
    "--engine sglang": "no sglang on PATH",
    "--engine llama.cpp": "no llama-server on PATH",
    "--engine-command '/no/such/server --model {model} --port {port}'": "no such program: /no/such/server",
    "--engine-command 'server --model {model}'": "has no {port} or no {model}",
    "--engine-command 'server --model {model} --port {port} --key {secret}'": "the placeholder {secret}",
    '--engine-command "server \'{model} {port}"': "not a command line",
    "--engine vllm --engine-command 'x {model} {port}'": "--engine or --engine-command, not both",
    '--engine vllm --engine-args "\'"': "not words",
    # Without effect.
    "--engine-path vllm": "--engine-path would have no effect: without --engine",
    "--replicas 2 --tensor-parallel-size 2": "--tensor-parallel-size, --replicas would have no effect",
    "--engine vllm --batch-tokens 100": "--batch-tokens would have no effect",
    "--engine llama.cpp --dtype float32": "--dtype would have no effect",
    "--engine transformers-serve --tensor-parallel-size 2": "--tensor-parallel-size would have no effect",
    "--engine-command 'x {model} {port}' --engine-args y": "--engine-args would have no effect",
    "--engine-command 'x {model} {port}' --dtype float32": "--dtype would have no effect",
    "--engine vllm --model openai:x --endpoint http://127.0.0.1:1": "--engine would have no effect: no model runs",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options_are_refused_before_anything_is_written(stub, prompts, invoke, tmp_path, words):
    import shlex

    options = shlex.split(words)
    if "--engine-args" in options and "vllm" in options:
        options += stub()[2:]
    line = ["--input", prompts, "--model", "tiny", *options, "--output", tmp_path / "out" / "rows.jsonl"]
    result = invoke("generate", *line)
    assert result.exit_code == 2, result.output
    assert WRONG[words] in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists() and not commands(stub.starts)


def test_a_launcher_of_several_processes_is_refused(stub, prompts, invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = ["--input", prompts, "--model", "tiny", *stub(), "--output", tmp_path / "rows.jsonl"]
    result = invoke("generate", *line)
    assert result.exit_code == 2 and "an engine in several processes" in result.output and "--replicas" in result.output


def test_a_measurement_by_given_texts_refuses_an_engine(stub, invoke, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{"id": "1", "prompt": "Hi", "chosen": "One", "rejected": "Two"}])
    line = ["--pairs", tmp_path / "pairs.jsonl", "--model", "tiny", "--output", tmp_path / "rates.jsonl"]
    result = invoke("evaluate", *line, *stub())
    assert result.exit_code == 2 and "no log-probabilities of a given text" in result.output


def test_more_gpus_than_there_are_are_refused(stub, prompts, invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    line = ["--input", prompts, "--model", "tiny", *stub(), "--output", tmp_path / "rows.jsonl"]
    result = invoke("generate", *line, "--replicas", 2, "--tensor-parallel-size", 2)
    assert result.exit_code == 2 and "2 x 2 GPUs are needed, and 2 are visible" in result.output
    assert not commands(stub.starts)


def test_an_adapter_is_refused(stub, prompts, invoke, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    choice = launchers.EngineChoice(engine="vllm")
    with pytest.raises(launchers.InputError, match=r"an adapter of .*, which vllm would not merge"):
        launchers.served_model(str(adapter), choice)


def test_llama_cpp_takes_the_one_gguf_file_of_a_folder(tmp_path):
    with pytest.raises(launchers.InputError, match="0 GGUF files"):
        launchers.find_gguf(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    choice = launchers.EngineChoice(engine="llama.cpp")
    launcher = launchers.Launcher(choice, ("llama-server",), "1")
    command = launcher.command(launchers.Serving(str(tmp_path), "mine", 8000))
    assert command[:3] == ["llama-server", "--model", str(tmp_path / "model.gguf")] and "mine" in command


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_gpus_are_passed_on(engine):
    choice = launchers.EngineChoice(engine=engine, tensor_parallel_size=4, data_parallel_size=2)
    command = launchers.Launcher(choice, ("x",), "1").command(launchers.Serving("org/model", "mine", 8000, "bfloat16"))
    sizes = {"vllm": ("--tensor-parallel-size", "--data-parallel-size"), "sglang": ("--tp-size", "--dp-size")}[engine]
    assert [command[command.index(option) + 1] for option in (*sizes, "--dtype")] == ["4", "2", "bfloat16"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_vllm_writes_and_judges(prompts, invoke, tmp_path, monkeypatch):
    if shutil.which("vllm") is None:
        pytest.skip("no vllm on PATH: PATH=$PATH:/path/to/its/environment/bin runs this test")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    output = tmp_path / "rows.jsonl"
    line = ["--input", prompts, "--model", "tiny", "--engine", "vllm", "--temperature", 0, *GENERATE]
    result = invoke("generate", *line, "--samples", 2, "--dtype", "float32", "--output", output)
    assert result.exit_code == 0, result.output
    here = invoke("generate", *line[:4], "--temperature", 0, *GENERATE, "--output", tmp_path / "here.jsonl")
    assert here.exit_code == 0
    ours = {row["prompt_id"]: row["response"] for _, row in read_jsonl(tmp_path / "here.jsonl")}
    texts = [(row["response"], ours[row["prompt_id"]]) for _, row in read_jsonl(output)]
    assert sum(a == b for a, b in texts) >= 0.9 * len(texts), texts
    manifest = json.loads(Path(f"{output}.run.json").read_text())
    assert manifest["engine"]["version"] != "unknown" and "--enable-prefix-caching" in manifest["engine"]["command"]
