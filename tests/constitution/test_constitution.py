"""Constitutions: what is read, what is refused and how, how principles are drawn, and what is written."""

import json
from collections import Counter

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cai.base.errors import InputError
from cai.base.paths import CONSTITUTIONS
from cai.constitution import files
from cai.constitution.files import json_schema, load_constitution, to_yaml

BUNDLED = pytest.mark.parametrize("path", sorted(CONSTITUTIONS.glob("*.yaml")), ids=lambda p: p.stem)


def constitution_file(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


@BUNDLED
def test_bundled_constitutions_are_valid_and_say_for_whom(path):
    constitution = load_constitution(path.stem)
    assert constitution.name == path.stem
    assert constitution.description
    assert path.read_text(encoding="utf-8").startswith("# For: ")
    assert all(p.critique and p.revision and p.preference for p in constitution.principles)


def test_at_least_ten_are_bundled_and_those_of_the_professions_name_their_duties():
    bundled = {path.stem: load_constitution(path.stem) for path in CONSTITUTIONS.glob("*.yaml")}
    assert len(bundled) >= 10
    for name in ("health-information", "financial-information", "legal-information"):
        duties = bundled[name].duties
        assert len(duties) >= 3
        # Each rests on something, and each principle says on what.
        assert {tag for p in bundled[name].principles for tag in p.tags} == set(duties)
        assert all(p.tags for p in bundled[name].principles)


@pytest.mark.parametrize("name", ["harmlessness", "financial-information", "customer-support"])
def test_bundled_rounds_answer_requests_of_their_constitution_and_one_finds_no_fault(name):
    constitution = load_constitution(name)
    assert len(constitution.examples) == 3
    for example in constitution.examples:
        requests = {(p.critique, p.revision) for p in constitution.principles}
        assert (example["critique_request"], example["revision_request"].strip()) in requests
    assert [example["revision"] == example["response"] for example in constitution.examples] == [False, True, False]


def test_harmlessness_has_sixteen_principles_and_property_only_speaks_of_property_alone():
    assert len(load_constitution("harmlessness").principles) == 16
    for principle in load_constitution("property-only").principles:
        for request in (principle.critique, principle.revision, principle.preference):
            assert all(word in request for word in ("theft", "fraud", "vandalism")), request


def test_draws_hang_on_seed_record_and_round_alone_and_follow_the_weights(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("principles:\n- {id: a, principle: Be kind, weight: 3}\n- {id: b, principle: Be brief}\n")
    constitution = load_constitution(str(file))
    draws = Counter(constitution.draw(0, f"r{i}", 0).id for i in range(4000))
    # 3 : 1, and four standard deviations of a binomial with n = 4000 are 110
    assert abs(draws["a"] - 3000) < 110
    assert [constitution.draw(1, "x", r).id for r in range(20)] == [constitution.draw(1, "x", r).id for r in range(20)]
    assert len({tuple(constitution.draw(s, "x", r).id for r in range(20)) for s in range(5)}) > 1


def test_a_list_of_sentences_is_a_constitution(tmp_path):
    file = tmp_path / "plain.yaml"
    file.write_text("- Respect privacy.\n- Say what you don't know.\n")
    first, second = load_constitution(str(file)).principles
    assert (first.id, second.id) == ("principle-1", "principle-2")
    assert "Respect privacy" in first.critique and "Respect privacy" in first.preference


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("principles:\n- id: a\n  critque: x\n", 3, "'critique'"),  # the nearest key
        ("principles:\n- id: a\n  critique: x\n  revision: y\n", 2, "preference"),
        ("principals:\n- Be kind\n", 1, "'principles'"),
        ("name: x\n", 1, "principles"),
        ("principles: []\n", 1, "list"),
        ("principles:\n- principle: Be kind\n  id: a\n- principle: Be brief\n  id: a\n", 4, "'a'"),
        ("principles:\n- principle: Be kind\n  weight: -1\n", 3, "-1"),
        ("principles:\n- principle: Be kind\n  weight: .nan\n", 3, "nan"),
        ("principles:\n- principle: Be kind\n  tags: red\n", 3, "red"),
        ("principles:\n- principle: ''\n", 2, "empty"),
        ("principles:\n- &a Be kind\n- *a\n", 3, "alias"),
        ("principles:\n- principle: one: two\n", 2, "YAML"),
        ("a: &a [b, *a]\n", 1, "alias"),
        ("", None, "empty"),
        ("principles:\n- principle: Be kind\n  weight: true\n", 3, "true"),
        ("principles:\n- principle: Be kind\n  weight: 2001-99-99\n", 3, "2001-99-99"),
        ("principles:\n- principle: Be kind\n  tags: []\n", 3, "empty"),
        ("principles:\n- principle: Be kind\n  examples: []\n", 3, "empty"),
        ("principles:\n- principle: Be kind\n  id: a\n  id: b\n", 4, "twice"),
        ("principles:\n- principle: Be kind\n  ? [a, b]\n  : c\n", 3, "unknown key"),
        ("principles:\n- principle: Be kind\n  examples:\n  - {prompt: x, respnse: y}\n", 4, "'response'"),
        ("principles:\n- principle: Be kind\n  examples:\n  - {prompt: x, response: y}\n", 4, "critique"),
        (
            "principles:\n- principle: Be kind\n  examples:\n  - {prompt: x, response_a: y, response_b: z, gold: c}\n",
            4,
            "a or b",
        ),
        ("examples:\n- {prompt: [{role: usr, content: x}], chosen: y, rejected: z}\nprinciples: [x]\n", 2, "usr"),
        ("duties: none\nprinciples: [x]\n", 1, "duties"),
        ("- principle: x\n  source: doc.md\n", 2, "file, lines, quote"),
        ("- principle: x\n  source: {file: doc.md, lines: [1, 2]}\n", 2, "without `quote`"),
        ("- principle: x\n  source: {file: doc.md, lines: [1, 2], quote: ' '}\n", 2, "`quote` is empty"),
        ("- principle: x\n  source: {file: doc.md, lines: [1, 2], quotes: x}\n", 2, "'quote'"),
        ("- principle: x\n  source:\n    lines: [2, 1]\n    file: doc.md\n    quote: x\n", 3, "lines 2, 1"),
        ("- principle: x\n  source: {file: doc.md, lines: [0, 1], quote: x}\n", 2, "lines 0, 1"),
        ("- principle: x\n  source: {file: doc.md, lines: [4], quote: x}\n", 2, "lines 4"),
        ("- !!python/object/apply:os.getcwd []\n", 1, "tag"),
        ('- "\\ud800"\n', 1, "surrogate"),
        ("- a\n---\n- b\n", 2, "YAML"),
        ("- \0\n", None, "YAML"),
    ],
)
def test_bad_constitutions_are_named_with_line_and_value(tmp_path, text, line, word):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_constitution(str(file))
    message = str(caught.value)
    assert word in message
    assert message.startswith(f"{file}:{line}:" if line else f"{file}:")


