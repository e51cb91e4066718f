"""constitution.py infer: the hidden principle of made pairs is found among others, and proposals are read strictly."""

import json
import random
import re

import pytest
import yaml
from canned_server import CannedServer

from cai.authoring.asking import Refused
from cai.authoring.inference import PLACEBO, Candidate, find_gold, group_sentences, rank, read_sentence, split
from cai.constitution.files import Principle, load_constitution, phrase
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.world import language, oracle

STYLES = {"harmful": ("comply", "partial", "good", "evasive", "preachy"), "benign": ("comply", "good", "evasive")}
REQUESTS = {
    "critique": "Find any help that the response gives with {}.",
    "revision": "Rewrite the response so that it gives no help with {}.",
    "preference": "Which response gives less help with {}?",
}


@pytest.fixture
def infer(invoke, tmp_path):
    """`infer(pairs, ..., code=0)`: the summary of the command, which writes inferred.yaml."""

    def call(pairs, *arguments, code=0):
        model = () if "--model" in arguments else ("--model", "tiny")
        options = ["--input", pairs, "--output", tmp_path / "inferred.yaml", "--json", *model, *arguments]
        result = invoke("constitution", "infer", *options)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if result.stdout else result.stderr

    return call


def scores_of(tmp_path) -> list[dict]:
    return [row for _, row in read_jsonl(tmp_path / "inferred.scores.jsonl")]


# --- the hidden principle of the world ----------------------------------------------------------------------


def hidden_pairs(hidden: str, seed: int, count: int) -> list[dict]:
    """Pairs of which the better one follows the principle "no help with <hidden>", and helps with all else.

    Neither length nor position gives it away: the better response is the longer one, and response_a, in half of them.
    """
    rng, rows, longer = random.Random(f"hidden/{hidden}/{seed}"), [], 0
    while len(rows) < count:
        kind = rng.choice(["harmful"] * 4 + ["benign"])
        row = language.prompt_row(rng, kind, "heldout", len(rows))
        responses = [language.respond(rng, oracle.act_of(row), style) for style in rng.sample(STYLES[kind], 2)]
        worse, better = sorted(responses, key=lambda response: oracle.tier(row, response, (hidden,)))
        is_longer = len(better) > len(worse)
        tiers = {oracle.tier(row, response, (hidden,)) for response in responses}
        if len(tiers) == 1 or is_longer == (longer > 0):
            continue
        longer += 1 if is_longer else -1
        gold = "ab"[len(rows) % 2]
        sides = {"a": better, "b": worse} if gold == "a" else {"a": worse, "b": better}
        rows.append({**row, "response_a": sides["a"], "response_b": sides["b"], "gold": gold})
    return rows


def write_candidates(path) -> None:
    """A principle for each harm of the world, each in words that `tiny` knows."""
    principles = [
        {"id": name, **{request: text.format(language.SPOKEN[name]) for request, text in REQUESTS.items()}}
        for name in language.HARM_NAMES
    ]
    path.write_text(yaml.safe_dump({"principles": principles}))


def rank_of(hidden: str, rows: list[dict]) -> int:
    """1 for the first candidate."""
    return [row["id"] for row in rows if not row["id"].startswith("baseline ")].index(hidden) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_hidden_principle_is_among_the_first_three_in_nine_of_ten_seeds(infer, tmp_path):
    write_candidates(tmp_path / "candidates.yaml")
    ranks, margins = {}, []
    for seed, hidden in enumerate(language.HARM_NAMES):
        write_jsonl(tmp_path / "pairs.jsonl", hidden_pairs(hidden, seed, 28))
        arguments = ("--candidates", tmp_path / "candidates.yaml", "--propose", "0", "--overwrite")
        infer(tmp_path / "pairs.jsonl", *arguments)
        rows = scores_of(tmp_path)
        ranks[hidden] = rank_of(hidden, rows)
        margins.append(next(row["margin"] for row in rows if row["id"] == hidden))
        baselines = {row["id"]: row["value"] for row in rows[:5]}
        assert all(0.4 <= value <= 0.6 for name, value in baselines.items() if name != "baseline placebo")
    print(f"\nrank of the hidden principle among {len(ranks)}: {ranks}")
    assert sum(rank <= 3 for rank in ranks.values()) >= 9
    assert sum(margin > 0 for margin in margins) >= 9


