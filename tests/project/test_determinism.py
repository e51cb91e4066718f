"""The same command twice: the same bytes on one machine (CPU, float32), sampling and training included.

That a row's draws depend neither on the order of the rows nor on a resume: tests/steps/test_text.py.
"""

import json
import os
import random
import subprocess
import sys

import models
import pytest
from conftest import ROOT

from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.models import loading

COUNT = 24


@pytest.fixture
def place(tmp_path):
    """The inputs of every command, and a constitution."""
    rows = [
        {
            "id": f"r{n}",
            "prompt_id": f"p{n // 2}",
            "sample": n % 2,
            "prompt": f"How do I open gate {n // 2}? " * (1 + n // 2 % 4),
            "kind": "benign",
            "response": f"Lift bar {n}. " * (1 + n % 3),
            "rounds": [
                {
                    "principle": f"principle-{1 + n % 2}",
                    "critique": f"It harms {n}.",
                    "revision": f"Ask, {n} times.",
                    "flags": [],
                }
            ],
        }
        for n in range(COUNT)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(
        tmp_path / "undone.jsonl", [{**row, "rounds": [{**row["rounds"][0], "revision": None}]} for row in rows]
    )
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {
                "id": f"p{n}",
                "prompt": f"A or B, {n}?",
                "chosen": f"Ask the owner, {n} times.",
                "rejected": f"Push it {n} times.",
                "p_chosen": 0.5 + n % 5 / 10,
            }
            for n in range(COUNT)
        ],
    )
    (tmp_path / "rules.yaml").write_text("- Respect property.\n- Tell the truth.\n- Harm nobody.\n")
    return tmp_path


def reward_model(place):
    """A random one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = place / "reward"
    if not folder.exists():
        torch.manual_seed(0)
        base = models.folder("llama")
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
        loading.load_chat(str(base)).tokenizer.save_pretrained(folder)
    return folder


def line(command, place, output, *more):
    source = {"revise": "undone", "reward_model": "pairs", "dpo": "pairs"}.get(command, "rows")
    text = command in ("generate", "critique", "revise", "judge")
    arguments = [
        "--input",
        place / f"{source}.jsonl",
        "--output",
        output,
        "--model",
        models.folder("llama"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--seed",
        5,
    ]
    if command in ("critique", "revise", "judge"):
        arguments += ["--constitution", place / "rules.yaml"]
    if command in ("ppo", "grpo"):
        arguments += [
            "--reward-model",
            reward_model(place),
            "--updates",
            2,
            "--prompts-per-update",
            4,
            "--epochs",
            1,
            "--minibatches",
            2,
            "--max-new-tokens",
            6,
            "--learning-rate",
            1e-3,
        ]
        arguments += ["--samples", 4] if command == "grpo" else []
    elif command == "evaluate":
        arguments += ["--judge", models.folder("llama"), "--max-new-tokens", 6]
    elif command == "judge":
        arguments += ["--cot", "--max-new-tokens", 6]
    elif text:
        arguments += ["--temperature", 1.0, "--top-p", 0.9, "--max-new-tokens", 12]
    else:
        arguments += ["--batch-size", 8, "--learning-rate", 1e-3]
    return [str(part) for part in (*arguments, *more)]


def written(path) -> dict[str, bytes]:
    """Bytes by name of a file or of a folder's weights, settings and tokenizer."""
    if path.is_file():
        return {"rows": path.read_bytes()}
    names = [one for one in sorted(path.rglob("*")) if one.suffix in (".safetensors", ".json", ".jinja")]
    assert any(one.suffix == ".safetensors" for one in names)
    return {str(one.relative_to(path)): one.read_bytes() for one in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["generate", "critique", "revise", "judge", "sft", "reward_model", "dpo", "ppo", "grpo", "evaluate"]
)
def test_twice_the_same_bytes(command, place, invoke):
    for name in ("one", "two"):
        result = invoke(command, *line(command, place, place / name))
        assert result.exit_code == 0, result.output
    assert written(place / "one") == written(place / "two")
    if command == "generate":
        other = invoke(command, *line(command, place, place / "other", "--seed", 6))
        assert other.exit_code == 0 and written(place / "other") != written(place / "one"), "the seed decides nothing"


@pytest.mark.slow
def test_another_process_with_other_hashes_writes_the_same(place, invoke):
    """Where the order of a set or a dict decided anything, another PYTHONHASHSEED would show it."""
    assert invoke("generate", *line("generate", place, place / "one")).exit_code == 0
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate.py"), *line("generate", place, place / "two")],
        env={**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert written(place / "one") == written(place / "two")


def test_the_order_of_rows_changes_no_draw_of_a_principle(place, invoke):
    """Nor, where no row has an id of its own, the id that it is given."""
    rows = [
        {k: v for k, v in row.items() if k not in ("id", "prompt_id", "rounds")}
        for _, row in read_jsonl(place / "rows.jsonl")
    ]
    drawn = []
    for seed in (None, 1):
        if seed is not None:
            random.Random(seed).shuffle(rows)
        write_jsonl(place / "rows.jsonl", rows)
        output = place / f"critiques-{seed}.jsonl"
        assert invoke("critique", *line("critique", place, output, "--max-new-tokens", 2)).exit_code == 0
        drawn.append(
            {
                row["prompt"] + row["response"]: (row["id"], row["rounds"][-1]["principle"])
                for _, row in read_jsonl(output)
            }
        )
    assert drawn[0] == drawn[1] and len(drawn[0]) == COUNT
    assert len({principle for _, principle in drawn[0].values()}) == 3


@pytest.mark.parametrize("command", ["generate", "critique", "revise"])
def test_no_batch_size_changes_greedy_text(command, place, invoke):
    found = []
    for size in (1, 3, 32):
        output = place / f"batch-{size}"
        result = invoke(command, *line(command, place, output, "--temperature", 0, "--batch-size", size))
        assert result.exit_code == 0, result.output
        found.append(output.read_bytes())
    assert found[0] == found[1] == found[2]


def test_no_batch_size_changes_a_verdict(place, invoke):
    """Log-probabilities of other batches differ in their last digits; who is preferred does not."""
    found = []
    for size in (1, 32):
        output = place / f"batch-{size}"
        arguments = [part for part in line("judge", place, output, "--batch-size", size) if part != "--cot"]
        assert invoke("judge", *arguments).exit_code == 0
        found.append(
            [(row["id"], row["chosen"], row["principle"], round(row["p_chosen"], 4)) for _, row in read_jsonl(output)]
        )
    assert found[0] == found[1] and len(found[0]) == COUNT // 2
    assert json.dumps(found[0])