def test_a_wrong_name_lists_the_bundled_ones():
    with pytest.raises(InputError, match=r"harmlessness, .*property-only"):
        load_constitution("harmlesness")


def test_not_utf8(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("- Sei höflich\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_constitution(str(file))


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "word"),
    [
        (LAUGHS, "alias"),
        ("principles: &p\n- *p\n", "alias"),
        ("principles:\n- &p\n  id: a\n  tags: [*p]\n", "alias"),
        ("[" * 450_000, "nested"),
        ("- " * 200_000, "nested"),
        ("{a: " * 100_000, "nested"),
        ("- x\n" * 501, "501 principles"),
        ("- x\n" * 100_000, "more than 20000"),
        ("- x\n" * 200_000, "800000 bytes"),
        ("- '" + "x\n" * 200_000, "YAML"),
    ],
    ids=["bomb", "cycle", "cycle in a principle", "flow", "block", "maps", "principles", "many", "large", "open quote"],
)
def test_bombs_and_cycles_end_soon_and_with_a_reason(tmp_path, text, word):
    with pytest.raises(InputError, match=word):
        load_constitution(constitution_file(tmp_path, text))


def test_every_problem_can_be_had_at_once(tmp_path):
    file = constitution_file(tmp_path, "- Be kind\n- {critque: x}\n- {principle: Be brief, weight: 0}\n- ''\n")
    problems = []
    constitution = load_constitution(file, problems)
    assert [p.id for p in constitution.principles] == ["principle-1"]
    assert [str(problem).split(": ")[0] for problem in problems] == [f"{file}:{line}" for line in (2, 3, 4)]


