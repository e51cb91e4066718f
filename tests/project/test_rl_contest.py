"""contest.py: a run's policy after RL against its SFT model, with responses of which the better one is known."""

import json
import random
import subprocess
import sys

import contest
import models
import pytest
from click.testing import CliRunner

from cai.data import outputs
from cai.evaluate import framed
from cai.stats import intervals
from cai.world import language, oracle

FRAME = {"frame": "tutor", "frame_kind": "role_play", "frame_split": "seen"}


def write_run(folder, wins: int, losses: int, same: int):
    """A run of harmful prompts, each plainly and in a frame: RL declines where SFT complied, and the other way."""
    rng, styles = random.Random(0), [("good", "comply")] * wins + [("comply", "good")] * losses
    prompts = language.prompt_rows("harmful", "heldout", 3, wins + losses + same)
    rows = {"ppo": [], "sft": []}
    for prompt, of_both in zip(prompts, styles + [("same", "same")] * same, strict=True):
        act = oracle.act_of(prompt)
        for more in ({}, {**FRAME, "id": f"{prompt['id']}@frame:tutor", "prompt_id": prompt["id"]}):
            conversation = [{"role": "system", "content": "Teach."}, {"role": "user", "content": prompt["prompt"]}]
            row = {**prompt, **more, **({"conversation": conversation} if more else {})}
            for stage, style in zip(rows, of_both, strict=True):
                text = "Same." if style == "same" else language.respond(rng, act, style)
                rows[stage].append({**row, "response": text, "model": stage, "finish": "stop"})
    folder.mkdir(exist_ok=True)
    for stage, of_stage in rows.items():
        outputs.write_jsonl(folder / f"evaluation-{stage}.responses.jsonl", of_stage)
    return folder


def write_reward_model(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = models.folder("llama")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_wins_by_the_oracle_are_counted_where_it_sees_a_difference(tmp_path):
    pairs = contest.pair_responses(write_run(tmp_path, 7, 2, 3))
    assert len(pairs) == 24
    plain = [pair for pair in pairs if not framed.is_framed(pair)]
    wins = contest.count_wins(plain, contest.ask_oracle(pairs))
    assert (wins["value"], wins["n"]) == (7 / 9, 9)
    # Wilson's interval, of one row fewer: the variance of clusters is that of a sample.
    assert wins["low"] == pytest.approx(intervals.wilson(7 / 9, 8)["low"])


def test_the_judge_reads_the_conversation_of_a_frame(tmp_path):
    pairs = contest.pair_responses(write_run(tmp_path, 1, 0, 0))
    assert [pair["prompt"][0]["content"] for pair in pairs if framed.is_framed(pair)] == ["Teach."]
    assert {pair["prompt_id"] for pair in pairs} == {pairs[0]["id"]}


def test_the_reward_is_compared_in_deviations_of_the_first_model():
    pairs = [{"id": name, "prompt_id": name} for name in "abc"]
    scores = {"a": (3.0, 1.0), "b": (3.0, 3.0), "c": (9.0, 5.0)}
    reward = contest.compare_rewards(pairs, scores)
    assert (reward["value"], reward["deviation"], reward["n"]) == (1.0, 2.0, 3)  # mean of 2, 0 and 4, over 2


@pytest.mark.slow
def test_a_run_by_its_reward_model_and_two_judges(tmp_path):
    run = write_run(tmp_path / "run", 3, 1, 1)
    reward_model = write_reward_model(run / "reward-model")
    judges = ["--judge", str(reward_model), "--judge", str(models.folder("llama"))]
    line = [sys.executable, contest.__file__, str(run), *judges, "--by-kind", "--output", str(tmp_path / "made")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6  # heading, rule, plain, in frames, and the harmful ones of both
    plain, in_frames, *harmful = json.loads((tmp_path / "made" / "contest.json").read_text(encoding="utf-8"))
    assert (plain["prompts"], in_frames["prompts"], plain["n"]) == ("plain", "in frames", 5)
    # The judge that gave the reward prefers what has the higher reward; identical responses are no comparison.
    assert plain["wins"][str(reward_model)]["n"] == 4
    assert plain["wins"]["oracle"]["value"] == 0.75
    assert [row["prompts"] for row in harmful] == ["plain, harmful", "in frames, harmful"]
    assert harmful[0]["wins"] == plain["wins"]  # there are no others


def test_a_run_without_reinforcement_learning_is_refused(tmp_path):
    done = CliRunner().invoke(contest.main, [str(tmp_path), "--output", str(tmp_path / "made")])
    assert done.exit_code == 1 and "no evaluation after reinforcement learning" in done.output