@pytest.mark.slow
def test_pairs_of_chance_have_no_principle(infer, tmp_path):
    """Nothing predicts preferences that a coin decided: no constitution is written, and the exit code is 3."""
    rng = random.Random(0)
    pairs = [{**row, "gold": rng.choice("ab")} for row in hidden_pairs("theft", 1, 16)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_candidates(tmp_path / "candidates.yaml")
    arguments = ("--candidates", tmp_path / "candidates.yaml", "--propose", "0")
    summary = infer(tmp_path / "pairs.jsonl", *arguments, code=3)
    assert (summary["principles"], summary["beat_baselines"], summary["heldout"]) == (0, 0, 16)
    assert not (tmp_path / "inferred.yaml").exists() and len(scores_of(tmp_path)) == 15
    assert infer(tmp_path / "pairs.jsonl", *arguments, code=3) == summary  # complete: the same again


# --- free text ----------------------------------------------------------------------------------------------

SOURCED, LECTURE = "Name the source of each claim", "Never lecture the reader"
PROPOSALS = [SOURCED, "Always name the source of every claim", "Be the best answer. Also be kind", LECTURE, SOURCED]


def sourced_pairs(count: int) -> list[dict]:
    rows = []
    for number in range(count):
        sides = [f"It is so, by report {number}. source", f"It is so {'and so ' * (number // 2 % 2 * 9)}{number}"]
        gold = "ab"[number % 2]
        a, b = sides if gold == "a" else sides[::-1]
        rows.append({"prompt": f"Is it so, number {number}?", "response_a": a, "response_b": b, "gold": gold})
    return rows


def explaining(body) -> dict:
    """Proposes one of PROPOSALS by the prompt's number; as a judge it prefers a source if asked about one, else A."""
    question = body["messages"][-1]["content"]
    if "State the principle" in question:
        number = int(re.search(r"number (\d+)", question)[1])
        text = f"Principle: {PROPOSALS[number % len(PROPOSALS)]}."
    elif "source" in question.partition("\n")[0]:
        text = "A" if "source" in question.partition("<response_a>")[2].partition("</response_a>")[0] else "B"
    else:
        text = "A"
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}


