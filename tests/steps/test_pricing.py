"""The price of a whole run: by hand, without a model, and against the tokens of a run that was made."""

import json
import shlex
from math import comb

import pytest

from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.evaluate.classes import ORDERS
from cai.models import hardware
from cai.steps.lengths import Requests, read_run
from cai.steps.pricing import HELDOUT, LIKE, PACE, SCALING

EIGHT = ["--model", "size:8b", "--prompts", 1000, "--rounds", 1]


@pytest.fixture
def price(invoke, tmp_path):
    """What `run.py --dry-run --json` prints, with the steps by name."""

    def call(*arguments):
        result = invoke("run", "--output", tmp_path / "out", *arguments, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        priced = json.loads(result.stdout)
        return priced | {"steps": {step["name"]: step for step in priced["steps"]}}

    return call


def test_calls_and_tokens_by_hand(price):
    """Prompts of 100 tokens, of which 4 are the chat's; answers of half of 512."""
    steps = price(*EIGHT)["steps"]
    requests = Requests("size:8b", load_constitution("harmlessness"), "draw")
    assert requests.chat == 4
    critique, revision = (
        requests.of_round("critique", "critique", None),
        requests.of_round("revise", "revision", None),
    )
    choice = requests.of_comparison("preference", None)
    read = {
        "evaluate-base": HELDOUT * (100 + ORDERS * (requests.of_class() + 96 + 256)),
        "responses": 1000 * 100,
        "critique-1": 1000 * (critique + 96 + 256),
        "revision-1": 1000 * (revision + 96 + 256 + 256),
        "sft": 2 * 1000 * (100 + 256),
        "samples": 2000 * 100,
        "preferences": 2 * 3000 * (choice + 96 + 2 * 256),  # three pairs of three responses, in two orders
        "reward-model": 0.9 * 3000 * 2 * (100 + 256),
        "ppo": 12_800 * 100,
    }
    assert {name: steps[name]["tokens_read"] for name in read} == pytest.approx(read, abs=1)
    written = {name: step["tokens_written"] / 256 for name, step in steps.items()}
    assert written == {
        **{f"evaluate-{stage}": HELDOUT for stage in ("base", "sft", "ppo")},
        **{name: 1000 for name in ("responses", "critique-1", "revision-1")},
        **{"sft": 0, "samples": 2000, "preferences": 0, "reward-model": 0, "ppo": 12_800},
    }
    assert steps["evaluate-base"]["calls"] == (1 + ORDERS) * HELDOUT and steps["preferences"][
        "calls"
    ] == 2 * 1000 * comb(3, 2)


def test_more_pairs_are_counted(price, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", [{"prompt": f"p {n}", "chosen": "Yes.", "rejected": "No."} for n in range(50)])
    for rl, step, more in (("ppo", "reward-model", 45), ("dpo", "dpo", 50)):  # a tenth of the former's are held out
        calls = [
            price(*EIGHT, "--rl", rl, *mix)["steps"][step]["calls"]
            for mix in ((), ("--mix", tmp_path / "more.jsonl"), ("--mix", f"{tmp_path / 'more.jsonl'}=3"))
        ]
        assert (calls[1] - calls[0], calls[2] - calls[0]) == (more, 3 * more)


def test_answers_in_frames_are_counted(price):
    plain, in_frames = (price(*EIGHT, *more)["steps"]["evaluate-base"] for more in ([], ["--frames", "frames"]))
    per_prompt = plain["calls"] / HELDOUT
    assert in_frames["calls"] == per_prompt * (HELDOUT + 42 * 3 * 20), "42 frames with 20 prompts of each kind"


def test_hours_and_money_by_hand(price):
    options = ["--gpu", "a100-80", "--gpus", 2, "--gpu-hour", 2.5]
    priced = price(*EIGHT, *options)
    # SFT with adapters: 6 operations per parameter and token, at 35 % of 312 TFLOP/s.
    parameters = hardware.shape_of("size:8b").parameters
    hours = 6 * parameters * 2 * 1000 * 356 / (0.35 * 312e12) / 3600 / (2 * SCALING)
    sft = priced["steps"]["sft"]
    assert sft["hours"]["value"] == pytest.approx(hours, rel=0.01)
    assert sft["cost"]["value"] == pytest.approx(2 * 2.5 * hours, rel=0.01)
    # At worst prompts of 200 tokens and answers of 512, at half the speed.
    assert sft["hours"]["high"] == pytest.approx(PACE[2] * hours * 712 / 356, rel=0.01)
    for name in ("hours", "cost"):
        total = priced["total"][name]
        parts = [step[name]["value"] for step in priced["steps"].values()]
        assert total["low"] < total["value"] < total["high"] and total["value"] == pytest.approx(sum(parts), rel=0.01)
    assert price(*EIGHT, *options, "--seeds", 2)["total"]["cost"]["value"] == pytest.approx(
        2 * priced["total"]["cost"]["value"], rel=0.01
    )


def test_a_server_is_paid_by_the_token_and_training_by_the_hour(price):
    alone = price(*EIGHT, "--price", 0.1, 0.4)
    critique = alone["steps"]["critique-1"]
    money = (0.1 * critique["tokens_read"] + 0.4 * critique["tokens_written"]) / 1e6
    assert critique["cost"]["value"] == pytest.approx(money, rel=0.01) and critique["hours"] is None
    assert alone["steps"]["ppo"]["cost"] is None
    assert "leaves out sft, reward-model, ppo" in alone["warnings"][0]
    both = price(*EIGHT, "--price", 0.1, 0.4, "--gpu", "h100", "--gpu-hour", 3)
    assert both["steps"]["critique-1"] == critique and both["steps"]["ppo"]["cost"]["value"] > 0
    assert both["warnings"] == []


def test_what_does_not_fit_is_named(price):
    priced = price("--model", "size:70b", *EIGHT[2:], "--gpu", "h100", "--rl", "none")
    assert any("sft needs" in warning and "more than one h100" in warning for warning in priced["warnings"])
    assert priced["total"]["cost"] is None
    assert price(*EIGHT, "--gpu", "a100-80")["warnings"] == []


@pytest.mark.parametrize("size", hardware.SIZES)
def test_every_size_has_a_price(price, size):
    priced = price("--model", f"size:{size}", "--prompts", 10, "--limit", 5, "--heldout-limit", 7, "--gpu", "b200")
    assert priced["steps"]["responses"]["calls"] == 5 and priced["steps"]["evaluate-base"]["calls"] == (1 + ORDERS) * 7
    assert priced["total"]["hours"]["value"] > 0


def test_the_whole_pipeline_in_one_command_without_a_model(invoke, tmp_path):
    options = ["--prompts", 40_000, "--rounds", 4, "--rl", "ppo", "--gpu", "a100-80", "--gpus", 2, "--gpu-hour", 2.2]
    result = invoke("run", "--model", "size:8b", *options, "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    table, totals, assumptions = result.stdout.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == [
        *("evaluate-base", "responses"),
        *(f"{step}-{number}" for number in range(1, 5) for step in ("critique", "revision")),
        *("sft", "evaluate-sft", "samples", "preferences", "reward-model", "ppo", "evaluate-ppo", "total"),
    ]
    assert [line.split()[0] for line in totals.splitlines()] == ["tokens", "hours", "cost"]
    assert all(" to " in line for line in totals.splitlines())
    assert "40,000 prompts of 100 tokens each" in assumptions and "Llama 3.1 8B" in assumptions
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("principles", ["match", "all"])
def test_the_choice_of_principles_changes_what_is_read(price, principles):
    drawn, other = price(*EIGHT)["steps"], price(*EIGHT, "--principles", principles)["steps"]
    assert other["critique-1"]["tokens_read"] > drawn["critique-1"]["tokens_read"]
    asked = 2 * 1000 * len(load_constitution("harmlessness").principles) if principles == "match" else 0
    assert other["critique-1"]["calls"] == 1000 + asked


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "tiny", "--gpu", "h100"], "--gpu would have no effect: without --dry-run"),
        (["--model", "tiny", "--price", 1, 2], "--price would have no effect"),
        (["--model", "size:8b"], "size:8b is a size and no model"),
        (["--model", "tiny", "--gpus", 2, "--dry-run"], "--gpus would have no effect: without --gpu"),
        (["--model", "tiny", "--gpu-hour", 2, "--dry-run"], "--gpu-hour would have no effect: without --gpu"),
        (["--model", "tiny", "--input", "x", "--prompts", 2, "--dry-run"], "--prompts would have no effect"),
        (["--model", "size:9b", "--prompts", 2, "--dry-run"], "no size '9b'; expected size: and one of 1b, 3b, 8b"),
        (["--model", "size:8b", "--dry-run"], "no --input"),
        (["--model", "no/one", "--prompts", 2, "--gpu", "l4", "--dry-run"], "sizes are not on this machine"),
        (
            ["--model", "size:8b", "--prompts", 2, "--like", "nowhere", "--dry-run"],
            "nowhere: no finished run with a manifest",
        ),
    ],
)
def test_an_option_without_effect_is_refused(invoke, tmp_path, arguments, expected):
    result = invoke("run", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and expected in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["generate", "critique", "revise", "judge", "sft", "reward_model", "dpo", "ppo", "grpo"]
)
def test_each_step_refuses_the_options_of_an_estimate_without_one(invoke, tmp_path, name):
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"prompt": "p"}])
    more = {"judge": [], "ppo": ["--reward-model", "tiny"], "grpo": ["--reward-model", "tiny"]}.get(name, [])
    result = invoke(name, "--input", rows, "--model", "tiny", "--output", tmp_path / "out", *more, "--gpu", "l4")
    assert result.exit_code == 2 and "--gpu would have no effect: without --dry-run" in result.stderr


