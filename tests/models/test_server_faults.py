"""Servers that hang, break off, slow down or die: what is asked again, what is counted, and what the user reads."""

import json
import shlex
import threading
import time

import click
import pytest
from canned_server import CannedServer
from conftest import load_command

from cai.base import cli, requests
from cai.base.errors import CaiError, InputError
from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest, write_jsonl
from cai.models import latency, servers
from cai.models.engine import Request, Sampling
from cai.models.servers import load_server

TEXT = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Glue the leg of the chair."}}
MODEL = "openai:x"
SAMPLED = Sampling(24, 0.7)
PRINCIPLE = load_constitution("harmlessness").principles[0].id


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is learned in seconds is learned in tenths."""
    monkeypatch.setattr(latency, "FLOOR", 0.5)
    monkeypatch.setattr(latency, "TICK", 0.02)
    monkeypatch.setattr(servers, "GREETINGS", 2)
    monkeypatch.setattr(servers, "PATIENCE", 1.0)


def prompts(tmp_path, count):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"id": f"p{n}", "prompt": f"How do I fix chair {n}?", "kind": "benign"} for n in range(count)])
    return path


def answers(engine, count, sampling=SAMPLED):
    asked = [Request(n, [{"role": "user", "content": f"How do I fix chair {n}?"}], n) for n in range(count)]
    return {request.key: answer for request, answer in engine.generate(asked, sampling)}


def rows_sent(server):
    """How many requests about rows came, each as often as it was sent."""
    return sum("chair" in body["messages"][-1]["content"] for body in server.requests)


def generate(invoke, tmp_path, server, *options, rows=120):
    """(the result, the summary or None, the manifest)."""
    line = ("--model", MODEL, "--endpoint", server.address, "--max-new-tokens", 24, "--batch-size", 16)
    files = ("--input", prompts(tmp_path, rows), "--output", tmp_path / "out.jsonl")
    result = invoke("generate", *files, *line, "--json", *options)
    return result, json.loads(result.stdout) if result.stdout else None, read_manifest(tmp_path / "out.jsonl")


# --- what hangs and what breaks off -------------------------------------------------------------------------


@pytest.mark.slow
def test_where_one_in_twenty_hangs_no_row_is_lost_and_all_is_shown(invoke, tmp_path):
    """Greeting and seed come first; then each twentieth request is never answered."""
    with CannedServer(TEXT, fault=lambda n, _body: "hang" if n % 20 == 10 else 0.01) as server:
        began = time.monotonic()
        result, summary, manifest = generate(invoke, tmp_path, server)
        seconds = time.monotonic() - began
    assert result.exit_code == 0, result.stderr
    hung, again = server.faults.count("hang"), rows_sent(server) - 120
    assert summary["rows"] == 120 and again >= hung >= 6
    assert summary["requests"] == {"answered": 120, "retried": again, "silent": again, "failed": 0, "waiting": 0}
    assert manifest["counts"]["requests"] == summary["requests"] and "requests" not in manifest
    assert seconds < requests.TIMEOUT / 2  # each of them would have taken the whole of it
    result, shown, _ = generate(invoke, tmp_path, server)
    assert result.exit_code == 0 and shown["requests"] == summary["requests"]


@pytest.mark.slow
def test_what_is_asked_again_goes_over_a_new_connection():
    hung = []

    def fault(number, body):
        if number % 20 == 10:
            hung.append(body["messages"])
            return "hang"
        return 0.01

    with CannedServer(TEXT, fault=fault) as server:
        assert len(answers(load_server(MODEL, endpoints=[server.address], batch_size=4), 60)) == 60
    tries = [
        [port for port, body in zip(server.ports, server.requests, strict=True) if body["messages"] == messages]
        for messages in hung
    ]
    assert tries and all(len(ports) == len(set(ports)) >= 2 for ports in tries)
    assert all(server.ports.count(ports[-1]) == 1 for ports in tries)
    assert len(set(server.ports)) < 40  # the others share connections


@pytest.mark.slow
def test_a_connection_that_ends_in_the_middle_of_an_answer_is_asked_again(invoke, tmp_path):
    with CannedServer(TEXT, fault=lambda n, _body: "half" if n % 10 == 5 else None) as server:
        result, summary, _ = generate(invoke, tmp_path, server, rows=40)
    assert result.exit_code == 0, result.stderr
    asked, retried = summary["requests"], rows_sent(server) - 40
    assert retried - asked["silent"] == server.faults.count("half") >= 3
    assert asked == {"answered": 40, "retried": retried, "silent": asked["silent"], "failed": 0, "waiting": 0}


@pytest.mark.slow
def test_an_answer_that_takes_long_is_waited_for_in_the_end():
    """The others teach a bound of 0.5 s, and this one takes 1.6 s: it gets 0.5, 1 and 2 s."""

    def fault(_number, body):
        return 1.6 if "chair 30?" in body["messages"][-1]["content"] else 0.01

    with CannedServer(TEXT, fault=fault) as server:
        engine = load_server(MODEL, endpoints=[server.address], batch_size=8)
        texts = answers(engine, 40)
    assert len(texts) == 40 and all(answer.finish == "stop" for answer in texts.values())
    counts = engine._report.counts
    assert counts.silent == counts.retried == rows_sent(server) - 40 >= 2 and counts.failed == 0


@pytest.mark.slow
def test_a_server_that_slows_down_is_waited_for():
    """From 0.01 s to 0.7 s for one answer, with eight requests under way."""
    with CannedServer(TEXT, fault=lambda n, _body: 0.01 * 1.055**n) as server:
        engine = load_server(MODEL, endpoints=[server.address], batch_size=8)
        texts = answers(engine, 78)
    assert all(answer.finish == "stop" for answer in texts.values()) and len(texts) == 78
    assert engine._report.counts.retried < 20 and engine._report.counts.failed == 0


@pytest.mark.slow
def test_a_row_that_is_never_answered_fails_after_the_longest_wait_alone(invoke, tmp_path):
    def fault(_number, body):
        return "hang" if "chair 7?" in body["messages"][-1]["content"] else None

    with CannedServer(TEXT, fault=fault) as server:
        result, summary, manifest = generate(invoke, tmp_path, server, "--request-timeout", 0.5, rows=30)
    assert result.exit_code == 3 and summary["rows"] == 29 and summary["requests"]["failed"] == 1
    assert list(manifest["failed_rows"]) == ["p7/0"]
    reason = manifest["failed_rows"]["p7/0"]
    assert "no answer within 0.5 s (--request-timeout), while another question was answered" in reason
    assert result.stderr.count("raise --request-timeout") == 1


@pytest.mark.slow
def test_the_counts_are_those_of_the_whole_run(invoke, tmp_path):
    """The server breaks one answer off, answers forty rows, and is gone; the run is continued with another."""

    def fault(number, _body):
        return "half" if number == 9 else "die" if number == 42 else None

    with CannedServer(TEXT, fault=fault) as server:
        result, summary, manifest = generate(invoke, tmp_path, server, rows=80)
    assert result.exit_code == 1 and summary is None and "no server has answered for 1 s" in result.stderr
    first = manifest["requests"]
    assert manifest["status"] == "running" and 30 <= first["answered"] <= 40 and first["retried"] >= 2
    with CannedServer(TEXT, fault=lambda n, _body: "half" if n in (5, 20) else None) as server:
        result, summary, manifest = generate(invoke, tmp_path, server, rows=80)
    assert result.exit_code == 0, result.stderr
    assert summary["requests"]["retried"] == first["retried"] + 2 and summary["requests"]["answered"] >= 80
    assert manifest["counts"]["requests"] == summary["requests"] and manifest["resumed"] == 1


@pytest.mark.slow
def test_the_judge_and_the_evaluation_show_their_requests(invoke, tmp_path):
    letter = {**TEXT, "message": {"role": "assistant", "content": "A"}}
    pairs = [{"id": str(n), "prompt": f"{n}?", "response_a": "Yes.", "response_b": "No."} for n in range(10)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)

    def fault(number, _body):
        return "half" if number in (6, 9) else None

    with CannedServer(letter, fault=fault) as server:
        where = ("--endpoint", server.address)
        judged = invoke(
            "judge", "--input", tmp_path / "pairs.jsonl", "--model", MODEL, *where, "--output", tmp_path / "j.jsonl"
        )
    assert judged.exit_code == 0, judged.output
    manifest = read_manifest(tmp_path / "j.jsonl")
    assert manifest["counts"]["requests"]["retried"] == 2 and '"retried": 2' in judged.stdout
    with CannedServer(letter, fault=fault) as server:
        line = ("--input", prompts(tmp_path, 12), "--model", MODEL, "--endpoint", server.address, "--by", "phrases")
        measured = invoke("evaluate", *line, "--output", tmp_path / "e.jsonl", "--json")
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["requests"]["retried"] == 2
    for name in ("e.jsonl", "e.responses.jsonl"):
        assert read_manifest(tmp_path / name)["counts"]["requests"]["retried"] == 2


def test_the_progress_line_moves_while_all_wait(capsys):
    report = requests.RequestCounts(answered=1, retried=3, failed=1, waiting=64)
    with cli.progress(100, "generate") as bar:
        bar.delay = bar.mininterval = 0
        cli.show_in_progress(report.describe(longest=12.4))
    assert "0/100" in (line := capsys.readouterr().err)
    assert "64 waiting up to 12 s, 3 retried, 1 failed" in line
    cli.show_in_progress("after its end")
    assert "after its end" not in capsys.readouterr().err


# --- seeds --------------------------------------------------------------------------------------------------


def dies_on_a_seed(_number, body):
    return "die" if "seed" in body else None


@pytest.mark.slow
def test_a_server_that_dies_on_a_seed_shows_it_before_a_row_is_sent(invoke, tmp_path):
    with CannedServer(TEXT, fault=dies_on_a_seed) as server:
        result, _, manifest = generate(invoke, tmp_path, server)
    assert result.exit_code == 2 and "stopped after a request with a seed, as vLLM does on a CPU" in result.stderr
    assert "--no-server-seed" in result.stderr and manifest is None and not (tmp_path / "out.jsonl.partial").exists()
    assert all(body["messages"][-1]["content"] == "Hello" for body in server.requests)
    with CannedServer(TEXT, fault=dies_on_a_seed) as server:
        result, summary, manifest = generate(invoke, tmp_path, server, "--no-server-seed", rows=10)
    assert result.exit_code == 0 and summary["rows"] == 10 and "sampled texts can't be repeated" in result.stderr
    assert manifest["reproducible_sampling"] == "no: --no-server-seed"


def test_a_server_that_dies_on_a_seed_judges_and_answers_greedily(invoke, tmp_path):
    with CannedServer(TEXT, fault=dies_on_a_seed) as server:
        result, summary, manifest = generate(invoke, tmp_path, server, "--temperature", 0, rows=10)
    assert result.exit_code == 0 and summary["rows"] == 10 and "reproducible_sampling" not in manifest


def test_a_server_that_fails_on_seeds_alone_gets_none(invoke, tmp_path):
    with CannedServer(TEXT, fault=lambda _n, body: (500, "no generator") if "seed" in body else None) as server:
        result, _, manifest = generate(invoke, tmp_path, server, rows=10)
    assert result.exit_code == 0 and result.stderr.count("requests carry no seed") == 1
    assert manifest["reproducible_sampling"].startswith("no: the server answers plain requests, and none of 3")
    assert sum("seed" in body for body in server.requests) == 3


def test_a_seed_whose_connection_breaks_once_is_sent_again(capsys):
    with CannedServer(TEXT, fault=lambda n, _body: "half" if n == 1 else None) as server:
        answers(load_server(MODEL, endpoints=[server.address]), 10)
    assert sum("seed" in body for body in server.requests) == 12 and "no seed" not in capsys.readouterr().err


@pytest.mark.slow
def test_one_replica_dies_on_a_seed_and_the_other_gets_none(capsys):
    with CannedServer(TEXT, fault=dies_on_a_seed) as first, CannedServer(TEXT, fault=dies_on_a_seed) as second:
        engine = load_server(MODEL, endpoints=[first.address, second.address])
        assert all(answer.finish == "stop" for answer in answers(engine, 20).values())
    assert "die" in first.faults and not any("seed" in body for body in second.requests)
    assert "a replica stopped answering after a request with a seed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_died_on_a_seed_and_is_started_again_gets_none(monkeypatch, capsys):
    """As a supervisor does it, some seconds later."""
    monkeypatch.setattr(servers, "PATIENCE", 30.0)
    with CannedServer(TEXT, fault=dies_on_a_seed) as server:
        engine = load_server(MODEL, endpoints=[server.address])
        starting = threading.Timer(2.0, server.start)
        starting.start()
        assert all(answer.finish == "stop" for answer in answers(engine, 10).values())
        starting.join()
    assert sum("seed" in body for body in server.requests) == 1
    assert "died of one, and was started again" in capsys.readouterr().err


def test_seeds_can_be_left_out_by_the_caller(capsys):
    with CannedServer(TEXT) as server:
        assert len(answers(load_server(MODEL, endpoints=[server.address], seeds=False), 5)) == 5
    assert not any("seed" in body for body in server.requests) and "carry no seed" in capsys.readouterr().err


def test_greedy_texts_get_no_seed_and_no_warning(capsys):
    with CannedServer(TEXT) as server:
        answers(load_server(MODEL, endpoints=[server.address], seeds=False), 5, Sampling(24, 0.0))
        answers(load_server(MODEL, endpoints=[server.address]), 5, Sampling(24, 0.0))
    assert not any("seed" in body for body in server.requests) and not capsys.readouterr().err


def test_a_server_may_claim_any_context():
    """Whatever it says of itself, few questions with a seed are asked."""
    for length in (1, -5, 10**9, "many"):
        listed = {"data": [{"id": "x", "owned_by": "vllm", "max_model_len": length}]}
        with CannedServer(TEXT, models=listed) as server:
            answers(load_server(MODEL, endpoints=[server.address]), 2)
        assert len(server.requests) <= 2 + 2 + 28
        assert max(len(body["messages"][-1]["content"]) for body in server.requests) < 5000


VLLM = {"data": [{"id": "x", "owned_by": "vllm", "max_model_len": 1024}]}


@pytest.mark.slow
def test_the_fault_of_vllm_on_a_cpu_shows_on_long_prompts():
    """It stands the seeds of prompts that it reads in one step, of 2048 tokens (measured with vLLM 0.32)."""
    read = []

    def fault(_number, body):
        if "seed" in body:
            read.append(len(body["messages"][-1]["content"].split()))
        return "die" if sum(read) > 2048 else 0.2

    with CannedServer(TEXT, fault=fault, models=VLLM) as server:
        engine = load_server(MODEL, endpoints=[server.address])
        with pytest.raises(InputError, match="stopped after a request with a seed"):
            answers(engine, 5)
    assert max(read) < 1024


def test_vllm_that_stands_seeds_gets_them(capsys):
    with CannedServer(TEXT, models=VLLM) as server:
        engine = load_server(MODEL, endpoints=[server.address])
        answers(engine, 5)
        asked = len(server.requests)
        answers(engine, 5)
    assert len(server.requests) == asked + 5 and all("seed" in body for body in server.requests[1:])
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_that_dies_under_way_gets_no_seed_when_it_is_back(monkeypatch, capsys):
    """vLLM answers 500 with the name of its engine to all that it had in hand."""

    def fault(number, body):
        return (500, "EngineCore encountered an issue.") if 8 <= number < 20 and "seed" in body else None

    with CannedServer(TEXT, fault=fault) as server:
        engine = load_server(MODEL, endpoints=[server.address], batch_size=4)
        assert all(answer.finish == "stop" for answer in answers(engine, 30).values())
        assert not any("seed" in body for body in server.requests[16:])
    assert "the server died while requests had seeds" in capsys.readouterr().err
    monkeypatch.setattr(servers, "PATIENCE", 0.5)
    with CannedServer(TEXT, fault=lambda n, _: "die" if n == 9 else fault(n, _)) as server:
        engine = load_server(MODEL, endpoints=[server.address], batch_size=4)
        with pytest.raises(CaiError, match="run the same command again, with --no-server-seed"):
            answers(engine, 30)


# --- options and `next` lines -------------------------------------------------------------------------------


def commands():
    """(name, command) of every command, and of every subcommand of constitution.py."""
    names = ("generate", "critique", "revise", "judge", "evaluate", "compare", "figures", "doctor")
    yield from ((name, load_command(name)) for name in names)
    group = load_command("constitution")
    yield from ((name, command) for name, command in group.commands.items())


def test_every_command_that_asks_servers_has_their_options():
    asking = {}
    for name, command in commands():
        parameters = {parameter.name for parameter in command.params}
        if "endpoints" in parameters:
            asking[name] = {"request_timeout", "no_server_seed"} <= parameters
    assert len(asking) >= 14 and all(asking.values())
    option = next(each for each in load_command("generate").params if each.name == "request_timeout")
    assert requests.TIMEOUT <= 120 and f"default: {requests.TIMEOUT:g}" in option.help


@pytest.mark.parametrize("option", [("--request-timeout", 9), ("--no-server-seed",)])
@pytest.mark.parametrize(
    "line",
    [
        ("generate", "--model", "tiny"),
        ("critique", "--model", "tiny"),
        ("revise", "--model", "tiny", "--gate", "tiny"),
        ("judge", "--model", "tiny"),
        ("evaluate", "--model", "tiny", "--judge", "tiny"),
        ("compare", "--policy", "a=tiny", "--policy", "b=tiny", "--judge", "tiny"),
        ("doctor", "--model", "tiny"),
        ("doctor", "--model", "openai:x", "--endpoint", "http://127.0.0.1:9"),
        ("constitution", "validate", "--model", "tiny"),
    ],
)
def test_with_local_models_the_options_have_no_effect(invoke, tmp_path, line, option):
    files = () if line[0] == "doctor" else ("--input", prompts(tmp_path, 1), "--output", tmp_path / "out.jsonl")
    result = invoke(*line, *files, *option)
    assert result.exit_code == 2 and f"{option[0]} would have no effect" in result.stderr
    assert not (tmp_path / "out.jsonl.run.json").exists()


def test_a_server_among_several_models_is_enough():
    line = ("--policy", "a=tiny", "--policy", "b=openai:x", "--judge", "tiny", "--input", "p", "--output", "o")
    with load_command("compare").make_context("compare", [*line, "--request-timeout", "7"]):
        assert requests.request_timeout() == 7 and requests.command_options() == ["--request-timeout", "7"]
    with pytest.raises(click.UsageError, match="no effect"):
        load_command("compare").make_context("compare", [*line[:2], *line[4:], "--request-timeout", "7"])


def words_after(line, option):
    words = shlex.split(line)
    return [words[n + 1] for n, word in enumerate(words) if word == option]


@pytest.mark.slow
def test_the_next_lines_of_a_server_run_name_its_endpoint_and_never_the_server_as_the_model_to_train(invoke, tmp_path):
    """Generated, criticised and revised twice, each by the line that the step before prints; judged and evaluated."""
    with CannedServer(TEXT) as server, CannedServer(TEXT) as replica:
        where = ["--endpoint", server.address, "--endpoint", replica.address, "--request-timeout", "30"]
        line = ["--input", str(prompts(tmp_path, 3)), "--model", MODEL, *where, "--no-server-seed"]
        command, summaries = "generate", []
        for number in range(5):
            result = invoke(command, *line, "--output", tmp_path / f"{number}.jsonl", "--json")
            assert result.exit_code == 0, result.output
            summaries.append(json.loads(result.stdout))
            following = summaries[-1]["next"]
            command, line = following.split("scripts/")[1].split(".py")[0], shlex.split(following)[2:-2]
            if number < 4:
                assert words_after(following, "--endpoint") == [server.address, replica.address]
                assert words_after(following, "--model") == [MODEL]
                assert words_after(following, "--request-timeout") == ["30"] and "--no-server-seed" in following
        assert command == "sft" and words_after(following, "--model") == ["MODEL"]
        assert words_after(summaries[2]["or"], "--model") == ["MODEL"]
        judged = invoke(
            "judge", "--input", tmp_path / "0.jsonl", "--against", tmp_path / "4.jsonl", "--model", MODEL, *where,
            "--output", tmp_path / "j.jsonl", "--json",
        )  # fmt: skip
        assert judged.exit_code == 0, judged.output
        following = json.loads(judged.stdout)["next"]
        assert words_after(following, "--model") == ["SFT_MODEL"] and MODEL not in following
        line = ("--input", prompts(tmp_path, 3), "--model", MODEL, *where, "--by", "phrases")
        measured = invoke("evaluate", *line, "--output", tmp_path / "e.jsonl", "--json")
        assert measured.exit_code == 0 and "next" not in json.loads(measured.stdout)


@pytest.mark.parametrize(
    "wrote, model", [(["tiny"], "tiny"), (["tiny", "runs/sft"], "MODEL"), (["openai:y"], "MODEL"), ([None], "MODEL")]
)
def test_the_model_to_train_is_the_one_that_answered_not_the_one_that_revised(invoke, tmp_path, wrote, model):
    rounds = [{"principle": PRINCIPLE, "critique": "It is rude."}]
    rows = [
        {"id": str(n), "prompt": "Hm?", "response": "No.", "rounds": rounds, **({"model": name} if name else {})}
        for n, name in enumerate(wrote)
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    with CannedServer(TEXT) as server:
        line = ("--input", tmp_path / "in.jsonl", "--model", MODEL, "--endpoint", server.address)
        result = invoke("revise", *line, "--output", tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 0, result.output
    assert words_after(json.loads(result.stdout)["or"], "--model") == [model]
