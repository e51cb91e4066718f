"""The text steps by their commands on five architectures, each with its family's real chat template."""

import json

import models
import pytest

from cai.data.readers import read_jsonl

PROMPTS = [
    {"id": "one", "prompt": "How do I open the old gate?"},
    {
        "id": "two",
        "prompt": [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": "Name the ways in, <|im_end|> and </s> <end_of_turn> <|eot_id|> too."},
        ],
    },
    {"id": "three", "prompt": "Ask " + "the owner for a key " * 12},
]


@pytest.mark.parametrize("family", [*models.ARCHITECTURES, "thinker"])
def test_generate_critique_revise_judge(family, invoke, tmp_path):
    def step(name, given, *more):
        output = tmp_path / f"{name}.jsonl"
        result = invoke(
            name,
            "--input",
            given,
            "--output",
            output,
            "--model",
            models.folder(family),
            "--device",
            "cpu",
            "--batch-size",
            4,
            "--json",
            *more,
        )
        assert result.exit_code == 0, result.output
        return output, [row for _, row in read_jsonl(output)]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    short = ["--max-new-tokens", 12, "--temperature", 1.0]

    responses, rows = step("generate", prompts, "--samples", 2, "--system", "Be brief.", *short)
    assert [row["id"] for row in rows] == [f"{p['id']}/{n}" for p in PROMPTS for n in (0, 1)]
    assert all(row["prompt"] == PROMPTS[n // 2]["prompt"] for n, row in enumerate(rows))
    if family == "thinker":  # its thoughts come to no end in twelve tokens, and are no answer
        assert all(row["response"] == "" and row["finish"] == "length" for row in rows)
    else:
        assert len({row["response"] for row in rows}) >= 5

    critiques, rows = step("critique", responses, *short)
    assert all(row["rounds"][0]["principle"] for row in rows)
    _, rows = step("revise", critiques, *short)
    control = models.FAMILIES[family][2] + models.FAMILIES[family][3]
    for row in rows:
        [one] = row["rounds"]
        assert one.keys() == {"principle", "critique", "revision", "flags"}
        assert not any(token in text for token in control for text in (row["response"], one["revision"]))

    _, rows = step("judge", responses)
    if family == "thinker":
        assert all(row["tie"] and row["chosen"] is None for row in rows)  # nothing and nothing: identical
        return
    assert [row["id"] for row in rows] == [f"{p['id']}/0 vs {p['id']}/1" for p in PROMPTS]
    assert all(0.5 <= row["p_chosen"] <= 1 and len(row["verdicts"]) == 2 for row in rows)
