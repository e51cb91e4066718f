"""train/updates.py: what PPO and GRPO write of their updates."""

import toys

from cai.data import readers
from cai.train import common, grpo, updates


def test_every_figure_of_a_row_is_described(tmp_path):
    chat, make = toys.talker(("go", "a"), 0.5)
    trainer = toys.trainer(
        tmp_path,
        chat,
        make,
        lambda prompts, responses: [float(len(text)) for text in responses],
        judge=lambda prompts, responses: [1.0] * len(responses),
        updates=1,
        scale_scores=True,
    )
    common.run_trainer(trainer, tmp_path)
    row = next(row for _, row in readers.read_jsonl(tmp_path / "metrics.jsonl"))
    assert set(row) <= set(updates.FIGURES)
    assert set(grpo.TRL_NAMES) <= set(updates.FIGURES)
    assert updates.summarise(tmp_path, 7)["steps"] == 7


def test_samples_of_a_stopped_run_are_replaced(tmp_path):
    for update, text in ((1, "a"), (2, "b"), (3, "c"), (2, "d")):
        updates.write_samples(tmp_path, update, [{"response": text}])
    rows = [(row["update"], row["response"]) for _, row in readers.read_jsonl(tmp_path / "samples.jsonl")]
    assert rows == [(1, "a"), (2, "d")]
