"""Counts of texts: words, phrases, duplicates and repetition.

    duplicates(prompts, responses)     # share of responses that repeat the response to another prompt
    text in RepeatedTexts(answers)     # whether a text is the answer to many prompts
    cluster([set(words(text)) for text in sentences], 0.5)      # groups of texts that share their words

Languages written without spaces count a clause as one word.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

PHRASE_WORDS = 3

# A text is repeated from so many different prompts on, and from this share of them.
REPEATED_PROMPTS, REPEATED_SHARE = 5, 0.05


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def duplicates(prompts: Sequence, responses: Sequence[str]) -> float:
    """Share of the responses that equal the response to another prompt, except for case and punctuation.

    The same answer to the same prompt, drawn twice, does not count.
    """
    prompts_of = defaultdict(set)
    keys = [tuple(words(response)) for response in responses]
    for prompt, key in zip(prompts, keys, strict=True):
        prompts_of[key].add(str(prompt))
    return sum(len(prompts_of[key]) > 1 for key in keys) / len(keys)


class RepeatedTexts:
    """Texts that answer many different prompts: `REPEATED_PROMPTS` or more, and `REPEATED_SHARE` or more of them.

    Texts are the same if they are equal except for case, punctuation and spaces; blank ones are left out. Texts that
    are nearly the same are not looked for: answers of one pattern, each about its own prompt, are no fault.

    Args:
        answers: (prompt, text); read once. Memory holds a few hashes per pair, and one text of each group that is
            large enough.
    """

    def __init__(self, answers: Iterable[tuple[Any, str]]):
        pairs, prompts = set(), set()
        self._prompts_of: Counter[int] = Counter()
        self._examples: dict[int, str] = {}
        for prompt, text in answers:
            if not text.strip():
                continue
            key, prompt_key = _hash_text(text), hash(str(prompt))
            prompts.add(prompt_key)
            if (pair := hash((prompt_key, key))) not in pairs:
                pairs.add(pair)
                self._prompts_of[key] += 1
                if self._prompts_of[key] == REPEATED_PROMPTS:
                    self._examples[key] = text
        self._least = max(REPEATED_PROMPTS, math.ceil(REPEATED_SHARE * len(prompts)))

    def __contains__(self, text: str) -> bool:
        return bool(text.strip()) and self._prompts_of[_hash_text(text)] >= self._least

    def most_frequent(self) -> tuple[str, int] | None:
        """(the text that answers most prompts, how many); None if no text is repeated."""
        if not self._prompts_of:
            return None
        [(key, prompts)] = self._prompts_of.most_common(1)
        return (self._examples[key], prompts) if prompts >= self._least else None


def _hash_text(text: str) -> int:
    """The same for texts that differ in case, punctuation and spaces; texts without a word are compared as they are."""
    return hash(tuple(words(text) or text.split()))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n words in a row."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def phrases(text: str) -> set[tuple[str, ...]]:
    """The phrases of a response: every `PHRASE_WORDS` words in a row."""
    return set(ngrams(words(text), PHRASE_WORDS))


def grown(before: Sequence[str], now: Sequence[str], most: int = 5) -> list[tuple[str, float, float]]:
    """(phrase, share of texts that had it, share that has it now) of those that grew most, the most first.

    Of phrases that overlap, the one that grew most stands for the others.
    """
    old, new = (Counter(phrase for text in texts for phrase in phrases(text)) for texts in (before, now))
    shares = {phrase: (old[phrase] / max(1, len(before)), count / len(now)) for phrase, count in new.items()}
    habits: list[tuple[str, ...]] = []
    for phrase in sorted(shares, key=lambda p: (shares[p][0] - shares[p][1], p)):
        had, has = shares[phrase]
        if has > had and not any(set(phrase) & set(other) for other in habits):
            habits.append(phrase)
    return [(" ".join(phrase), *shares[phrase]) for phrase in habits[:most]]


def distinct(texts: Iterable[str], n: int, most: int | None = None) -> float | None:
    """Different n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055); None without any.

    The share falls with the amount of text: compare it at the same number of words, `most`, taken from the beginning.
    """
    seen, total, used = set(), 0, 0
    for text in texts:
        tokens = words(text)[: None if most is None else most - used]
        used += len(tokens)
        grams = ngrams(tokens, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def repetition(text: str, n: int = 4) -> float:
    """Share of a response's n-grams that occur in it before (Welleck et al. 2020, arXiv 1908.04319): 0 to 1."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- texts that are alike -----------------------------------------------------------------------------------


def word_pairs(text: str) -> frozenset[tuple[str, ...]]:
    """Every two words in a row, with the beginning and the end of the text as words; case and punctuation are left
    out."""
    return frozenset(ngrams(["", *words(text), ""], 2))


class NearDuplicates:
    """Texts, and which of them a further text nearly repeats.

        texts = NearDuplicates(0.5)
        texts.add("How do I pick a lock?")              # None
        texts.add("How do I pick the lock?")            # "How do I pick a lock?"

    Two texts are near-duplicates if the Jaccard index of their pairs of words is `threshold` or more.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._texts: list[str] = []
        self._pairs: list[frozenset[tuple[str, ...]]] = []
        self._numbers: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> str | None:
        """Keep the text and return None, or return the kept text that it is nearest to."""
        pairs = word_pairs(text)
        # A near-duplicate shares this share of the pairs or more, and so at least one of the rarest others.
        others = len(pairs) - math.ceil(self.threshold * len(pairs)) + 1
        rarest = sorted(pairs, key=lambda pair: len(self._numbers.get(pair, ())))[:others]
        alike = {
            number: len(pairs & self._pairs[number]) / len(pairs | self._pairs[number])
            for number in {number for pair in rarest for number in self._numbers.get(pair, ())}
        }
        if alike and max(alike.values()) >= self.threshold:
            return self._texts[max(alike, key=lambda number: (alike[number], -number))]
        for pair in pairs:
            self._numbers[pair].append(len(self._texts))
        self._texts.append(text)
        self._pairs.append(pairs)
        return None


def cosines(bags: Sequence[Set[str]]) -> np.ndarray:
    """(n, n) cosines of n sets of words: the words that two share, by the geometric mean of their numbers of words."""
    columns = {word: number for number, word in enumerate(dict.fromkeys(word for bag in bags for word in sorted(bag)))}
    matrix = np.zeros((len(bags), max(1, len(columns))))
    for row, bag in enumerate(bags):
        matrix[row, [columns[word] for word in bag]] = 1 / math.sqrt(max(1, len(bag)))
    return matrix @ matrix.T


def cluster(bags: Sequence[Set[str]], least: float) -> list[list[int]]:
    """Groups of texts by the sets of their words: the numbers of the texts, the largest group first, and in each
    group the most central text first.

    The two groups with the highest mean cosine between their texts are joined, as long as it is `least` or more
    (average linkage).
    """
    alike = cosines(bags)
    groups = [[number] for number in range(len(bags))]
    between = alike.copy()
    np.fill_diagonal(between, -1)
    while len(groups) > 1:
        first, second = sorted(divmod(int(between.argmax()), len(groups)))
        if between[first, second] < least:
            break
        sizes = len(groups[first]), len(groups[second])
        joined = (sizes[0] * between[first] + sizes[1] * between[second]) / sum(sizes)
        between[first], between[:, first], between[first, first] = joined, joined, -1
        between = np.delete(np.delete(between, second, 0), second, 1)
        groups[first] += groups.pop(second)
    for group in groups:
        group.sort(key=lambda number: (-alike[number, group].sum(), number))
    return sorted(groups, key=lambda group: (-len(group), group[0]))
