"""The doctor: this machine, real servers on loopback, real models, and a Python with hardly anything installed."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import click
import models
import pytest
from conftest import ROOT

from cai.models import hardware

KEYS = {"ok", "problems", "remedies", "notes", "python", "packages", "devices", "places", "hub", "endpoints", "engines"}


def diagnose(invoke, *arguments) -> dict:
    patience = () if "--timeout" in arguments else ("--timeout", "60")  # for a machine that has much else to do
    result = invoke("doctor", "--json", *patience, *arguments)
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["ok"] else 3), result.output
    assert len(report["problems"]) == len(report["remedies"]) and report["ok"] == (not report["problems"])
    return report


def test_engines_on_path_are_listed(invoke, tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n")  # its Python knows no such package
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho version: 6123 '(abc)' >&2\n")
    for path in (program, server):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    engines = {engine["name"]: engine for engine in diagnose(invoke)["engines"]}
    assert engines["vllm"] == {"name": "vllm", "version": "unknown", "path": str(program)}
    assert engines["llama.cpp"] == {"name": "llama.cpp", "version": "6123", "path": str(server)}
    assert engines["transformers-serve"]["version"] == metadata.version("transformers")  # beside this Python


@contextmanager
def server(answer, chat=None):
    """A server on loopback; `answer(handler)` does one GET, `chat(handler)` one POST. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            (chat or says(501))(self)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()


