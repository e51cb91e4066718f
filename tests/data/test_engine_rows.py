"""data/engine_rows.py: rows in the engines' formats, and stages that an engine does not have."""

import pytest

from cai.base.errors import InputError
from cai.data.engine_rows import BASES, ENGINES, SEVERAL_TURNS, STAGES, check_stage, convert

USER = [{"role": "user", "content": "Is it late?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
TURNS = [*USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "How late?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def record(stage, prompt):
    sides = {"chosen": answer("Yes."), "rejected": answer("No."), "p_chosen": 0.7}
    return {
        "prompt": prompt,
        **({"completion": answer("Yes.")} if stage == "sft" else sides if "rl" not in stage else {}),
    }


@pytest.mark.parametrize(
    ("engine", "stage", "row"),
    [
        ("openrlhf", "sft", {"prompt": USER, "response": answer("Yes.")}),
        ("openrlhf", "reward", {"prompt": USER, "chosen": answer("Yes."), "rejected": answer("No.")}),
        ("nemo-rl", "ppo", {"input": "Is it late?", "output": ""}),
        ("verl", "sft", {"messages": USER + answer("Yes.")}),
        ("llamafactory", "ppo", {"instruction": "Is it late?", "input": "", "output": "", "system": "", "history": []}),
        ("axolotl", "reward", {"system": "", "input": "Is it late?", "chosen": "Yes.", "rejected": "No."}),
    ],
)
def test_rows_have_the_fields_that_the_engine_reads(engine, stage, row):
    assert convert(engine, stage)(record(stage, USER)) == row


def test_verl_gets_no_answer_to_compare_with():
    row = convert("verl", "ppo")({"prompt": USER})
    assert row["prompt"] == USER and row["reward_model"] == {"style": "model", "ground_truth": ""}


def test_a_conversation_that_a_format_cannot_hold_is_named():
    assert convert("axolotl", "reward")(record("reward", TURNS)) == SEVERAL_TURNS
    assert convert("nemo-rl", "grpo")({"prompt": SYSTEM}) == SEVERAL_TURNS
    row = convert("llamafactory", "ppo")({"prompt": [*SYSTEM[:1], *TURNS]})
    assert row["history"] == [["Is it late?", "Yes."]] and row["system"] == "Be brief."


def test_a_stage_that_an_engine_does_not_have_is_an_error_with_those_it_has():
    with pytest.raises(InputError, match="trl has no stage ppo; expected sft or reward or grpo or dpo"):
        check_stage("trl", "ppo")
    with pytest.raises(InputError, match="verl needs a stage"):
        check_stage("verl", None)
    assert set(BASES) == set(STAGES) and all(set(stages) <= set(STAGES) for stages in ENGINES.values())
