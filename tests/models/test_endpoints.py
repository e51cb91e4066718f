"""Replicas that come and go while a run asks them: the file of --endpoints-file."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from canned_server import CannedServer
from conftest import ROOT

from cai.base.errors import CaiError, InputError
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.models import servers
from cai.models.endpoints import EndpointsFile
from cai.models.engine import Request, Sampling
from cai.models.servers import ServerEngine

TEXT = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Glue the leg of the chair."}}
GREEDY = Sampling(8, 0.0)
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(servers, "POLL", 0.05)
    monkeypatch.setattr(servers, "GREETINGS", 2)


@pytest.fixture
def file(tmp_path):
    """`file(*addresses)` writes the file as a whole, as `mv` does; returns its name."""
    path = tmp_path / "endpoints.txt"

    def write(*lines):
        path.with_suffix(".new").write_text("".join(f"{line}\n" for line in lines))
        os.replace(path.with_suffix(".new"), path)
        return str(path)

    return write


def engine(path, patience=20.0, batch_size=8):
    file = EndpointsFile(path)
    engine = ServerEngine("openai:x", file.read_all(), batch_size, patience=patience, file=file)
    engine.greet()
    return engine


def requests(count):
    return [Request(n, [{"role": "user", "content": f"Chair {n}?"}], n) for n in range(count)]


def rows_of(server):
    return [body["messages"][-1]["content"] for body in server.requests if "Chair" in body["messages"][-1]["content"]]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_lines_are_read_once_and_again_when_they_change(file, capsys):
    listed = EndpointsFile(file("# two", "http://a:1", "", " http://b:1/v1 ", "http://a:1/v1/"))
    assert listed.read_all() == ["http://a:1/v1", "http://b:1/v1"]
    assert listed.read_changed() is None
    file("http://b:1", "ftp://c", "http://user:word@d:1")
    assert listed.read_changed() == ["http://b:1/v1"]
    told = capsys.readouterr().err
    assert ":2: " in told and ":3: " in told and "word" not in told and listed.read_changed() is None
    Path(listed.path).unlink()
    assert listed.read_changed() is None, "a file that is gone for a moment says nothing"
    file()
    assert listed.read_changed() == []


@pytest.mark.parametrize("lines", [(), ("# nobody",), ("http://a:1", "no address")])
def test_a_file_to_start_with_needs_addresses(file, lines):
    with pytest.raises(InputError, match=r"endpoints\.txt"):
        EndpointsFile(file(*lines)).read_all()


@pytest.mark.slow
def test_replicas_come_and_go_during_a_run_of_5000_rows(file, invoke, tmp_path):
    """Three replicas in turn, at most two at once; one of them ends without having been removed before."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [{"id": f"r{n}", "prompt": f"Chair {n}?"} for n in range(5000)])
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(CannedServer(TEXT)) for _ in range(3))
        path = file(first.address)

        def operate():
            wait_for(lambda: len(rows_of(first)) > 500)
            file(first.address, second.address)
            wait_for(lambda: len(rows_of(second)) > 300)
            file(second.address)  # the first may end what it has begun
            time.sleep(0.3)
            first.stop()
            wait_for(lambda: len(rows_of(second)) > 1000)
            file(second.address, third.address)
            wait_for(lambda: len(rows_of(third)) > 300)
            second.stop()
            file(third.address)

        operator = threading.Thread(target=operate)
        operator.start()
        line = ("--input", source, "--output", output, "--model", "openai:x", "--endpoints-file", path, "--json")
        result = invoke("generate", *line, "--temperature", 0, "--max-new-tokens", 8)
        operator.join()
    assert result.exit_code == 0, result.stderr
    assert [row["id"] for _, row in read_jsonl(output)] == [f"r{n}/0" for n in range(5000)]
    sent = rows_of(first) + rows_of(second) + rows_of(third)
    assert {f"Chair {n}?" for n in range(5000)} == set(sent)
    requests = read_manifest(output)["counts"]["requests"]
    assert requests["failed"] == 0 and requests["answered"] == 5000, "none is answered twice"
    assert len(sent) <= 5000 + requests["retried"]
    assert min(map(len, map(rows_of, (first, second, third)))) > 300
    assert "is a new replica" in result.stderr and "was removed from" in result.stderr


