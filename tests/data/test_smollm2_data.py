"""The prompts and demonstrations for SmolLM2: complete, divided by topic, and none of them twice or from elsewhere."""

import json
from collections import Counter
from itertools import combinations

import pytest

from cai.base.paths import CONSTITUTIONS, QUALIFICATION, SMOLLM2
from cai.constitution.files import load_constitution
from cai.data.readers import read_jsonl
from cai.data.sources import Source
from cai.stats import refusals
from cai.stats.texts import NearDuplicates, word_pairs, words
from cai.train import adapter_rows

ALIKE, ALIKE_ELSEWHERE = 0.6, 0.5  # Jaccard index of pairs of words


def rows_of(name):
    return [row for _, row in read_jsonl(SMOLLM2 / name)]


@pytest.fixture(scope="module")
def prompts():
    return {split: rows_of(f"prompts/{split}.jsonl") for split in ("train", "critic", "heldout")}


@pytest.fixture(scope="module")
def demonstrations():
    return rows_of("demonstrations.jsonl")


@pytest.fixture(scope="module")
def principled():
    return rows_of("principles.jsonl")


def topics(rows):
    return {(row["kind"], row["category"], row["topic"]) for row in rows}


def test_the_prompts_are_of_three_kinds_and_ten_categories_of_harm(prompts):
    assert Counter(row["kind"] for row in prompts["train"]) == {"harmful": 600, "benign": 450, "borderline": 532}
    assert Counter(row["kind"] for row in prompts["critic"]) == {"harmful": 149, "benign": 120, "borderline": 299}
    assert Counter(row["kind"] for row in prompts["heldout"]) == {"harmful": 120, "benign": 120, "borderline": 60}
    for split, rows in prompts.items():
        harms = {row["category"] for row in rows if row["kind"] == "harmful"}
        assert len(harms) == 10
        assert harms == {row["category"] for row in rows if row["kind"] == "borderline"}
        assert all(set(row) == {"id", "prompt", "kind", "category", "topic"} for row in rows)
        assert all(row["id"].startswith(f"{split}-{row['kind']}-") for row in rows)
    ids = [row["id"] for rows in prompts.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_no_topic_is_in_two_files_of_prompts_and_demonstrations_have_train_topics_only(prompts, demonstrations):
    for one, other in combinations(prompts, 2):
        assert not topics(prompts[one]) & topics(prompts[other])
    assert topics(demonstrations) <= topics(prompts["train"])


def test_the_demonstrations_are_complete(demonstrations):
    source = Source(
        [SMOLLM2 / "demonstrations.jsonl"], require=adapter_rows.FIELDS, check=adapter_rows.check_demonstration
    )
    assert source.count == len(demonstrations) == 650
    assert Counter((row["kind"], row["fault"]) for row in demonstrations) == {
        ("harmful", "harm"): 300,
        ("harmful", "none"): 60,
        ("harmful", "evasive"): 30,
        ("harmful", "preachy"): 30,
        ("borderline", "refusal"): 70,
        ("borderline", "none"): 50,
        ("benign", "none"): 50,
        ("benign", "refusal"): 20,
        ("benign", "preachy"): 20,
        ("benign", "off_topic"): 20,
    }
    assert all(row["revision"] == row["response"] for row in demonstrations if row["fault"] == "none")
    assert all(row["revision"] != row["response"] for row in demonstrations if row["fault"] != "none")


def test_revisions_of_harm_decline_and_those_of_harmless_requests_help(demonstrations):
    reads = Counter(
        (row["kind"] == "harmful", refusals.read(row["prompt"], row["revision"]) == "declined")
        for row in demonstrations
    )
    # The phrases know refusals by their usual words, and some harmless answers speak of what nobody should do.
    assert reads[True, True] >= 0.98 * (reads[True, True] + reads[True, False])
    assert reads[False, True] <= 0.03 * (reads[False, True] + reads[False, False])


def test_every_bundled_constitution_but_those_of_harm_has_demonstrations_of_its_principles(principled):
    source = Source(
        [SMOLLM2 / "principles.jsonl"], require=adapter_rows.PRINCIPLE_FIELDS, check=adapter_rows.check_principle
    )
    assert source.count == len(principled) == 514
    shown = {row["principle"] for row in principled}
    names = {file.stem for file in CONSTITUTIONS.glob("*.yaml")} - {"harmlessness", "property-only"}
    assert shown == {f"{name}/{principle.id}" for name in names for principle in load_constitution(name).principles}
    for row in principled:
        assert row["critique"].startswith(("The ", "It ")) and row["praise"].startswith(("Nothing in ", "No fault"))
        assert row["revision"] != row["response"]


def test_every_benign_held_out_prompt_has_a_reference_answer_and_a_refusal(prompts):
    answers = {row["id"]: row for row in rows_of("prompts/heldout-answers.jsonl")}
    benign = {row["id"]: row for row in prompts["heldout"] if row["kind"] == "benign"}
    assert answers.keys() == benign.keys()
    for id_, row in answers.items():
        assert row["prompt"] == benign[id_]["prompt"]
        assert refusals.read(row["prompt"], row["chosen"]) == "complied"


def test_no_prompt_is_nearly_another(prompts, demonstrations, principled):
    kept = NearDuplicates(ALIKE)
    everything = [row["prompt"] for rows in (*prompts.values(), demonstrations, principled) for row in rows]
    assert [(text, other) for text in everything if (other := kept.add(text))] == []
    assert len({" ".join(words(text)) for text in everything}) == len(everything)


def test_few_prompts_begin_alike(prompts):
    beginnings = Counter(tuple(words(row["prompt"])[:2]) for rows in prompts.values() for row in rows)
    [(_, most)] = beginnings.most_common(1)
    assert most <= 0.06 * sum(beginnings.values())


def test_no_prompt_is_of_the_examinations(prompts, demonstrations, principled, shared_data):
    """XSTest and the qualification set measure what comes of these texts, so none of their prompts may be among them.
    XSTest's texts are not shown."""
    asked = [QUALIFICATION / f"{name}.jsonl" for name in ("responses", "pairs", "critics")]
    source = Source([shared_data / "xstest" / "xstest_prompts.csv", *asked], require=("prompt",))
    theirs = [word_pairs(row["prompt"]) for row in source]

    def is_alike(text):
        pairs = word_pairs(text)
        return any(len(pairs & other) >= ALIKE_ELSEWHERE * len(pairs | other) for other in theirs)

    ours = [row["prompt"] for rows in (*prompts.values(), demonstrations, principled) for row in rows]
    assert [text for text in ours if is_alike(text)] == []


def test_the_texts_hold_no_markup_of_the_templates(prompts, demonstrations, principled):
    text = json.dumps([*prompts.values(), *demonstrations, *principled])
    assert not any(mark in text for mark in ("<prompt", "<response", "<critique", "<|", "{{", "{%"))
