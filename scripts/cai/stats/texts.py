"""Counts of texts: words, phrases, duplicates and repetition.

    duplicates(prompts, responses)     # share of responses that repeat the response to another prompt
    text in RepeatedTexts(answers)     # whether a text is the answer to many prompts

Languages written without spaces count a clause as one word.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

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