def test_proposed_sentences_are_grouped_scored_and_written(infer, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", sourced_pairs(40))
    with CannedServer(explaining) as server:
        arguments = ("--model", "openai:writer", "--endpoint", server.address, "--propose", "10", "--tries", "1")
        summary = infer(tmp_path / "pairs.jsonl", *arguments)
        asked = len(server.requests)
        assert infer(tmp_path / "pairs.jsonl", *arguments) == summary
        assert len(server.requests) == asked
    rows = scores_of(tmp_path)
    sentences = {row["sentence"] for _, row in read_jsonl(tmp_path / "inferred.proposals.jsonl")}
    assert "Be the best answer. Also be kind." not in sentences and None in sentences
    best = rows[5]
    assert (best["value"], best["beats_baselines"]) == (1, True) and "source of" in best["preference"]
    assert {row["value"] for row in rows[6:]} == {0.5}  # the judge says A whatever the order: a tie, half a success
    constitution = load_constitution(str(tmp_path / "inferred.yaml"))
    assert [p.principle for p in constitution.principles] == [best["sentences"][0]]
    assert summary["proposals"] == 10 and summary["refused_proposals"] + sum(r["proposed"] for r in rows[5:]) == 10
    assert summary["train"] + summary["heldout"] == 40


@pytest.mark.slow
def test_tiny_can_not_name_a_principle_and_all_is_counted(infer, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", sourced_pairs(12))
    summary = infer(tmp_path / "pairs.jsonl", "--propose", "2", "--max-new-tokens", "8", code=3)
    assert (summary["proposals"], summary["refused_proposals"], summary["clusters"]) == (2, 2, 0)
    assert [row["id"] for row in scores_of(tmp_path)] == [
        f"baseline {name}" for name in ("longer", "shorter", "always_a", "always_b", "placebo")
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Be kind to readers",
        "Principle:",
        "Principle: Name the source\nPrinciple: Be brief",
        "Principle: Lectures the reader",
        f"Principle: Name {'the source ' * 40}",
        "Principle: Do not fail to never avoid it",
        "Reason: Name the source",
    ],
)
def test_any_other_form_than_a_sentence_is_refused(answer):
    with pytest.raises(Refused):
        read_sentence("pair", answer)


def test_a_sentence_is_read_without_its_marks():
    assert read_sentence("pair", " **Principle:** Never lecture  the reader.\n") == "Never lecture the reader."


def test_a_demand_and_a_prohibition_of_the_same_words_are_apart():
    groups = group_sentences(["Lecture the reader at length", LECTURE, "Do not lecture readers", "Lecture each reader"])
    assert sorted(map(sorted, groups)) == [
        ["Do not lecture readers", LECTURE],
        ["Lecture each reader", "Lecture the reader at length"],
    ]


# --- pairs and ranks ----------------------------------------------------------------------------------------


def test_which_response_was_preferred():
    sides = {"response_a": "x", "response_b": "y"}
    assert find_gold({**sides, "gold": "b"}) == "b"
    assert find_gold({**sides, "gold": "b", "chosen": "x", "rejected": "y"}) == "a"  # judge.py's choice, not its gold
    assert find_gold({**sides, "gold": "b", "chosen": None, "rejected": None}) is None
    assert find_gold(sides) is None


def test_undecided_and_identical_pairs_are_counted(infer, tmp_path):
    rows = sourced_pairs(6)
    rows[0] |= {"chosen": None, "rejected": None}
    rows[1]["response_b"] = rows[1]["response_a"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    write_candidates(tmp_path / "candidates.yaml")
    arguments = ("--candidates", tmp_path / "candidates.yaml", "--propose", "0", "--dry-run")
    summary = infer(tmp_path / "pairs.jsonl", *arguments)
    assert (summary["undecided"], summary["identical"], summary["heldout"]) == (1, 1, 4)
    assert summary["model_calls_at_most"] == 2 * 11 * 4  # ten candidates and the placebo, in both orders


def test_what_can_not_be_inferred_from_is_bad_input(infer, tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [{"prompt": "P?", "response": "R."}])
    assert "rows that are not pairs" in infer(tmp_path / "responses.jsonl", code=2)
    write_jsonl(tmp_path / "pairs.jsonl", sourced_pairs(6))
    assert "no candidates" in infer(tmp_path / "pairs.jsonl", "--propose", "0", code=2)
    assert "0 pairs to propose from" in infer(tmp_path / "pairs.jsonl", "--heldout-share", "1", code=2)
    assert not list(tmp_path.glob("inferred*"))


def test_all_pairs_of_a_prompt_are_on_one_side():
    pairs = [{"id": f"{n}", "key": f"prompt {n % 10}"} for n in range(40)]
    train, heldout = split(pairs, 0.5, seed=0)
    assert not {pair["key"] for pair in train} & {pair["key"] for pair in heldout}
    assert train and heldout and len(train) + len(heldout) == 40
    assert split(pairs, 1, seed=0) == ([], pairs)


def test_a_candidate_counts_by_its_lower_bound_above_the_best_baseline():
    pairs = [
        {"id": f"{n}", "key": f"{n}", "response_a": "aaa", "response_b": "b", "gold": "a" if n < 12 else "b"}
        for n in range(20)
    ]
    right = {pair["id"]: 0.9 if pair["gold"] == "a" else 0.2 for pair in pairs}
    judged = {id_: {"good": p, "blind": 0.5, PLACEBO.id: 0.5} for id_, p in right.items()}
    candidates = [Candidate(Principle(id_, **phrase(f"Be {id_}"))) for id_ in ("blind", "good")]
    rows = rank(pairs, judged, candidates)
    values = {row["id"]: row["value"] for row in rows}
    assert values == {
        "baseline longer": 0.6,
        "baseline shorter": 0.4,
        "baseline always_a": 0.6,
        "baseline always_b": 0.4,
        "baseline placebo": 0.5,
        "good": 1,
        "blind": 0.5,
    }
    good = rows[5]
    # Wilson's lower bound of 20 out of 20: n / (n + z²)
    assert good["low"] == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)
    assert good["margin"] == pytest.approx(good["low"] - 0.6) and good["beats_baselines"]
    assert not rows[6]["beats_baselines"]


def test_a_pair_that_was_not_judged_is_in_no_figure():
    pairs = [{"id": "1", "key": "1", "response_a": "aa", "response_b": "b", "gold": "a"}]
    rows = rank(pairs, {}, [Candidate(Principle("x", **phrase("Be kind")))])
    assert {row["value"] for row in rows} == {None} and not any(row.get("beats_baselines") for row in rows)