def test_a_judge_that_writes_nothing_takes_no_length(invoke, tmp_path):
    arguments = ["--input", "x.jsonl", "--model", "tiny", "--output", tmp_path / "out", "--like", "y", "--dry-run"]
    result = invoke("judge", *arguments)
    assert result.exit_code == 2 and "--like would have no effect: without --cot" in result.stderr


def manifest(folder, name, prompt, new, **counts):
    tokens = {"rows": 10, "prompt": 10 * prompt, "new": 10 * new}
    path = folder / f"{name}.jsonl"
    write_jsonl(path, [])
    written = {"fingerprint": {}, "status": "done", "tokens": tokens, "counts": counts}
    (folder / f"{name}.jsonl.run.json").write_text(json.dumps(written))


def test_lengths_of_a_small_run(price, tmp_path):
    for name, prompt, new in [("01-responses", 20, 30), ("02-critique-1", 120, 10), ("03-revision-1", 150, 40)]:
        manifest(tmp_path, name, prompt, new)
    manifest(tmp_path, "07-preferences", 0, 0, pairs=30, identical=10)
    lengths = read_run(str(tmp_path), rounds=3)
    assert (lengths.prompt, lengths.distinct) == (20, 0.75)
    # Rounds that it lacks are like its last one, and samples like its responses.
    assert lengths.written("revision-3", 512) == 40 and lengths.prompts["critique-3"] == 120
    assert lengths.written("samples", 512) == 30 and lengths.written("samples", 25) == 25
    priced = price(*EIGHT[:4], "--rounds", 3, "--like", tmp_path)
    steps = priced["steps"]
    assert (steps["critique-3"]["tokens_read"], steps["critique-3"]["tokens_written"]) == (120_000, 10_000)
    assert steps["preferences"]["calls"] == 2 * 0.75 * 3000
    total = priced["total"]["tokens"]
    assert total["low"] == pytest.approx(LIKE[0] * total["value"], rel=0.05)


