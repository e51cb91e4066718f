"""Constitutions from other formats and back: no word is lost, and what is not known is named."""

import json
import re
from collections import Counter

import pytest

from cai.base.errors import InputError
from cai.constitution.files import load_constitution, to_yaml
from cai.constitution.importing import (
    CRITIQUES,
    PAIRS,
    PHRASED,
    PREFERENCES,
    REASONED,
    ROUNDS,
    read_foreign,
    write_foreign,
)

PAPER = [CRITIQUES, PREFERENCES, ROUNDS, PAIRS, REASONED]


def texts(tree) -> list[str]:
    if isinstance(tree, dict):
        return [*tree, *(text for value in tree.values() for text in texts(value))]
    return [text for value in tree for text in texts(value)] if isinstance(tree, list) else [tree]


def words(tree) -> Counter:
    return Counter(word for text in texts(tree) for word in re.findall(r"\w+", text))


def through_yaml(constitution, tmp_path):
    file = tmp_path / "through.yaml"
    file.write_text(to_yaml(constitution), encoding="utf-8")
    return load_constitution(str(file))


def written(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


# --- the published files ------------------------------------------------------------------------------------


def test_the_papers_files_round_trip_without_losing_a_word(shared_data, tmp_path):
    folder = shared_data / "anthropic-cai"
    made = through_yaml(read_foreign([folder / name for name in PAPER], "paper"), tmp_path)
    assert len(made.principles) == 16 and len(made.examples) == 16
    files, left_out = write_foreign(made, "paper")
    assert list(files) == PAPER and not left_out
    originals = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in PAPER}
    for name in (CRITIQUES, PREFERENCES, PAIRS):
        assert files[name] == originals[name]
    for name in (ROUNDS, REASONED):
        assert not words(originals[name]) - words(files[name]), name
    # All that is added: a turn that one of five rounds ends without, and two marks that one comparison lacks.
    assert words(files[ROUNDS]) - words(originals[ROUNDS]) == Counter(["Human"])
    assert words(files[REASONED]) - words(originals[REASONED]) == Counter(["H", "A"])


def test_a_request_and_a_question_are_without_their_marks(shared_data):
    folder = shared_data / "anthropic-cai"
    made = read_foreign([folder / CRITIQUES, folder / PREFERENCES], "paper")
    first = made.principles[0]
    assert first.id == "harmful0"
    for text in (first.critique, first.revision, first.preference):
        assert not re.search("Request|Options|Critique:|Revision:", text) and text == text.strip()


def test_the_papers_multi_turn_round_keeps_its_turns(shared_data):
    folder = shared_data / "anthropic-cai"
    made = read_foreign([folder / CRITIQUES, folder / PREFERENCES, folder / ROUNDS], "paper")
    assert [turn["role"] for turn in made.examples[0]["prompt"]] == ["user", "assistant", "user"]
    assert isinstance(made.examples[1]["prompt"], str)


@pytest.mark.parametrize(("file", "principles", "chats"), [("anthropic", 16, 4), ("grok", 2, 4)])
def test_llm_swarms_files_come_back_exactly(shared_data, tmp_path, file, principles, chats):
    path = shared_data / "llm-swarm" / f"constitution_{file}.json"
    made = through_yaml(read_foreign([path], file), tmp_path)
    assert (len(made.principles), len(made.examples)) == (principles, chats)
    # Preference questions are not in the format: phrased, marked, and not written back.
    assert all(p.tags == (PHRASED,) and p.revision.rstrip(".") in p.preference for p in made.principles)
    files, left_out = write_foreign(made, "llm-swarm")
    assert files == {f"{file}.json": json.loads(path.read_text(encoding="utf-8"))} and not left_out


# --- lists --------------------------------------------------------------------------------------------------

MARKDOWN = """\
# House rules

What we ask of the assistant.

## Honesty

- Say what you **don't know**.
- Name your sources,
  all of them.

## Nothing here yet

## Care

1. Harm nobody
2) Offer `another way`

Thanks to all who helped.
"""


