"""No call of ours uses a name that a library has deprecated: the loop runs with such warnings as errors.

    pytest tests/project/test_deprecations.py

A library that calls itself, or another one, by an old name is not our affair: a warning is ours if the first frame
outside the machinery of warnings, decorators and modules is in this project.
"""

import json
import sys
import warnings

import models
import pytest
from conftest import ROOT

# Frames between a call and the warning about it.
MACHINERY = ("/warnings.py", "/deprecation.py", "/torch/nn/modules/module.py", "/transformers/utils/", "/functools.py")
MACHINERY += ("/contextlib.py", "/torch/utils/_contextlib.py")

ROWS = [{"id": name, "prompt": f"How do I oil the hinge of door {name}?", "kind": "benign"} for name in "abcd"]


@pytest.fixture
def strict(monkeypatch):
    """Deprecations of our own calls are errors; returns all that were warned of, as (file, message)."""
    seen, warn = [], warnings.warn

    def check(message, category=None, stacklevel=1, **more):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, FutureWarning | DeprecationWarning):
            frame = sys._getframe(1)
            while frame.f_back and any(part in frame.f_code.co_filename for part in MACHINERY):
                frame = frame.f_back
            caller = frame.f_code.co_filename
            seen.append((caller, str(message)))
            if caller.startswith(str(ROOT / "scripts")):
                raise AssertionError(f"{caller}:{frame.f_lineno}: {message}")
        warn(message, category, stacklevel + 1, **more)

    monkeypatch.setattr(warnings, "warn", check)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", "--lora-rank", 2]], ids=["full", "lora"])
def test_the_loop_uses_no_deprecated_name(invoke, tmp_path, strict, more):
    folder = models.folder("llama")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    few = ["--max-new-tokens", 6]

    def step(name, file, output, *arguments, model=folder):
        result = invoke(
            name,
            "--input",
            tmp_path / file,
            "--model",
            model,
            "--output",
            tmp_path / output,
            "--device",
            "cpu",
            *arguments,
        )
        assert result.exit_code == 0, (name, result.output, result.exception)
        return tmp_path / output

    step("generate", "prompts.jsonl", "responses.jsonl", "--samples", 2, "--temperature", 1.0, *few)
    step("critique", "responses.jsonl", "critiques.jsonl", *few)
    step("revise", "critiques.jsonl", "revisions.jsonl", *few)
    sft = step("sft", "revisions.jsonl", "sft", "--keep", "all", *more)
    step("judge", "responses.jsonl", "preferences.jsonl", model=sft)
    reward = step("reward_model", "preferences.jsonl", "reward", "--holdout", 0, *more, model=sft)
    step("dpo", "preferences.jsonl", "dpo", *more, model=sft)
    sizes = ["--reward-model", reward, "--updates", 1, "--prompts-per-update", 2, *few, *more]
    step("ppo", "prompts.jsonl", "ppo", *sizes, model=sft)
    step("grpo", "prompts.jsonl", "grpo", "--samples", 2, *sizes, model=sft)


def test_a_deprecated_call_of_ours_is_seen(strict, monkeypatch):
    """The fixture itself: a call from a file of the project is an error, one from elsewhere is noted."""
    warnings.warn("of a test", FutureWarning, stacklevel=2)
    assert strict[-1][1] == "of a test"
    code = compile("import warnings\nwarnings.warn('old', DeprecationWarning)", str(ROOT / "scripts" / "x.py"), "exec")
    with pytest.raises(AssertionError, match="old"):
        exec(code, {})
