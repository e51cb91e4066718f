"""Untrusted text and files: nothing in them is run, or taken for a path; and no key is written anywhere."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
from conftest import ROOT

from cai.base.errors import InputError
from cai.constitution import importing
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.outputs import csv_cell, write_jsonl
from cai.models import loading
from cai.models.loading import load_engine

KEY = "sk-planted-3f9a1c77d2"
OPEN = "open({!r}, 'w')"  # what must not be run leaves a file


@pytest.fixture
def ran(tmp_path):
    """A file that is there only if something was run that must not be."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code out of a file was run"


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ prompt.format.__globals__ }}}}",
        "{{% include '{}' %}}",
        "{{% import '{}' as x %}}",
        "{{{{ range(999999999) | list }}}}",
    ],
)
def test_a_template_is_rendered_in_a_sandbox(attack, tmp_path, ran):
    path = tmp_path / "mine.jinja"
    path.write_text("{% block user %}" + attack.format(ran) + "{% endblock %}")
    with pytest.raises(InputError, match=r"mine\.jinja"):
        load_template(str(path)).render(prompt="x")


@pytest.mark.parametrize(
    "attack",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {}') }}}}",
        "{{{{ messages.__class__.__base__.__subclasses__() }}}}",
        "{{{{ range(999999999) | list }}}}",
        "{{{{ 1 // 0 }}}}",
        "{{% for m in messages %}}{{{{ m.content.__class__.__mro__ }}}}{{% endfor %}}",
    ],
)
def test_a_foreign_chat_template_is_rendered_in_a_sandbox(attack, tmp_path, ran):
    folder = models.copy("llama", tmp_path / "foreign")
    (folder / "chat_template.jinja").write_text(attack.format(ran))
    for load in (loading.load_chat, lambda path: load_engine(path, device="cpu")):
        with pytest.raises(InputError, match="chat template"):
            load(str(folder))


# --- checkpoints -------------------------------------------------------------------------------------------------


