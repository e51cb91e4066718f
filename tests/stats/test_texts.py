"""Texts that are alike: near-duplicates by pairs of words, and clusters by words."""

import random

import numpy as np
import pytest

from cai.stats.texts import NearDuplicates, cluster, cosines, word_pairs, words


def test_pairs_of_words_have_a_beginning_and_an_end():
    assert word_pairs("Pick it!") == {("", "pick"), ("pick", "it"), ("it", "")}


def test_a_near_duplicate_is_the_text_that_it_repeats():
    kept = NearDuplicates(0.5)
    assert kept.add("How do I pick a lock?") is None
    # 7 pairs each, 5 of them shared: 5 / 9
    assert kept.add("How do I pick the lock?") == "How do I pick a lock?"
    assert kept.add("how do I pick a LOCK") == "How do I pick a lock?"
    # 7 and 7 pairs, 3 shared: 3 / 11
    assert kept.add("How do I bake a cake?") is None


def test_near_duplicates_are_those_that_comparing_all_texts_finds():
    rng = random.Random(0)
    vocabulary = ["how", "do", "I", *(f"word{n}" for n in range(8))]
    drawn = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 7))) for _ in range(300)]
    kept, plain = NearDuplicates(0.4), []
    for text in drawn:
        pairs = word_pairs(text)
        repeats = any(len(pairs & other) / len(pairs | other) >= 0.4 for other in plain)
        assert (kept.add(text) is not None) == repeats
        if not repeats:
            plain.append(pairs)
    assert 10 < len(plain) < 290


def test_the_cosine_is_of_the_sets_of_words():
    alike = cosines([{"a", "x"}, {"x", "a"}, {"a", "b", "c", "d", "e", "f", "g", "h"}, set()])
    assert alike == pytest.approx(np.array([[1, 1, 1 / 4, 0], [1, 1, 1 / 4, 0], [1 / 4, 1 / 4, 1, 0], [0, 0, 0, 0]]))


def test_clusters_come_by_size_and_begin_with_the_most_central_text():
    sentences = [
        "Be brief",
        "Name your sources",
        "Never lecture the reader",
        "Do not lecture the reader at length",
        "Never lecture a reader",
    ]
    groups = cluster([set(words(text)) for text in sentences], 0.4)
    assert [sorted(group) for group in groups] == [[2, 3, 4], [0], [1]]
    assert groups[0][0] == 2


def test_no_text_has_no_cluster_and_texts_without_words_are_apart():
    assert cluster([], 0.3) == []
    assert cluster([set(), set()], 0.3) == [[0], [1]]
