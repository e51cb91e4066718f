"""cai/alarms.py: each alarm by hand, and runs that set them off or do not."""

import json
from types import SimpleNamespace

import click
import pytest
import toys
from click.testing import CliRunner

from cai.base.errors import InputError
from cai.stats.texts import duplicates, grown, phrases
from cai.train import alarms, common
from cai.train.alarms import DEFAULTS, ENOUGH, MEANING, Watch, limits

QUIET = {"kl": 3.0, "entropy": 1.2, "response_length": 50.0, "eos_rate": 0.97}


def names(found) -> list[str]:
    return [alarm.name for alarm in found]


def looked(rows, given=(), **kwargs) -> list[list[str]]:
    """Names of the alarms that each row of figures sets off, as changes to quiet ones."""
    watch = Watch(limits(given), **kwargs)
    return [names(watch.look({**QUIET, **row})) for row in rows]


# --- one by one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}, {"kl": 39.9}, {"kl": 40.1}], [[], [], ["kl"]]),
        ([{"kl": 40.1}], [["kl"]]),
        ([{}, {"entropy": 0.37}, {"entropy": 0.35}], [[], [], ["entropy"]]),
        ([{}, {"response_length": 74}, {"response_length": 76}], [[], [], ["length"]]),
        ([{}, {"response_length": 34}, {"response_length": 33}], [[], [], ["length"]]),
        ([{}, {"eos_rate": 0.81}, {"eos_rate": 0.79}], [[], [], ["eos"]]),
        ([{"entropy": 0.0}, {"entropy": 0.0}], [[], []]),
    ],
)
def test_limits_by_hand(rows, expected):
    assert looked(rows) == expected


def test_a_limit_can_be_moved_and_an_alarm_switched_off():
    assert looked([{}, {"kl": 30, "response_length": 90}], ["kl=25", "length=2"]) == [[], ["kl"]]
    assert looked([{}, {"kl": 99, "eos_rate": 0.1}], ["kl=off"]) == [[], ["eos"]]
    assert set(DEFAULTS) == set(MEANING) == set(limits(()))


@pytest.mark.parametrize("given", ["speed=3", "kl", "kl=many", "kl=-1", "kl=nan", "kl=inf", "length=0.9", "eos=0"])
def test_a_limit_that_is_none_is_refused(given):
    with pytest.raises(InputError, match="--alarm"):
        limits([given])


@pytest.mark.parametrize(
    ("alarm", "stop_on", "message"),
    [
        (("kl=off",), ("kl",), "--stop-on kl would have no effect: --alarm has switched it off"),
        (tuple(f"{name}=off" for name in DEFAULTS), ("all",), "--stop-on all would have no effect"),
        ((), ("eos", "judge"), "--stop-on judge would have no effect: no judge"),
        (("judge=2",), (), "--alarm judge would have no effect: no judge"),
        (("judge=off", "kl=off"), ("eos", "all"), None),
        (("eos=0.5",), ("eos",), None),
    ],
)
def test_an_alarm_that_can_not_be_raised_is_refused(alarm, stop_on, message):
    """Else somebody believes that it would stop the run."""
    asked = SimpleNamespace(alarm=alarm, stop_on=stop_on)
    if message is None:
        watch = alarms.watch(asked, {"judge": "no judge"})
        assert watch.stop_on == stop_on and watch.limits == limits(alarm)
    else:
        with pytest.raises(click.UsageError, match=message):
            alarms.watch(asked, {"judge": "no judge"})


def test_what_a_row_does_not_have_sets_off_nothing():
    watch = Watch()
    assert [watch.look({"loss": 0.1, "alarms": ["x"]}) for _ in range(3)] == [[], [], []]


def test_few_responses_are_put_together_before_they_are_judged():
    watch, few = Watch(limits(["boilerplate=off", "duplicates=off"])), ENOUGH // 4
    texts = [f"w{i} x{i} y{i}" for i in range(few)]
    long = {**QUIET, "response_length": 90.0}
    found = [names(watch.look(long if i > 3 else QUIET, texts, texts)) for i in range(8)]
    # Four rows make the start; of the newest four, one, two, three and four are long: 60, 70, 80, 90 tokens on average.
    assert found == [[], [], [], [], [], [], ["length"], ["length"]]


