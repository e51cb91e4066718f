"""push.py: what a server in place of the Hub is asked, what it gets, and the message when it fails."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import conftest
import models
import pytest

from cai.data import outputs
from cai.report.escaping import MARK

TOKEN = "hf_tests_only"
PROMPTS = ["How do I open the old gate?", "How do I lift the bar?", "Name the key.", "Who is the owner?"]


class Hub(ThreadingHTTPServer):
    """The parts of the Hub's API that an upload needs: repositories in memory, weights by Git LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}  # "model my-org/name" -> {"private": bool, "files": {path: bytes}}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        made = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(made)))
        self.end_headers()
        self.wfile.write(made)

    def serve(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch("/large/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.large[found[1]] = body
            return self.answer({})
        if self.headers.get("Authorization", "").removeprefix("Bearer ") != TOKEN:
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind, name = asked.get("type", "model"), f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = f"{kind} {name}" in hub.repos
            hub.repos.setdefault(f"{kind} {name}", {"private": asked.get("visibility") == "private", "files": {}})
            return self.answer(
                {"url": f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name},
                409 if known else 200,
            )
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ],
                }
            )
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        kind, name, rest = re.fullmatch(r"/api/(model|dataset)s/([\w-]+/[\w-]+)(/.*)?", path).groups()
        repo = hub.repos[f"{kind} {name}"]
        if rest and rest.startswith("/preupload"):
            return self.answer(
                {
                    "files": [
                        {
                            "path": one["path"],
                            "shouldIgnore": False,
                            "oid": None,
                            "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        }
                        for one in json.loads(body)["files"]
                    ]
                }
            )
        if rest and rest.startswith("/commit"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo["files"][value["path"]] = hub.large[value["oid"]]
            return self.answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})
        return self.answer({"id": name, "private": repo["private"], "sha": "1" * 40, "tags": [], "siblings": []})

    do_GET = do_POST = do_PUT = do_HEAD = serve


@pytest.fixture(scope="module")
def hub():
    made = Hub()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """{command: its arguments}, in one run folder: small random models, a step each."""
    folder = tmp_path_factory.mktemp("hub") / "my-run"
    folder.mkdir()
    samples = [
        {"id": f"{i}/{n}", "prompt_id": str(i), "prompt": prompt, "response": text}
        for i, prompt in enumerate(PROMPTS)
        for n, text in enumerate(["Ask the owner.", f"Push and pull {i}."])
    ]
    outputs.write_jsonl(folder / "samples.jsonl", samples)
    outputs.write_jsonl(folder / "prompts.jsonl", [{"id": str(i), "prompt": one} for i, one in enumerate(PROMPTS)])
    outputs.write_jsonl(
        folder / "revised.jsonl",
        [
            {
                "id": str(i),
                "prompt": one,
                "response": "Push.",
                "rounds": [{"principle": "p", "critique": "It harms.", "revision": f"Ask first {i}.", "flags": []}],
            }
            for i, one in enumerate(PROMPTS)
        ],
    )
    model, training = models.folder("qwen"), ["--device", "cpu", "--batch-size", "4"]
    online = [*training, "--updates", "1", "--prompts-per-update", "4", "--max-new-tokens", "4"]
    given = {
        "judge": ["--input", "samples.jsonl", "--output", "preferences.jsonl", "--device", "cpu"],
        "sft": ["--input", "revised.jsonl", "--output", "sft", *training],
        "reward_model": ["--input", "preferences.jsonl", "--output", "reward", *training],
        "dpo": ["--input", "preferences.jsonl", "--output", "dpo", *training],
        "grpo": [
            "--input",
            "prompts.jsonl",
            "--output",
            "grpo",
            "--reward-model",
            folder / "reward",
            "--samples",
            "2",
            *online,
        ],
        "ppo": ["--input", "prompts.jsonl", "--output", "ppo", "--reward-model", folder / "reward", *online],
    }
    for arguments in given.values():
        for place in (1, 3):
            arguments[place] = folder / arguments[place]
        arguments += ["--model", model]
    return {name: [str(one) for one in arguments] for name, arguments in given.items()}