LOADERS = {
    "engine": lambda path: load_engine(path, device="cpu"),
    "chat": loading.load_chat,
    "policy": lambda path: loading.load_policy(path, "cpu"),
    "reward model": lambda path: loading.load_reward_model(path, "cpu"),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_remote_code_is_neither_run_nor_asked_about(kind, tmp_path, ran, monkeypatch):
    """transformers asks at the terminal where it is not told: a `y` in somebody's pipe must not be an answer."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "y")
    folder = models.copy("llama", tmp_path / "foreign")
    code = {
        "AutoConfig": "strange.Config",
        "AutoModelForCausalLM": "strange.Model",
        "AutoModelForSequenceClassification": "strange.Model",
        "AutoTokenizer": ["strange.Tokenizer", None],
    }
    for name, more in (
        ("config.json", {"model_type": "strange"}),
        ("tokenizer_config.json", {"tokenizer_class": "StrangeTokenizer"}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **more, "auto_map": code}))
    (folder / "strange.py").write_text(OPEN.format(str(ran)) + "\n")
    with contextlib.suppress(InputError):  # a tokenizer may be read without the code
        LOADERS[kind](str(folder))
    assert not asked


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["engine", "policy", "reward model"])
def test_pickled_weights_are_never_loaded(kind, tmp_path, ran):
    folder = models.copy("llama", tmp_path / "foreign")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(ran)}))
    with pytest.raises(InputError, match="no weights in safetensors"):
        LOADERS[kind](str(folder))
    (folder / "other.safetensors").write_bytes(b"")  # a decoy
    with pytest.raises(InputError):
        LOADERS[kind](str(folder))


def test_a_constitution_constructs_nothing(tmp_path, ran):
    path = tmp_path / "rules.yaml"
    path.write_text(f"- !!python/object/apply:os.system ['touch {ran}']\n")
    with pytest.raises(InputError, match="a YAML tag"):
        load_constitution(str(path))


# --- names and cells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/../../evil", "..", ".hidden", "x" * 300, "nul\\0", "-rf"])
def test_the_name_of_a_constitution_is_no_path(name, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps({"name": name, "principles": ["Tell the truth."]}))
    for kind in ("markdown", "llm-swarm"):
        [file] = importing.write_foreign(load_constitution(str(rules)), kind)[0]
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / file).write_text("x")
        assert (tmp_path / "out" / file).resolve().parent == (tmp_path / "out").resolve()
        assert not file.startswith((".", "-"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rules.yaml"]


def test_ids_are_no_paths(tmp_path, invoke):
    ids = ["../../evil", "/evil", "a\nb", "nul\0", "x" * 5000, "%2e%2e/", "--output", "é/😀"]
    rows = tmp_path / "work" / "in.jsonl"
    rows.parent.mkdir()
    write_jsonl(
        rows,
        [
            {"id": one, "prompt_id": one, "prompt": "A or B?", "response_a": "A.", "response_b": f"B {n}."}
            for n, one in enumerate(ids)
        ],
    )
    common = ("--model", models.folder("llama"), "--device", "cpu", "--max-new-tokens", 3)
    made = invoke("generate", "--input", rows, "--output", rows.parent / "out.jsonl", *common)
    judged = invoke("judge", "--input", rows, "--output", rows.parent / "judged.jsonl", *common)
    assert made.exit_code == judged.exit_code == 0, made.output + judged.output
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert sorted(path.name for path in rows.parent.iterdir()) == [
        "in.jsonl",
        "judged.jsonl",
        "judged.jsonl.run.json",
        "out.jsonl",
        "out.jsonl.run.json",
    ]


def test_cells_that_begin_a_formula_are_quoted(tmp_path):
    assert [csv_cell(text) for text in ("=cmd()", "+1", "-1", "@x", "\tx", "\rx", "a=b", "", -1.5, None)] == [
        "'=cmd()",
        "'+1",
        "'-1",
        "'@x",
        "'\tx",
        "'\rx",
        "a=b",
        "",
        -1.5,
        None,
    ]
    for path in (ROOT / "scripts").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(word in text for word in ("csv.writer", "csv.DictWriter", "to_csv")):
            assert "csv_cell(" in text, f"{path.name} writes CSV: put its cells through outputs.csv_cell"


# --- the key -----------------------------------------------------------------------------------------------------


BROKEN = ["generate", "critique", "revise", "judge", "sft", "reward_model", "dpo", "ppo", "grpo", "evaluate", "report"]


@pytest.mark.parametrize("command", BROKEN)
@pytest.mark.parametrize("fault", ["no input", "bad row", "no model"])
def test_no_key_in_what_a_failing_command_says_or_writes(command, fault, tmp_path, invoke, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_KEY"):
        monkeypatch.setenv(name, KEY)
    rows = tmp_path / "in.jsonl"
    if fault != "no input":
        rows.write_text('{"prompt": ["bad"]}\n' if fault == "bad row" else '{"prompt": "x"}\n')
    model = tmp_path / "nothing" if fault == "no model" else models.folder("llama")
    arguments = ["--input", rows, "--output", tmp_path / "out", "--model", model, "--debug"]
    result = invoke(command, *(arguments if command != "report" else [tmp_path / "nothing", "--debug"]))
    assert result.exit_code == 2, result.output
    assert KEY not in result.output
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_no_key_in_the_manifest_the_report_or_the_title_of_the_process(tmp_path):
    rows = tmp_path / "in.jsonl"
    write_jsonl(rows, [{"prompt": f"A or B, {n}?"} for n in range(20)])
    names = ("OPENAI_API_KEY", "HF_TOKEN", "MY_KEY")
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "scripts" / "generate.py"),
            "--input",
            str(rows),
            "--output",
            str(tmp_path / "out.jsonl"),
            "--model",
            str(models.folder("llama")),
            "--max-new-tokens",
            "8",
            "--key-name",
            "MY_KEY",
            "--debug",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **dict.fromkeys(names, KEY)},
    )
    titles = set()
    with contextlib.suppress(OSError):  # where there is no /proc
        while process.poll() is None:
            titles |= {Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "comm")}
            time.sleep(0.2)
    said = b"".join(process.communicate())
    assert process.returncode == 0, said
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert not [text for text in (said, *titles, *written) if KEY.encode() in text]


SERVED = {
    "critique": ("critique", "--examples", "0", "--model", "openai:m", "--endpoint"),
    "judge": ("judge", "--model", "openai:m", "--endpoint"),
    "evaluate": ("evaluate", "--judge", "openai:m@"),
    "coverage": ("constitution", "coverage", "--model", "openai:m", "--endpoint"),
    "doctor": ("doctor", "--model", "openai:m", "--endpoint"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["passed", "status 401", "status 500", "garbage"])
@pytest.mark.parametrize("command", SERVED)
def test_no_key_of_a_server_in_any_command_that_asks_one(command, fault, tmp_path, invoke, monkeypatch):
    """The server echoes the key with its errors. generate.py, and more faults: tests/models/test_servers.py."""
    from faulty_proxy import FaultyProxy
    from small_server import SmallServer

    from cai.models import servers

    for name, value in (("PATIENCE", 1.0), ("GREETINGS", 2), ("TRIES", 2)):
        if fault != "passed":  # where all is well, a busy machine may take its time
            monkeypatch.setattr(servers, name, value)
    monkeypatch.setenv("MY_KEY", KEY)
    rows = tmp_path / "in.jsonl"
    write_jsonl(
        rows,
        [
            {
                "id": str(n),
                "prompt": f"A or B, {n}?",
                "kind": "harmful",
                **({"response_a": f"A, {n}.", "response_b": f"B, {n}."} if command == "judge" else {"response": "A."}),
            }
            for n in range(2)
        ],
    )
    with SmallServer() as server, FaultyProxy(server.address, rate=1, faults=[fault]) as proxy:
        *words, last = SERVED[command]
        line = [*words, last + proxy.address] if last.endswith("@") else [*words, last, proxy.address]
        line += {"doctor": [], "evaluate": ["--responses", rows]}.get(command, ["--input", rows])
        result = invoke(*line, "--output", tmp_path / "out.jsonl", "--key-name", "MY_KEY", "--debug", "--json")
        assert proxy.headers["authorization"] == f"Bearer {KEY}"
    assert result.exit_code in ((0,) if fault == "passed" and command != "doctor" else (1, 2, 3)), result.output
    assert KEY not in result.output + result.stdout + result.stderr
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