@pytest.mark.slow
def test_a_replica_that_does_not_answer_yet_is_taken_when_it_does(file):
    late = CannedServer(TEXT)
    late.start()
    late.stop()  # it has its port by now
    with CannedServer(TEXT, fault=lambda *_: 0.02) as server:
        asking = engine(file(server.address, late.address), batch_size=2)  # known, but not up
        answers = asking.generate(iter(requests(250)), GREEDY)
        next(answers)
        late.start()
        try:
            assert len(list(answers)) == 249
        finally:
            late.stop()
        assert len(rows_of(late)) > 20


@pytest.mark.slow
def test_a_run_waits_for_a_replica_and_stops_without_one(file, capsys):
    with CannedServer(TEXT, fault=lambda *_: 0.02) as server:
        asking = engine(file(server.address), patience=1.0)
        answers = asking.generate(iter(requests(300)), GREEDY)
        next(answers)
        file()
        timer = threading.Timer(0.5, file, [NOWHERE, server.address])
        timer.start()
        assert len(list(answers)) == 299
        assert "a new replica that does not answer yet" in capsys.readouterr().err
        file(server.address)
        answers = asking.generate(iter(requests(300)), GREEDY)
        next(answers)
        file()
        with pytest.raises(CaiError, match=r"no replica for 1 s\. What is done is kept"):
            list(answers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "tiny", "--endpoints-file", "f"), "no model is on a server"),
        (("--model", "openai:x", "--endpoints-file", "f", "--endpoint", NOWHERE), "named otherwise"),
        (("--model", "openai:x", "--endpoints-file", "missing"), "cannot read it"),
    ],
)
def test_what_has_no_effect_is_refused(invoke, tmp_path, options, message):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Chair?"}))
    result = invoke("generate", "--input", source, "--output", tmp_path / "out.jsonl", *options)
    assert result.exit_code == 2 and message in result.stderr


# --- the job templates ----------------------------------------------------------------------------------------

CLUSTER = ROOT / "templates" / "cluster"

STANDS_FOR_VLLM = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("flock", "curl", "bash"))), reason="needs bash, flock and curl")
def test_a_slurm_task_adds_its_address_and_removes_it(tmp_path):
    (programs := tmp_path / "bin").mkdir()
    (stand_in := programs / "vllm").write_text(STANDS_FOR_VLLM.format(python=sys.executable, log=str(tmp_path / "log")))
    stand_in.chmod(0o755)
    listed = tmp_path / "endpoints.txt"
    listed.write_text("http://another:1/v1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = subprocess.Popen(
        ["bash", str(CLUSTER / "replicas.slurm")],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "MODEL": "my-org/my-70b", "ENDPOINTS": str(listed),
             "PORT": str(port), "GRACE": "0"},
    )  # fmt: skip
    try:
        wait_for(lambda: f":{port}/v1" in listed.read_text())
        assert len(EndpointsFile(str(listed)).read_all()) == 2
        assert "serve my-org/my-70b --served-model-name my-org/my-70b" in (tmp_path / "log").read_text()
        task.terminate()
        assert task.wait(30) is not None
        assert listed.read_text() == "http://another:1/v1\n"
    finally:
        task.kill()


def test_the_kubernetes_template_is_valid_yaml_and_its_scripts_are_bash():
    service, replicas = yaml.safe_load_all((CLUSTER / "replicas.yaml").read_text())
    assert (service["kind"], replicas["kind"]) == ("Service", "StatefulSet")
    assert replicas["spec"]["serviceName"] == service["metadata"]["name"]
    [container] = replicas["spec"]["template"]["spec"]["containers"]
    for hook in container["lifecycle"].values():
        *_, script = hook["exec"]["command"]
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
        assert "$POD.cai-replica:8000/v1" in script
