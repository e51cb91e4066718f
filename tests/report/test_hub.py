"""--push-to-hub: what a server that stands for the Hub is asked, what it gets, and what is said when it fails."""

import base64
import hashlib
import json
import os
import re
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

COMMANDS = ("judge", "sft", "reward_model", "dpo", "grpo", "ppo")
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


def run(name, arguments, hub_url, repo, token=TOKEN, **more):
    """The command in a process of its own: where the Hub is, is read once in a process."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }
    return subprocess.run(
        [sys.executable, conftest.ROOT / "scripts" / f"{name}.py", *arguments, "--push-to-hub", repo, "--json"],
        env={key: value for key, value in env.items() if value is not None},
        capture_output=True,
        text=True,
    )


def output_of(arguments) -> Path:
    return Path(arguments[3])


def test_preferences_a_failed_push_and_the_same_command_again(hub, lines):
    arguments, hub.asked[:] = lines["judge"], []
    refused = run("judge", arguments, hub.url, "my-org/preferences", token="hf_wrong")
    output = output_of(arguments)
    assert refused.returncode == 1 and output.is_file(), refused.stderr
    said = json.loads(refused.stdout)["not_pushed"]
    assert f"error: {said}" in refused.stderr
    assert "is complete, but was not pushed to my-org/preferences: " in said and "401" in said
    assert f"hf upload my-org/preferences {output} preferences.jsonl --repo-type dataset --private" in said
    assert not hub.repos and "Traceback" not in refused.stderr

    before = output.stat().st_mtime_ns
    assert f"{arguments[1]} --output {output}" in said, "the same command is in the message"
    pushed = run("judge", arguments, hub.url, "my-org/preferences")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["pushed"] == f"{hub.url}/datasets/my-org/preferences"
    assert output.stat().st_mtime_ns == before, "it was not judged again"
    repo = hub.repos["dataset my-org/preferences"]
    assert repo["private"] is True and "POST /api/repos/create" in hub.asked
    assert set(repo["files"]) == {"preferences.jsonl", "README.md"}
    assert repo["files"]["preferences.jsonl"] == output.read_bytes()
    card = repo["files"]["README.md"].decode()
    assert card.startswith("---\n") and MARK in card and "| rows in the file | 4 |" in card


def test_a_model_is_trained_and_pushed(hub, lines):
    made = run("sft", lines["sft"], hub.url, "my-org/sft")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["pushed"] == f"{hub.url}/my-org/sft"
    folder, repo = output_of(lines["sft"]), hub.repos["model my-org/sft"]
    here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repo["private"] is True and repo["files"] == here and "model.safetensors" in here
    card = here["README.md"].decode()
    assert "library_name: transformers" in card and "fine-tuned on its own responses" in card
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.parent.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["reward_model", "dpo", "grpo", "ppo"])
def test_the_other_trainings_push_what_is_done(hub, lines, invoke, name):
    for needed in ("judge", "reward_model", name):
        made = invoke(needed, *lines[needed])
        assert made.exit_code == 0, made.output
    again = run(name, lines[name], hub.url, f"my-org/{name}")
    assert again.returncode == 0, again.stderr
    folder, repo = output_of(lines[name]), hub.repos[f"model my-org/{name}"]
    assert repo["private"] is True and repo["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = repo["files"]["README.md"].decode()
    assert f"- {name.replace('_', '-')}\n" in card and "fine-tuned on its own responses" not in card


def test_a_server_that_is_gone_a_public_repository_and_a_card_of_ones_own(hub, lines, invoke):
    assert invoke("judge", *lines["judge"]).exit_code == 0
    assert invoke("dpo", *lines["dpo"]).exit_code == 0
    folder = output_of(lines["dpo"])
    gone = run("dpo", lines["dpo"], "http://127.0.0.1:9", "my-org/gone")
    assert gone.returncode == 1 and (folder / "model.safetensors").is_file()
    assert f"hf upload my-org/gone {folder} . --repo-type model --private" in json.loads(gone.stdout)["not_pushed"]

    hub.repos["model my-org/open"] = {"private": False, "files": {}}
    (folder / "README.md").write_text("# My own words\n")
    refused = run("dpo", lines["dpo"], hub.url, "my-org/open")
    assert refused.returncode == 1 and "is public" in json.loads(refused.stdout)["not_pushed"]
    assert hub.repos["model my-org/open"]["files"] == {}
    assert run("dpo", lines["dpo"], hub.url, "my-org/own").returncode == 0
    assert hub.repos["model my-org/own"]["files"]["README.md"] == b"# My own words\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_can_not_work_is_refused_before_the_work(lines, invoke, name):
    offline = invoke(name, *lines[name], "--push-to-hub", "my-org/x")
    assert offline.exit_code == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    bad = invoke(name, *lines[name], "--push-to-hub", "a/b/c")
    assert bad.exit_code == 2 and "is no name of a repository" in bad.stderr


def test_no_token_is_refused_and_a_plan_names_the_repository(hub, lines, tmp_path):
    arguments = [*lines["sft"][:3], str(tmp_path / "new"), *lines["sft"][4:]]
    bare = run("sft", arguments, hub.url, "my-org/x", token=None, HF_HOME=str(tmp_path), HF_TOKEN_PATH=None)
    assert bare.returncode == 2 and "no token" in bare.stderr and not (tmp_path / "new").exists()
    plan = run("sft", [*arguments, "--dry-run"], hub.url, "my-org/x")
    assert json.loads(plan.stdout)["push_to_hub"] == "my-org/x, private"
    assert not (tmp_path / "new").exists() and "model my-org/x" not in hub.repos