def says(status: int, body: str = "", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


# --- the machine --------------------------------------------------------------------------------------------


def test_all_is_well_with_tiny(invoke):
    report = diagnose(invoke, "--model", "tiny")
    assert report["ok"], report["problems"]
    assert set(report) == KEYS | {"model"}
    assert report["hub"] == {"checked": False, "reason": "HF_HUB_OFFLINE is set"}
    assert report["packages"]["torch"]["version"] and report["packages"]["torch"]["wanted"]
    assert report["devices"]["cpu"]["free_gb"] > 0 and report["devices"]["cpu"]["bf16"]
    assert all(one["writable"] for one in report["places"].values())
    model = report["model"]
    assert model["chat_template"] and model["pad_token"] and model["takes_system"]
    steps = model["fits"]["steps"]
    assert all(one["fits"] for one in steps.values())
    # What trains holds more than what writes, PPO more than SFT.
    assert steps["ppo (--full)"]["needs_gb"] > steps["sft, reward_model (--full)"]["needs_gb"]


def test_for_people_too(invoke):
    result = invoke("doctor", "--model", "tiny")
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("ok") and "ppo (--lora): about" in result.stdout


def test_a_device_that_is_not_there(invoke):
    report = diagnose(invoke, "--device", "cuda:9")
    assert report["problems"] == ["no device cuda:9"] and "cpu" in report["remedies"][0]


def test_a_place_that_cannot_be_written(invoke, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    report = diagnose(invoke, "--output", str(tmp_path / "file" / "runs"))
    assert [("file" in one) for one in report["problems"]] == [True, True]
    assert report["remedies"] == ["Name another --output", "Set HF_HOME to a folder of yours"]
    assert not report["places"]["output"]["writable"] and report["places"]["temporary"]["writable"]


def test_it_leaves_nothing_behind(invoke, tmp_path):
    diagnose(invoke, "--output", str(tmp_path / "new" / "run"))
    assert not list(tmp_path.iterdir())


def test_without_any_package_it_says_so():
    """No site-packages at all: the interpreter alone."""
    done = subprocess.run([sys.executable, "-S", "-E", ROOT / "scripts" / "doctor.py"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 3 and not report["ok"]
    assert "click" in report["problems"][0] and "pip install" in report["remedies"][0]


def test_with_click_alone_it_names_every_package_that_is_missing(tmp_path):
    shutil.copytree(Path(click.__file__).parent, tmp_path / "click")
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "scripts" / "doctor.py", "--json", "--model", "tiny"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    report = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    for name, package in report["packages"].items():
        assert package["version"] is None
        assert f"{name} is not installed" in report["problems"]
    assert any("torch can't be imported" in one for one in report["problems"])


# --- the hub ------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_and_found(invoke, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with server(says(200, "[]")) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        report = diagnose(invoke)
    assert report["hub"]["reached"] and report["ok"]


@pytest.mark.timeout(60)
def test_a_hub_that_drips_a_byte_now_and_then_is_given_up(invoke, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    over = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not over.is_set():
            try:
                handler.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    with server(drip) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        report = diagnose(invoke, "--timeout", "0.5")
        over.set()
    assert not report["hub"]["reached"] and "no answer in 0.5 s" in report["hub"]["reason"]
    assert report["ok"] and any("the hub does not answer" in note for note in report["notes"])


# --- endpoints ----------------------------------------------------------------------------------------------

MODELS = json.dumps({"data": [{"id": "qwen"}, {"id": "other"}]})


def completion(logprobs: bool) -> str:
    """One letter as an OpenAI-compatible server answers it."""
    listed = {
        "content": [
            {
                "token": "A",
                "logprob": -0.1,
                "bytes": [65],
                "top_logprobs": [
                    {"token": "A", "logprob": -0.1, "bytes": [65]},
                    {"token": "B", "logprob": -2.4, "bytes": [66]},
                ],
            }
        ]
    }
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "A"},
        "finish_reason": "length",
        "logprobs": listed if logprobs else None,
    }
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "qwen",
            "choices": [choice],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        }
    )


@pytest.mark.parametrize("logprobs", [True, False])
def test_an_endpoint_that_serves_the_model(invoke, logprobs):
    asked = []

    def answer(handler):
        asked.append(handler.path)
        says(200, MODELS)(handler)

    chat = says(200, completion(logprobs), **{"Content-Type": "application/json"})
    with server(answer, chat) as address:
        report = diagnose(invoke, "--model", "openai:qwen", "--endpoint", f"{address}/v1")
    assert report["ok"], report["problems"]
    assert asked[0] == "/v1/models" and report["endpoints"][0]["models"] == ["qwen", "other"]
    assert (report["endpoints"][0]["answers"], report["endpoints"][0]["logprobs"]) == (True, logprobs)
    assert any("no log-probabilities" in note for note in report["notes"]) != logprobs
    assert report["packages"]["openai"]["version"]  # an extra, wanted here


@pytest.mark.slow
def test_an_endpoint_that_lists_the_model_and_does_not_answer(invoke):
    with server(says(200, MODELS)) as address:  # 501 to every POST
        report = diagnose(invoke, "--model", "openai:qwen", "--endpoint", address, "--timeout", "2")
    [problem] = report["problems"]
    assert "lists openai:qwen and does not answer" in problem and not report["endpoints"][0]["answers"]


def test_the_key_is_that_of_key_name(invoke, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "sk-planted-secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen = []

    def answer(handler):
        seen.append(handler.headers["Authorization"])
        says(401)(handler)

    with server(answer) as address:
        report = diagnose(invoke, "--endpoint", address, "--key-name", "OTHER_KEY")
    assert seen == ["Bearer sk-planted-secret"] and "OTHER_KEY" in report["remedies"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "problem", "remedy"),
    [
        (says(401), "wants a key", "OPENAI_API_KEY"),
        (says(404), "HTTP 404", "/v1"),
        (says(302, Location="http://127.0.0.1:9/"), "HTTP 302", "/v1"),
        (says(200, "<html>"), "no list of models", "OpenAI-compatible"),
        (says(200, "[" * 99_000), "no list of models", "OpenAI-compatible"),
        (says(200, MODELS), "no model 'llama'", "It has: qwen, other"),
    ],
    ids=["key", "path", "redirect", "page", "nested", "name"],
)
def test_an_endpoint_with_a_problem(invoke, answer, problem, remedy):
    with server(answer) as address:
        report = diagnose(invoke, "--model", "openai:llama", "--endpoint", address)
    assert problem in report["problems"][0] and remedy in report["remedies"][0]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_endpoint_that_never_answers_and_one_that_is_not_there(invoke):
    over = threading.Event()
    with server(lambda handler: over.wait(30)) as silent:
        with server(says(200)) as gone:
            pass
        report = diagnose(invoke, "--endpoint", silent, "--endpoint", gone, "--timeout", "0.5")
        over.set()
    assert [one["reached"] for one in report["endpoints"]] == [False, False]
    assert all("does not answer" in one for one in report["problems"])


def test_the_key_is_sent_and_never_shown(invoke, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret")
    seen = []

    def answer(handler):
        seen.append(handler.headers["Authorization"])
        says(403)(handler)

    with server(answer) as address:
        result = invoke("doctor", "--json", "--endpoint", address)
    assert seen == ["Bearer sk-planted-secret"] and "planted" not in result.output
    assert "refuses the key" in result.output


def test_an_address_that_is_none_and_a_model_without_an_endpoint(invoke):
    report = diagnose(invoke, "--endpoint", "ftp://user:planted@host/")
    assert len(report["problems"]) == 1 and "planted" not in json.dumps(report)
    report = diagnose(invoke, "--model", "openai:qwen")
    assert report["problems"] == ["openai:qwen without an endpoint"]


# --- models -------------------------------------------------------------------------------------------------


def test_what_is_said_of_chat_templates(invoke):
    pads = {name: diagnose(invoke, "--model", models.folder(name)) for name in ("llama", "gemma2", "thinker")}
    assert pads["llama"]["model"]["pad_token"] is None
    assert any("no pad token" in one for one in pads["llama"]["notes"])
    assert pads["gemma2"]["model"]["pad_token"] == "<pad>" and not pads["gemma2"]["model"]["takes_system"]
    assert pads["gemma2"]["model"]["ends_turns_with"] == "<end_of_turn>"
    assert pads["thinker"]["model"]["thinks"] and any("thinking" in one for one in pads["thinker"]["notes"])


def test_models_that_cannot_be_used(invoke, tmp_path):
    bare = models.copy("llama", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    broken = models.copy("llama", tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    for model, problem in (
        (bare, "no chat template"),
        (broken, "not JSON"),
        (tmp_path / "none", "no such model"),
        ("nobody/nothing-here", "neither a folder nor in the local cache"),
    ):
        report = diagnose(invoke, "--model", model)
        assert len(report["problems"]) == 1 and problem in report["problems"][0], report["problems"]


def test_a_model_too_large_for_the_machine(invoke, tmp_path):
    """Only the header of the weights is read: a file with holes stands for 70 billion parameters."""
    large = models.copy("llama", tmp_path / "large")
    config = json.loads((large / "config.json").read_text())
    sizes = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
    }
    (large / "config.json").write_text(json.dumps({**config, **sizes}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [70_000, 1_000_000], "data_offsets": [0, 140_000_000_000]}})
    with open(large / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
    report = diagnose(invoke, "--model", large)
    steps = report["model"]["fits"]["steps"]
    assert not any(one["fits"] for one in steps.values()) and "fits for no step" in report["problems"][0]
    # 16 bytes a parameter, and more for the activations
    assert steps["sft, reward_model (--full)"]["needs_gb"] > 1_100


# --- models of common sizes ---------------------------------------------------------------------------------


def test_the_hardware_table_is_that_of_the_estimator(invoke):
    result = invoke("doctor", "--hardware", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["models"]
    assert [row["model"] for row in rows] == list(hardware.PUBLISHED)
    eight = rows[2]
    assert eight["parameters"] == 8_029_995_008
    # 18 bytes a parameter are exact: weights, gradients, two moments in float32, and autocast's copy.
    full = eight["steps"]["sft, reward_model (--full)"]
    assert 18 * 8.03 < full["needs_gb"] < 18 * 8.03 * 1.2 and full["gpu"] == "b200"
    # 2 bytes a parameter, and 32 rows of 768 tokens at 2 · 32 · 8 · 128 · 2 bytes.
    assert eight["steps"]["generate, critique, revise"]["needs_gb"] > 2 * 8.03 + 32 * 768 * 131_072 / 1e9
    for row in rows:
        steps = {name: one["needs_gb"] for name, one in row["steps"].items()}
        assert steps["sft, reward_model (--lora)"] < steps["ppo (--lora)"] < steps["ppo (--full)"]
        assert steps["dpo (--lora)"] < steps["dpo (--full)"] < steps["ppo (--full)"]
    assert rows[-1]["steps"]["ppo (--full)"]["gpu"] is None
    table = invoke("doctor", "--hardware").stdout
    assert table.count("\n") == 2 + len(eight["steps"]) and f"{full['needs_gb']:.0f} GB: b200" in table