EXAMPLES = """\
name: small
description: A test.
for: 'tests of "quotes": colons # and marks'
source: nobody
duties: {honesty: 'Say what is so.'}
principles:
- id: one
  principle: Be kind
  revision: "Rewrite it: kindly."
  weight: 2.5
  tags: [honesty]
  source: {file: ../rules.md, lines: [3, 4], quote: "Be kind: always"}
  examples:
  - prompt: [{role: user, content: "a\\n\\n  b "}, {role: assistant, content: c}, {role: user, content: 'no'}]
    response: " - d"
    critique: |
      Two lines,
        the second indented.
    revision: e
- Plain sentence
examples:
- {prompt: x, chosen: y, rejected: z}
- {prompt: x, response_a: y, response_b: z, gold: b, reasoning: 'yes'}
"""


def test_examples_are_kept_to_the_letter_and_a_principles_own_come_first(tmp_path):
    constitution = load_constitution(constitution_file(tmp_path, EXAMPLES))
    one, two = constitution.principles
    own, *shared = one.examples
    assert own["prompt"][0] == {"role": "user", "content": "a\n\n  b "}
    assert own["prompt"][-1]["content"] == "no"
    assert own["critique"] == "Two lines,\n  the second indented.\n"
    assert own["response"] == " - d"
    assert tuple(shared) == two.examples == constitution.examples
    assert shared[1] == {"prompt": "x", "response_a": "y", "response_b": "z", "gold": "b", "reasoning": "yes"}


def same(one, other) -> bool:
    """Whether two constitutions say the same, wherever they were read from."""
    names = ("name", "description", "audience", "source", "duties", "examples", "principles")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_what_is_written_is_read_as_the_same(tmp_path):
    made = load_constitution(constitution_file(tmp_path, EXAMPLES))
    again = to_yaml(made)
    assert same(made, load_constitution(constitution_file(tmp_path, again)))
    assert again.startswith('# For: tests of "quotes"')


@BUNDLED
def test_a_bundled_constitution_is_written_and_read_as_the_same(path, tmp_path):
    made = load_constitution(path.stem)
    assert same(made, load_constitution(constitution_file(tmp_path, to_yaml(made))))


def test_the_source_of_a_principle_is_read_and_moves_with_the_file(tmp_path):
    constitution = load_constitution(constitution_file(tmp_path, EXAMPLES))
    assert constitution["one"].source == files.Source("../rules.md", (3, 4), "Be kind: always")
    assert constitution["principle-2"].source is None
    moved = files.move_sources(constitution.principles, tmp_path, tmp_path.parent)
    assert [p.source.file if p.source else None for p in moved] == ["rules.md", None]
    deeper = files.move_sources(moved, tmp_path.parent, tmp_path / "deep" / "er")
    assert deeper[0].source.file == "../../../rules.md"


def test_without_a_principle_the_others_stay(tmp_path):
    constitution = load_constitution(constitution_file(tmp_path, "- a\n- b\n"))
    less = constitution.without("principle-1")
    assert [p.id for p in less.principles] == ["principle-2"]
    with pytest.raises(InputError, match="principle-1, principle-2"):
        constitution.without("principle-3")
    with pytest.raises(InputError, match="two or more"):
        less.without("principle-2")


