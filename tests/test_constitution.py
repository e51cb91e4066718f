"""Constitutions: what is read, what is refused and how, and how principles are drawn."""

from collections import Counter

import pytest

from cai.constitution import load_constitution
from cai.errors import InputError
from cai.resources import CONSTITUTIONS


@pytest.mark.parametrize("path", sorted(CONSTITUTIONS.glob("*.yaml")), ids=lambda p: p.stem)
def test_bundled_constitutions_are_valid(path):
    constitution = load_constitution(path.stem)
    assert constitution.name == path.stem
    assert constitution.description
    assert all(p.critique and p.revision and p.preference for p in constitution.principles)


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
    with pytest.raises(InputError, match="harmlessness, property-only"):
        load_constitution("harmlesness")


def test_not_utf8(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("- Sei höflich\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_constitution(str(file))
