"""What is counted in texts: words, phrases, duplicates and repetition.

    duplicates(prompts, responses)     # share of responses that repeat the response to another prompt

Languages written without spaces count a clause as one word.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

PHRASE_WORDS = 3


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def duplicates(prompts: Sequence, responses: Sequence[str]) -> float:
    """Share of the responses that say what the response to another prompt says, but for case and punctuation.

    The same answer to the same prompt, drawn twice, does not count.
    """
    said: dict[tuple, set] = {}
    keys = [(tuple(words(response)), str(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
    for key, prompt in keys:
        said.setdefault(key, set()).add(prompt)
    return sum(len(said[key]) > 1 for key, _ in keys) / len(keys)


def phrases(text: str) -> set[tuple[str, ...]]:
    """The phrases of a response: every `PHRASE_WORDS` words in a row."""
    said = words(text)
    return set(zip(*(said[i:] for i in range(PHRASE_WORDS)), strict=False))


def grown(before: Sequence[str], now: Sequence[str], most: int = 5) -> list[tuple[str, float, float]]:
    """(phrase, share of texts that had it, share that has it now) of those that grew most, the most first.

    Of phrases that overlap, the one that grew most stands for the others.
    """
    shares = []
    for texts in (before, now):
        counts = Counter(phrase for text in texts for phrase in phrases(text))
        shares.append({phrase: count / len(texts) for phrase, count in counts.items()})
    had, has = shares
    found: list[tuple[tuple, float, float]] = []
    for phrase in sorted(has, key=lambda p: (had.get(p, 0.0) - has[p], p)):
        if len(found) == most or has[phrase] <= had.get(phrase, 0.0):
            break
        if not any(set(phrase) & set(other) for other, _, _ in found):
            found.append((phrase, had.get(phrase, 0.0), has[phrase]))
    return [(" ".join(phrase), a, b) for phrase, a, b in found]


def distinct(texts: Iterable[str], n: int, most: int | None = None) -> float | None:
    """Different n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055); None without any.

    The share falls with the amount of text: compare it at the same number of words, `most`, taken from the beginning.
    """
    seen, total, used = set(), 0, 0
    for text in texts:
        said = words(text)
        if most is not None:
            said = said[: most - used]
        used += len(said)
        grams = list(zip(*(said[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def repetition(text: str, n: int = 4) -> float:
    """Share of a response's n-grams that it has said before (Welleck et al. 2020, arXiv 1908.04319): 0 to 1."""
    said = words(text)
    grams = list(zip(*(said[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