# --- the JSON Schema ----------------------------------------------------------------------------------------

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    json.dumps(json_schema())


def test_the_file_beside_the_constitutions_is_the_schema():
    """Made by `constitution.py schema --output constitutions/constitution.schema.json --overwrite`."""
    assert json.loads((CONSTITUTIONS / "constitution.schema.json").read_text(encoding="utf-8")) == json_schema()


@BUNDLED
def test_the_schema_accepts_what_is_bundled(path):
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "principals:\n- Be kind\n",
        "principles: []\n",
        "principles:\n- id: a\n  critque: x\n",
        "principles:\n- critique: x\n  revision: y\n",
        "principles:\n- {principle: Be kind, weight: 0}\n",
        "principles:\n- {principle: Be kind, tags: red}\n",
        "principles:\n- {principle: Be kind, source: rules.md}\n",
        "principles:\n- {principle: Be kind, source: {file: rules.md, lines: [1], quote: x}}\n",
        "principles:\n- {principle: Be kind, source: {file: rules.md, lines: [0, 1], quote: x}}\n",
        "- ''\n",
        "[]\n",
        "Be kind\n",
        "principles:\n- {principle: Be kind, examples: [{prompt: x}]}\n",
        "principles:\n- {principle: Be kind, examples: [{prompt: x, response_a: y, response_b: z, gold: c}]}\n",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(tmp_path, text):
    with pytest.raises(InputError):
        load_constitution(constitution_file(tmp_path, text))
    assert not VALIDATOR.is_valid(yaml.safe_load(text))
    # and both take what is right
    load_constitution(constitution_file(tmp_path, EXAMPLES))
    VALIDATOR.validate(yaml.safe_load(EXAMPLES))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rules.md", "# Rules\n\n- Be kind\n", 1),
        ("rules.txt", "The assistant must never:\n\n- Tell a secret\n", 1),
        ("rules.yaml", "# Rules\n\nThe assistant must never:\n\n- Tell a secret\n", 3),
        ("rules.yaml", "- Be kind\n# What to avoid\n- Lectures the reader\n", 2),
    ],
)
def test_markdown_is_not_read_as_yaml(tmp_path, name, text, line):
    """To YAML a heading is a comment, and the items below it would lose their polarity."""
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"constitution\.py import") as caught:
        load_constitution(str(tmp_path / name))
    assert f"{name}:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rules.txt", '{"principles": ["Be kind"]}'),
        ("rules.md", "principles:\n- Be kind\n"),
        ("rules.yaml", '["Be kind"]'),
        ("rules.yaml", "# What to avoid\n- Never lie\n"),
    ],
)
def test_a_constitution_is_recognised_by_its_content(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    [principle] = load_constitution(str(tmp_path / name)).principles
    assert principle.id == "principle-1" and principle.critique.endswith(("Be kind.", "Never lie."))


@given(st.integers(1, 7), st.integers(0, 5), st.text(max_size=4), st.lists(st.floats(0.1, 9), min_size=7, max_size=7))
def test_no_principle_is_drawn_twice_while_another_is_unused(count, seed, record_id, weights):
    principles = tuple(files.Principle(f"p{n}", "c", "r", "q", weight=weights[n]) for n in range(count))
    constitution = files.Constitution("x", "", "", principles)
    used = []
    for number in range(3 * count):
        used.append(constitution.draw(seed, record_id, number, used).id)
        times = [used.count(principle.id) for principle in principles]
        assert max(times) - min(times) <= 1


def test_combined_principles_are_numbered_lists():
    combined = files.load_constitution("harmlessness").combine()
    assert combined.id == "all" and len(combined.examples) == 3
    lines = combined.revision.splitlines()
    assert len(lines) == 17
    assert lines[2] == "2. Rewrite the response so that following it would hurt nobody."
