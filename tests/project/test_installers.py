"""Where agents look: the folder as each client finds it, linked and installed, and as the specification reads it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_docs import tracked

NAME = "constitutional-ai"
CLIENTS = [".claude", ".agents", ".cursor", ".codex", ".gemini"]
# The installer's last versions for Node 18 and for Node 22.20, pinned: what it does is tested, not what it becomes.
INSTALLERS = {(22, 20): "skills@1.7.4", (18, 0): "skills@1.5.26"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a clone has: the files under version control, in a folder of the right name."""
    folder = tmp_path_factory.mktemp("clone") / NAME
    for name in tracked():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*words, cwd, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=280,
        **more,
    )


def works(skill: Path, project: Path) -> None:
    """A command of the skill, called from the project as an agent would."""
    done = run(sys.executable, skill / "scripts" / "constitution.py", "lint", "--constitution", "privacy", cwd=project)
    assert done.returncode == 0 and "0 findings" in done.stdout, done.stderr


# --- the specification --------------------------------------------------------------------------------------


def validate(folder: Path) -> subprocess.CompletedProcess:
    return run(Path(sys.executable).parent / "agentskills", "validate", folder, cwd=folder.parent)


def test_the_validator_of_the_specification_passes(clone, tmp_path):
    done = validate(clone)
    assert done.returncode == 0, done.stdout + done.stderr
    other = tmp_path / "another-name"
    other.mkdir()
    shutil.copy(clone / "SKILL.md", other)
    assert validate(other).returncode != 0  # it does look


def test_the_stricter_limits_of_one_client_too(clone):
    front = yaml.safe_load((clone / "SKILL.md").read_text(encoding="utf-8").split("---\n")[1])
    assert not re.search("claude|anthropic", front["name"])
    assert not re.search("[<>]", front["name"] + front["description"])
    assert len(front["description"]) <= 1024


def test_the_marketplace_file_leads_to_the_skill(clone):
    market = json.loads((clone / ".claude-plugin" / "marketplace.json").read_text(encoding="utf-8"))
    version = tomllib.loads((clone / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert market["metadata"]["version"] == version and market["owner"]["name"]
    [plugin] = market["plugins"]
    assert market["name"] == plugin["name"] == NAME
    [skill] = plugin["skills"]
    assert (clone / plugin["source"] / skill / "SKILL.md").is_file()
    # Without a plugin.json of its own, the entry must stand for it.
    assert plugin["strict"] is False and not (clone / ".claude-plugin" / "plugin.json").exists()


# --- linked, cloned, installed ------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_a_link_in_the_folder_of_a_client_works(client, tmp_path, clone):
    place = tmp_path / client / "skills" / NAME
    place.parent.mkdir(parents=True)
    place.symlink_to(clone, target_is_directory=True)
    works(Path(client) / "skills" / NAME, tmp_path)


def installer() -> str:
    """The package to run, by what is on this machine; the test is skipped, with the reason, without npm."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("npm is not installed, and the installer of skills comes from it")
    version = run("node", "--version", cwd="/").stdout.strip()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    for least, package in INSTALLERS.items():
        if numbers >= least:
            return package
    pytest.skip(f"node {version} is too old for the installer of skills")


# What npm says when there is no registry to ask.
UNREACHED = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ENOTCACHED")


@pytest.mark.slow
def test_the_installer_of_skills_brings_all_that_is_needed(clone, tmp_path):
    package = installer()
    home = tmp_path / "home"
    home.mkdir()
    project = tmp_path / "project"
    project.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "DO_NOT_TRACK": "1",
        "DISABLE_TELEMETRY": "1",
        "CI": "1",
        "npm_config_userconfig": str(Path.home() / ".npmrc"),
        "npm_config_cache": str(Path.home() / ".npm"),
        "npm_config_update_notifier": "false",
    }
    done = run(
        "npm",
        "exec",
        "--yes",
        f"--package={package}",
        "--",
        "skills",
        "add",
        clone,
        "--yes",
        "--copy",
        "--agent",
        "claude-code",
        "codex",
        "cursor",
        "gemini-cli",
        cwd=project,
        env=environment,
    )
    if done.returncode and (code := UNREACHED.search(done.stderr)):
        pytest.skip(f"npm reaches no registry ({code[0]})")
    assert done.returncode == 0, done.stdout + done.stderr
    places = sorted(path.parent for path in project.glob(".*/skills/*/SKILL.md"))
    assert {path.parts[-3] for path in places} >= {".claude", ".agents"}
    for place in places:
        assert place.name == NAME
        lost = [
            name
            for name in tracked()
            if not name.startswith(".")
            and (clone / name).is_file()
            and (not (place / name).is_file() or (place / name).read_bytes() != (clone / name).read_bytes())
        ]
        assert not lost, f"{package} did not bring {lost} to {place.parts[-3]}"
    # What arrived is enough to run on: the bundled model answers.
    script = places[0].relative_to(project) / "scripts"
    prompts = script / "cai" / "tiny" / "prompts" / "train.jsonl"
    done = run(
        sys.executable,
        script / "generate.py",
        "--input",
        prompts,
        "--model",
        "tiny",
        "--limit",
        "2",
        "--max-new-tokens",
        "16",
        "--output",
        "runs/out.jsonl",
        "--json",
        cwd=project,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2
    assert len((project / "runs" / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 2
