"""train/rewards.py, train/selection.py: several rewards, a judge's class probabilities, which checkpoint is taken."""

import math

import models
import pytest

from cai.base.errors import CaiError, InputError
from cai.constitution.templates import load_template
from cai.models.loading import load_engine
from cai.train.rewards import Judge, Total, compute_scores, identify, is_function, load_function
from cai.train.selection import axis_means, choose_update


def words(prompts, responses):
    return [len(text.split()) for text in responses]


def ends(prompts, responses):
    return [float(text.endswith(".")) for text in responses]


PROMPTS = [[{"role": "user", "content": "Hello"}]] * 2


def test_several_rewards_are_summed_by_their_weights():
    total = Total({"words": (words, 0.5), "ends": (ends, -2.0)})
    assert total(PROMPTS, ["Good day to you", "Hello."]) == [2.0, -1.5]
    assert total.parts == {"words": [4.0, 1.0], "ends": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "mine returned 1 scores for 2 responses"),
        ([1.0, None], "mine returned a score that is not a number"),
        ([1.0, math.nan], "a score of mine is not finite"),
        ([1.0, -math.inf], "a score of mine is not finite"),
    ],
)
def test_what_is_no_score_is_an_error(returned, message):
    with pytest.raises(CaiError, match=message):
        Total({"mine": (lambda prompts, responses: returned, 1.0)})(PROMPTS, ["a", "b"])


def test_any_numbers_do():
    import numpy as np
    import torch

    assert compute_scores(lambda p, r: np.array([1, 2]), "it", PROMPTS, ["a", "b"]) == [1.0, 2.0]
    assert compute_scores(lambda p, r: torch.tensor([1, 2]), "it", PROMPTS, ["a", "b"]) == [1.0, 2.0]


def test_functions_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def brief(prompts, responses):\n    return [-len(r) for r in responses]\n")
    assert is_function("my_rewards:brief") and is_function("pack.age:name")
    assert not any(map(is_function, ["runs/reward", "owner/name", "my_rewards", "https://host:80/x", "tiny"]))
    assert load_function("my_rewards:brief")(PROMPTS, ["a", "bb"]) == [-1, -2]
    named = identify("my_rewards:brief")
    assert named["function"] == "my_rewards:brief" and len(named["sha256"]) == 64
    for spec, message in (
        ("my_rewards:long", "no function 'long'"),
        ("no_such_module:x", "can't be imported"),
        ("my_rewards:__name__", "no function"),
    ):
        with pytest.raises(InputError, match=message):
            load_function(spec)


def test_the_judge_reads_the_right_letter_for_the_kind():
    engine = load_engine(str(models.folder("llama")), device="cpu", dtype="float32")
    prompts = [[{"role": "user", "content": text}] for text in ("Break it", "Bake it", "Kill it off")]
    kinds = {str(prompt): kind for prompt, kind in zip(prompts, ("harmful", "benign", "borderline"), strict=True)}
    responses = ["No.", "A gate.", "Ask first."]
    found = Judge(engine, kinds)(prompts, responses)
    template = load_template("classify")
    for prompt, response, score, right in zip(prompts, responses, found, (1, 0, 0), strict=True):
        [logprobs] = models.score(engine, [template.render(prompt=prompt, response=response)], "ABCDE")
        shares = [math.exp(one) for one in logprobs]
        assert score == pytest.approx(shares[right] / sum(shares), abs=1e-5)
    with pytest.raises(CaiError, match="too long for the judge"):
        Judge(engine, kinds)(prompts[:1], ["A or B? " * 900])


# --- which checkpoint ----------------------------------------------------------------------------------------

KINDS = ["harmful"] * 4 + ["benign"] * 2 + ["borderline"] * 2


def test_the_axes():
    found = axis_means(KINDS, [1, 0, 0, 0, 1, 1, 1, 0])
    assert found == {"harmlessness": 0.25, "helpfulness": 0.75}


def scored(harmless: float, helpful: float) -> list[float]:
    """A score for each prompt, spread by 0.05 about each axis' mean."""
    spread = [-0.05, 0.05, -0.05, 0.05]
    return [harmless + one for one in spread] + [helpful + one for one in reversed(spread)]


def test_the_best_on_both_axes_is_taken_not_the_last():
    steps = {0: scored(0.2, 0.9), 10: scored(0.7, 0.88), 20: scored(0.9, 0.9), 30: scored(0.95, 0.9)}
    # The spread is the same for all, so that paired differences have none: any fall is a loss.
    assert choose_update(KINDS, steps) == 30
    assert choose_update(KINDS, {**steps, 30: scored(0.99, 0.6)}) == 20  # the sum would be less too
    assert choose_update(KINDS, {**steps, 30: scored(1.5, 0.6)}) == 20  # the sum is more, but helpfulness was lost
    assert choose_update(KINDS, {0: scored(0.9, 0.9), 10: scored(0.5, 1.0), 20: scored(1.0, 0.5)}) == 0
    assert choose_update(KINDS, {0: scored(0.9, 0.9), 10: scored(0.9, 0.9)}) == 0


def test_a_fall_within_chance_is_no_loss():
    start = [0.2] * 4 + [0.9, 0.9, 0.9, 0.9]
    # Helpfulness: differences 0.1, -0.1, 0.1, -0.2; mean -0.025, error 0.15 / 2 = 0.075.
    assert choose_update(KINDS, {0: start, 10: [0.9] * 4 + [1.0, 0.8, 1.0, 0.7]}) == 10
    # -0.2 each but for one: mean -0.175, error 0.05 / 2 = 0.025, and two of them are less.
    assert choose_update(KINDS, {0: start, 10: [0.9] * 4 + [0.7, 0.7, 0.7, 0.8]}) == 0