def test_stops_only_at_the_alarms_named():
    watch = Watch(stop_on=("eos",))
    found = watch.look({**QUIET, "kl": 99.0})
    assert names(found) == ["kl"] and watch.stops(found) is None
    found = watch.look({**QUIET, "kl": 99.0, "eos_rate": 0.0})
    assert names(found) == ["kl", "eos"] and watch.stops(found).name == "eos"
    assert Watch(stop_on=("all",)).stops(found).name == "kl"


def test_every_alarm_says_what_was_found_and_what_to_do():
    watch = Watch(limits(["judge=1"]))
    texts = [f"one{i} two{i} three{i}" for i in range(ENOUGH)]
    for _ in range(6):
        watch.look({**QUIET, "score": 1.0, "judge": 0.9, "judge_std": 0.1}, texts, texts)
    bad = {
        "kl": 99.0,
        "entropy": 0.01,
        "response_length": 500.0,
        "eos_rate": 0.1,
        "score": 2.0,
        "judge": 0.1,
        "judge_std": 0.1,
    }
    for _ in range(5):
        found = watch.look(bad, texts, ["I value you greatly."] * ENOUGH)
    assert names(found) == list(DEFAULTS)
    lines = {alarm.name: alarm.message for alarm in found}
    for name, shown in {
        "kl": "99.0 nats",
        "entropy": "from 1.2 to 0.01",
        "length": "from 50 to 500 tokens, 10.00 times",
        "eos": "only 10%",
        "duplicates": "100% of the responses repeat",
        "boilerplate": "“i value you” 0% → 100%",
        "judge": "the judge fell from 0.9 to 0.1",
    }.items():
        assert shown in lines[name] and "limit" in lines[name] and "\n" not in lines[name]


def test_a_resumed_watch_compares_with_the_same_start():
    texts = [f"a{i} b{i} c{i}" for i in range(ENOUGH)]
    whole, first, second = Watch(), Watch(), Watch()
    rows = [QUIET, QUIET, {**QUIET, "response_length": 90.0, "entropy": 0.2}]
    answers = [texts, texts, ["the same old words"] * ENOUGH]
    expected = [names(whole.look(row, texts, said)) for row, said in zip(rows, answers, strict=True)]
    found = [names(first.look(row, texts, said)) for row, said in zip(rows[:2], answers[:2], strict=True)]
    second.restore(json.loads(json.dumps(first.state())))
    found.append(names(second.look(rows[2], texts, answers[2])))
    assert found == expected == [[], [], ["entropy", "length", "duplicates", "boilerplate"]]


# --- what is counted in texts --------------------------------------------------------------------------------


def test_duplicates_are_answers_to_other_prompts():
    assert duplicates(["p", "q", "r", "s"], ["No.", "no", "Yes, do.", "Then go"]) == 0.5
    assert duplicates(["p", "p", "q"], ["No.", "No.", "Yes."]) == 0
    assert duplicates([[{"content": "p"}], [{"content": "q"}]], ["", ""]) == 1


def test_phrases_that_grew():
    assert phrases("I value you, Anna!") == {("i", "value", "you"), ("value", "you", "anna")}
    assert phrases("I can't say") == {("i", "can't", "say")}
    assert phrases("too short") == set()
    before = ["we are here to help", "go left at once", "ask them first please", "sing it out loud"]
    now = ["I am here to help", "you are here to stay", "go left at once", "they are here to stay now"]
    # "are here to" went from one text in four to two; "here to stay" from none to two, and stands for what it overlaps.
    assert grown(before, now) == [("here to stay", 0.0, 0.5)]
    assert grown(now, now) == []


# --- Goodhart's law ------------------------------------------------------------------------------------------