def push(path, hub_url, repository, *more, token=TOKEN, **variables):
    """push.py in a process of its own: where the Hub is, is read once per process."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, conftest.ROOT / "scripts" / "push.py", path, repository, "--json", *more],
        env={key: value for key, value in env.items() if value is not None},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def make(lines, invoke):
    """`make("judge")` runs the command, unless it has run, and gives its output."""

    def call(name):
        for needed in dict.fromkeys(("judge", "reward_model", name) if name != "sft" else (name,)):
            result = invoke(needed, *lines[needed])
            assert result.exit_code == 0, result.output
        return Path(lines[name][3])

    return call


@pytest.mark.slow
def test_preferences_a_failed_push_and_the_same_command_again(hub, make):
    output, hub.asked[:] = make("judge"), []
    refused = push(output, hub.url, "my-org/preferences", token="hf_wrong")
    assert refused.returncode == 1 and not refused.stdout, refused.stderr
    assert f"{output} was not pushed to my-org/preferences: " in refused.stderr and "401" in refused.stderr
    assert f"hf upload my-org/preferences {output} preferences.jsonl --repo-type dataset --private" in refused.stderr
    assert f"push.py {output} my-org/preferences --json" in refused.stderr, "the same command is in the message"
    assert not hub.repos and "Traceback" not in refused.stderr
    assert "Traceback" in push(output, hub.url, "my-org/x", "--debug", token="hf_wrong").stderr

    pushed = push(output, hub.url, "my-org/preferences")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["pushed"] == f"{hub.url}/datasets/my-org/preferences"
    repo = hub.repos["dataset my-org/preferences"]
    assert repo["private"] is True and "POST /api/repos/create" in hub.asked
    assert set(repo["files"]) == {"preferences.jsonl", "README.md"}
    assert repo["files"]["preferences.jsonl"] == output.read_bytes()
    card = repo["files"]["README.md"].decode()
    assert card.startswith("---\n") and MARK in card and "| rows in the file | 4 |" in card
    assert push(output, hub.url, "my-org/preferences").returncode == 0, "again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo", "grpo", "ppo"])
def test_every_trained_model_is_pushed_with_its_card(hub, make, name):
    folder = make(name)
    pushed = push(folder, hub.url, f"my-org/{name}")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["pushed"] == f"{hub.url}/my-org/{name}"
    repo = hub.repos[f"model my-org/{name}"]
    here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repo["private"] is True and "model.safetensors" in here
    assert repo["files"] == {path: data for path, data in here.items() if not path.startswith("checkpoints/")}
    card = here["README.md"].decode()
    assert "library_name: transformers" in card and f"- {name.replace('_', '-')}\n" in card
    assert ("fine-tuned on its own responses" in card) == (name == "sft")
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.parent.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_server_that_is_gone_a_public_repository_and_a_card_of_ones_own(hub, make):
    folder = make("dpo")
    gone = push(folder, "http://127.0.0.1:9", "my-org/gone")
    assert gone.returncode == 1 and (folder / "model.safetensors").is_file()
    assert f"hf upload my-org/gone {folder} . --repo-type model --private" in gone.stderr

    hub.repos["model my-org/open"] = {"private": False, "files": {}}
    (folder / "README.md").write_text("# My own words\n")
    refused = push(folder, hub.url, "my-org/open")
    assert refused.returncode == 1 and "is public" in refused.stderr
    assert hub.repos["model my-org/open"]["files"] == {}
    assert push(folder, hub.url, "my-org/own").returncode == 0
    assert hub.repos["model my-org/own"]["files"]["README.md"] == b"# My own words\n"


def test_what_can_not_work_is_refused_before_any_upload(hub, make, invoke, tmp_path):
    output, asked = make("judge"), len(hub.asked)
    offline = invoke("push", output, "my-org/x")
    assert offline.exit_code == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    bad = push(output, hub.url, "a/b/c")
    assert bad.returncode == 2 and "is not a valid name of a repository" in bad.stderr
    missing = push(tmp_path / "missing", hub.url, "my-org/x")
    assert missing.returncode == 2 and f"{tmp_path / 'missing'}: no such file or folder" in missing.stderr
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path in (tmp_path, tmp_path / "rows.jsonl"):
        foreign = push(path, hub.url, "my-org/x")
        assert foreign.returncode == 2 and "not a finished output" in foreign.stderr
    assert len(hub.asked) == asked


def test_an_unfinished_training_is_refused(hub, make, tmp_path):
    folder = shutil.copytree(make("dpo"), tmp_path / "dpo")
    manifest = make("dpo").with_name("dpo.run.json").read_text()
    (tmp_path / "dpo.run.json").write_text(manifest.replace('"done"', '"running"'))
    refused = push(folder, hub.url, "my-org/x")
    assert refused.returncode == 2 and "not a finished output" in refused.stderr


def test_no_token_is_refused_and_a_plan_uploads_nothing(hub, make, tmp_path):
    output = make("judge")
    bare = push(output, hub.url, "my-org/x", token=None, HF_HOME=str(tmp_path), HF_TOKEN_PATH=None)
    assert bare.returncode == 2 and "no token" in bare.stderr
    asked = len(hub.asked)
    plan = json.loads(push(output, hub.url, "my-org/plan", "--dry-run").stdout)
    assert (plan["push_to_hub"], plan["type"]) == ("my-org/plan, private", "dataset") and "pushed" not in plan
    assert len(hub.asked) == asked and "dataset my-org/plan" not in hub.repos