@pytest.mark.slow
def test_tokens_are_those_of_the_run_within_a_tenth(invoke, price, tmp_path):
    """The price by a smaller run with another seed, against what the steps counted: their manifests and metrics, and
    for those that count no tokens, their own --dry-run over the rows that they got. All tokens within a tenth; those of
    one step, which differ more between policies trained on 24 and on 40 rows, within 15 %."""
    base = ["--model", "tiny", "--device", "cpu", "--heldout-limit", 3]
    assert invoke("run", *base, "--limit", 24, "--seed", 1, "--output", tmp_path / "small").exit_code == 0
    steps = price(*base, "--limit", 40, "--like", tmp_path / "small")["steps"]
    assert invoke("run", *base, "--limit", 40, "--output", tmp_path / "out").exit_code == 0
    counted = {}
    for name, step in steps.items():
        tokens = (read_manifest(step["output"]) or {}).get("tokens")
        if tokens:
            counted[name] = (tokens["prompt"], tokens["new"])
        elif name in ("sft", "reward-model", "preferences"):
            _, script, *arguments = shlex.split(step["command"])
            arguments[arguments.index("--output") + 1] = str(tmp_path / f"again-{name}")
            plan = json.loads(
                invoke(script.split("/")[-1].removesuffix(".py"), *arguments, "--dry-run", "--json").stdout
            )
            counted[name] = (plan.get("prompt_tokens_about", plan.get("tokens_about")), 0)
    [update] = [row for _, row in read_jsonl(tmp_path / "out/ppo/metrics.jsonl") if "response_length" in row]
    counted["ppo"] = (counted["responses"][0] / 40 * update["episodes"], update["episodes"] * update["response_length"])
    assert {name for name in steps if not name.startswith("evaluate")} == counted.keys()
    priced = {name: (steps[name]["tokens_read"], steps[name]["tokens_written"]) for name in counted}
    print("\n", priced, "\n", counted)
    for name, figures in counted.items():
        assert sum(priced[name]) == pytest.approx(sum(figures), rel=0.15), name
    for side in (0, 1):
        priced_sum, counted_sum = (sum(figures[side] for figures in part.values()) for part in (priced, counted))
        assert priced_sum == pytest.approx(counted_sum, rel=0.1)