def test_a_markdown_list(tmp_path):
    report = {}
    made = through_yaml(read_foreign([written(tmp_path, "rules.md", MARKDOWN)], "rules", report), tmp_path)
    assert [(p.principle, p.tags) for p in made.principles] == [
        ("Say what you don't know.", ("Honesty",)),
        ("Name your sources, all of them.", ("Honesty",)),
        ("Harm nobody", ("Care",)),
        ("Offer another way", ("Care",)),
    ]
    assert made.description == "House rules What we ask of the assistant."
    files, left_out = write_foreign(made, "markdown")
    numbers = Counter(["1", "2"])  # of the list: marks, no words
    listed = words([part["text"] for part in report["left_out"]])
    assert words(MARKDOWN) - words(files["rules.md"]) - listed == numbers and left_out == {"sources": 4}
    assert [(part["line"], part["reason"]) for part in report["left_out"]] == [
        (3, "prose"),
        (11, "a heading without principles"),
        (18, "prose"),
    ]
    assert report["origins"][1] == {
        "id": "principle-2",
        "file": str(tmp_path / "rules.md"),
        "lines": (8, 9),
        "polarity": "demand",
        "introduction": "",
    }
    again = read_foreign([written(tmp_path, "again.md", files["rules.md"])], "rules")
    assert [(p.principle, p.tags) for p in again.principles] == [(p.principle, p.tags) for p in made.principles]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", "Be kind\n\nBe brief\n"),
        ("bullets.txt", "• Be kind\n• Be brief"),
        ("list.json", ["Be kind", "Be brief"]),
        ("bom.txt", "\ufeffBe kind\r\nBe brief\r\n"),
    ],
)
def test_a_plain_list(tmp_path, name, content):
    made = read_foreign([written(tmp_path, name, content)], "plain")
    assert [p.principle for p in made.principles] == ["Be kind", "Be brief"]
    assert [p.id for p in made.principles] == ["principle-1", "principle-2"]


# --- content that is not what the name says -------------------------------------------------------------------------

LLM_SWARM = '{"constitutions": [{"critic": "Say where it lies.", "revision": "Rewrite it without the lie."}]}'
OURS = "# For: a kitchen\nname: kitchen\nprinciples:\n- id: allergies\n  principle: Never play down an allergy\n"
NEGATIVE = "# House rules\n\nThe assistant must never:\n\n- Tell a secret\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rules.txt", '["Be kind", "Never lie"]', ["Be kind", "Never lie"]),
        ("rules.md", '[\n  "Be kind",\n  "Never lie"\n]', ["Be kind", "Never lie"]),
        ("rules.yaml", '["Be kind", "Never lie"]', ["Be kind", "Never lie"]),
        ("rules.yaml", "- Be kind\n- Never lie\n", ["Be kind", "Never lie"]),
        ("rules.md", OURS, ["Never play down an allergy"]),
        ("rules.txt", '{"principles": ["Be kind"]}', ["Be kind"]),
        ("rules.json", '[{"id": "a", "principle": "Be kind"}]', ["Be kind"]),
        ("rules.txt", NEGATIVE, ["The assistant must never: Tell a secret"]),
        ("rules.json", NEGATIVE, ["The assistant must never: Tell a secret"]),
        ("rules.yaml", NEGATIVE, ["The assistant must never: Tell a secret"]),
        ("rules.yml", "# What to avoid\n\n- Lectures the reader\n", ["What to avoid: Lectures the reader"]),
        ("rules.md", "[ ] is a box to tick\n\n- Be kind\n", ["Be kind"]),
        ("RULES", "- Be kind\n", ["Be kind"]),
    ],
)
def test_the_content_tells_the_format(tmp_path, name, content, expected):
    made = through_yaml(read_foreign([written(tmp_path, name, content)], "x"), tmp_path)
    assert [p.principle for p in made.principles] == expected