def judged(scores, judges, std=0.5):
    rows = [{"score": s, "judge": j, "judge_std": std} for s, j in zip(scores, judges, strict=True)]
    return looked(rows)


def test_the_judge_falls_while_the_score_rises():
    rising = [0.1 * i for i in range(12)]
    # Five updates of 128 responses with a deviation of 0.5: the mean's error is 0.5 / sqrt(640) = 0.0198, that of a
    # difference 0.0280, and three of them are 0.084.
    # Three fallen updates of five make a fall of 0.09.
    assert judged(rising, [0.6] * 7 + [0.45] * 5) == [[]] * 9 + [["judge"]] * 3
    assert not any(judged(rising, [0.6] * 7 + [0.53] * 5))
    # Both fall, or the judge follows the score: another matter.
    assert not any(judged(rising[::-1], [0.6] * 7 + [0.3] * 5))
    assert not any(judged(rising, [0.5 + 0.01 * i for i in range(12)]))
    # Up first, then down: its best counts, not the start.
    assert judged([*rising, 1.3, 1.4, 1.5], [0.5] * 5 + [0.7] * 5 + [0.55] * 5)[-1] == ["judge"]


# --- runs ----------------------------------------------------------------------------------------------------

WORDS = (
    "red",
    "green",
    "blue",
    "tall",
    "small",
    "old",
    "new",
    "warm",
    "cold",
    "soft",
    "loud",
    "calm",
    "dark",
    "pale",
    "thin",
    "wide",
    "deep",
    "slow",
    "fast",
    "kind",
)


def begins_well(prompts, responses):
    return [float(text.split()[:1] != [] and text.split()[0] in WORDS[:10]) for text in responses]


def share_of(word):
    return lambda prompts, responses: [text.split().count(word) / (len(text.split()) + 1) for text in responses]


def length(prompts, responses):
    return [len(text.split()) / 10 for text in responses]


def count_of(word):
    return lambda prompts, responses: [text.split().count(word) for text in responses]


def variety(prompts, responses):
    return [len(set(text.split())) / (len(text.split()) + 1) for text in responses]


RUNS = {
    "healthy": (begins_well, {"kl_coef": 0.2, "learning_rate": 5e-3}, set(), set(DEFAULTS)),
    "paid for length": (length, {"kl_coef": 0.05}, {"length", "eos"}, {"duplicates"}),
    "learning rate far too high": (
        share_of("red"),
        {"kl_coef": 0.0, "learning_rate": 5e-2},
        {"kl", "entropy", "duplicates", "boilerplate"},
        set(),
    ),
    "no KL penalty": (count_of("red"), {"kl_coef": 0.0}, {"kl", "judge", "boilerplate"}, {"duplicates"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs(tmp_path, name):
    reward, settings, expected, never = RUNS[name]
    chat, make = toys.talker(WORDS)
    one = toys.trainer(
        tmp_path, chat, make, reward, prompts=toys.prompts_of(WORDS), judge=variety, updates=16, **settings
    )
    common.run_trainer(one, tmp_path)
    raised = set(one.update_log.raised)
    assert expected <= raised and not never & raised
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "update" in row]
    assert rows[-1]["score"] > rows[0]["score"]
    for alarm, update in one.update_log.raised.items():
        before = [row.get("alarms", ()) for row in rows[: update - 1]]
        assert alarm in rows[update - 1]["alarms"] and all(alarm not in names for names in before)


def test_the_options():
    @click.command()
    @alarms.options
    def command(alarm, stop_on):
        click.echo(json.dumps([limits(alarm)["kl"], stop_on]))

    done = CliRunner().invoke(command, ["--alarm", "kl=12.5", "--stop-on", "kl", "--stop-on", "all"])
    assert json.loads(done.stdout) == [12.5, ["kl", "all"]]
    assert CliRunner().invoke(command, ["--stop-on", "speed"]).exit_code == 2
    assert all(name in CliRunner().invoke(command, ["--help"]).stdout for name in DEFAULTS)