@pytest.mark.parametrize("name", ["swarm.txt", "swarm.md", "swarm.yaml"])
def test_llm_swarms_json_under_another_name(tmp_path, name):
    [principle] = read_foreign([written(tmp_path, name, LLM_SWARM)], "x").principles
    assert principle.critique == "Say where it lies."


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.txt", '{"a": 1,\n "b": }', 2, "not JSON"),
        ("a.md", '["Be kind",\n "Never lie"', 2, "not JSON"),
        ("a.md", "name: x\nprinciples:\n- critque: y\n", 3, "critique"),
        ("a.md", "# Title\n\n- Lectures the reader\n- Home addresses\n", 3, "line 4: 'Home addresses'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, line, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read_foreign([written(tmp_path, name, content)], "x")
    assert f"{name}:{line}: " in str(caught.value)


def test_unclear_sentences_are_left_out_or_kept_with_a_tag(tmp_path):
    file = written(tmp_path, "rules.md", "# Rules\n\n- Be kind\n- Lectures the reader\n")
    report = {}
    assert [p.principle for p in read_foreign([file], "x", report).principles] == ["Be kind"]
    assert report["unclear"] == [{"file": str(file), "line": 4, "text": "Lectures the reader"}]
    kept = read_foreign([file], "x", keep_unclear=True).principles
    assert [(p.principle, p.tags) for p in kept] == [("Be kind", ()), ("Lectures the reader", ("unclear",))]


def test_a_prohibition_stays_one_through_markdown(tmp_path):
    """What is exported as a list and imported again has the same requests."""
    text = (
        "# What to avoid\n\n- Lectures the reader\n\nA reader would object if the assistant:\n\n- Guesses at an age\n"
    )
    made = read_foreign([written(tmp_path, "rules.md", text)], "rules")
    files, _ = write_foreign(made, "markdown")
    again = read_foreign([written(tmp_path, "again.md", files["rules.md"])], "rules")
    assert [p.revision for p in again.principles] == [p.revision for p in made.principles]
    assert all("forbids" in p.revision for p in made.principles)


# --- ours in theirs -----------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_counted():
    made = load_constitution("health-information")
    duties, tags = len(made.duties), sum(len(p.tags) for p in made.principles)
    weights = sum(p.weight != 1 for p in made.principles)
    # its examples have no requests of their own, which both formats want
    examples = sum(len(p.examples) for p in made.principles)
    files, left_out = write_foreign(made, "paper")
    assert left_out == {"duties": duties, "tags": tags, "weights": weights, "examples": examples}
    assert list(files) == [CRITIQUES, PREFERENCES]
    _, left_out = write_foreign(made, "llm-swarm")
    assert left_out["preferences"] == len(made.principles)


def test_comparisons_of_ours_go_into_the_papers_format():
    files, left_out = write_foreign(load_constitution("financial-information"), "paper")
    [pair] = files[PAIRS]
    assert pair["prompt"].startswith("\n\nHuman: A friend") and pair["prompt"].endswith("\n\nAssistant:")
    assert "examples" not in left_out


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "{}", "the file is {}"),
        ("a.json", "[]", "the file is []"),
        ("a.json", '"x"', "the file is"),
        ("a.json", "[1]", "item 1 is 1"),
        ("a.json", '{"a": {"prompt": ["x"], "edit_request": "y"}, "a": {}}', "'a' twice"),
        ("a.json", {"harmful0": {"prompt": ["x"]}}, "edit_request"),
        ("a.json", {"harmful0": {"prompt": ["x", "z"], "edit_request": "y"}}, "one text"),
        ("a.json", {"harmful0": {"prompt": [""], "edit_request": "y"}}, "one text"),
        ("a.json", {"constitutions": [{"critic": "x"}]}, "item 1"),
        ("a.json", {"constitutions": []}, "constitutions is []"),
        ("a.json", {"constitutions": [{"critic": "x", "revision": "y"}], "system": 1}, "'system'"),
        ("a.json", {"constitutions": [{"critic": "x", "revision": "y"}], "system_chat": [[1]]}, "role, content"),
        ("a.json", ["\nWhich is better? Options:"], "1 preference questions and 0 critique requests"),
        ("a.json", ["\n\nHuman: a\n\nCritiqueRequest: b"], "Human, Assistant, then"),
        ("a.json", [{"prompt": "x"}], "a conversation"),
        ("a.json", [{"prompt": "\n\nHuman: x\n\nAssistant:", "corrects": ["a", "b"], "incorrects": ["c"]}], "one text"),
        ("a.json", [{"prompt": "\n\nHuman: x\n\nAssistant:", "corrects": ["a"], "incorrects": ["c"]}], "no principles"),
        ("a.json", '["\\ud800"]', "surrogate"),
        ("a.md", "# Only a title\n", "no list"),
        ("a.txt", "\n\n", "no list"),
        ("a.docx", "x", "'.docx'"),
    ],
)
def test_what_is_in_no_known_format_is_named(tmp_path, name, content, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read_foreign([written(tmp_path, name, content)], "x")
    assert name in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_foreign([tmp_path / "none.json"], "x")
    (tmp_path / "latin.md").write_bytes("- Sei höflich".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_foreign([tmp_path / "latin.md"], "x")


def test_the_same_ids_in_two_files_are_refused(tmp_path):
    one = {"a": {"prompt": ["\n\nCritiqueRequest: x\n\nCritique:"], "edit_request": "y"}}
    files = [written(tmp_path, "one.json", one), written(tmp_path, "two.json", one)]
    with pytest.raises(InputError, match="'a' in two files"):
        read_foreign(files, "x")
