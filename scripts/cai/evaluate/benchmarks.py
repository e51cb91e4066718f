"""Multiple-choice evaluations in the format of the paper's three sets: read, scored, and set beside trivial answers.

    source = Source(["438HHHEvaluations.jsonl"], require=benchmarks.FIELDS, check=benchmarks.check)
    for row, scores in benchmarks.by_model(source, load_engine("tiny"), "chat"): ...

A row: `prompt`, `corrects`, `incorrects` (answers, each with the space that follows the prompt); for a reward model
`text_correct` and `text_incorrect`, two whole transcripts. An answer's score is the sum of the log-probabilities of
its tokens after the prompt, over the whole vocabulary; for `accuracy_norm` it is divided by the answer's length. Leaves
out answers written freely and then parsed, and examples before the question.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cai.base import hashing
from cai.base.errors import InputError, shorten
from cai.data import dialogue
from cai.evaluate.rates import without_clusters
from cai.models import decoding
from cai.stats import calibration, intervals

FIELDS = ("prompt", "corrects", "incorrects")

TEXTS = ("text_correct", "text_incorrect")

FORMS = ("chat", "text")

_WINDOW = 32  # batches of sequences that are sorted by length together


# --- rows ----------------------------------------------------------------------------------------------------


def check(row: dict, where: str, line: int) -> None:
    """InputError unless the row has right and wrong answers, all different, to a prompt that is one text."""

    def refuse(problem: str, expected: str, remedy: str = "Fix or delete this row") -> InputError:
        return InputError(problem, where=where, line=line, expected=expected, remedy=remedy)

    if not isinstance(row["prompt"], str):
        remedy = "Begin it with something other than `Human:`, as the paper's sets do"
        raise refuse("the prompt is a conversation", "one text", remedy)
    for name in ("corrects", "incorrects"):
        texts = row[name]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise refuse(f"{name!r} is {shorten(texts)!r}", "a list of at least one answer, each a text")
    [(answer, count), *_] = Counter(answer.strip() for answer in answers(row)).most_common()
    if count > 1:
        raise refuse(f"the answer {shorten(answer)!r} is there twice", "answers that differ")


def check_texts(row: dict, where: str, line: int) -> None:
    """InputError unless the row has two transcripts that begin alike, for a reward model."""
    check(row, where, line)
    missing = [name for name in TEXTS if not isinstance(row.get(name), str)]
    if missing:
        raise InputError(
            f"no {' and no '.join(missing)}, which a reward model reads",
            where=where,
            line=line,
            expected="two whole transcripts",
            remedy="Measure a language model on this file (--model)",
        )
    if _split_texts(row) is None:
        raise InputError(
            "text_correct and text_incorrect do not begin alike",
            where=where,
            line=line,
            expected=r"transcripts (\n\nHuman: ... \n\nAssistant: ...) with the same first turn",
            remedy="Fix or delete this row",
        )


def answers(row: dict) -> list[str]:
    """All answers, the right ones first."""
    return [*row["corrects"], *row["incorrects"]]


def _split_texts(row: dict) -> dict | None:
    """{prompt, chosen, rejected} of the two transcripts, None if they have nothing in common."""
    pair = dialogue.split_pair({"chosen": row["text_correct"], "rejected": row["text_incorrect"]})
    return pair if "prompt" in pair else None


def context(row: dict) -> str:
    """What several questions may have in common: the conversation that they are about, without question and options."""
    if isinstance(row.get("context"), str):
        text = row["context"]
    elif all(isinstance(row.get(name), str) for name in TEXTS) and (pair := _split_texts(row)):
        text = dialogue.prompt_text(pair["prompt"])
    else:
        first = min(answer.strip() for answer in answers(row))
        before, options, _ = row["prompt"].partition(f"\n {first}")
        text = before.rstrip().rpartition("\n\n")[0] if options else ""
    return " ".join((text or row["prompt"]).split())


# --- scores --------------------------------------------------------------------------------------------------


def by_model(rows: Iterable[dict], engine, form: str) -> Iterator[tuple[dict, list[float] | None]]:
    """Each row with the log-probability of each of its `answers`; None where one does not fit the model's context.

    Args:
        engine: a model on this machine.
        form: "text" continues where the prompt ends, as a pretrained model would; "chat" puts the prompt into a user
            turn, and its last line, where that ends with a colon ("The answer is:"), into the assistant's.
    """
    rows = iter(rows)
    while window := list(islice(rows, _WINDOW * engine.batch_size)):
        sequences = []  # (row's number, answer's number, token ids, where the answer begins)
        for number, row in enumerate(window):
            begin, encoded = encode(row, engine, form)
            if not engine.context or max(map(len, encoded)) <= engine.context:
                sequences += [(number, answer, ids, begin) for answer, ids in enumerate(encoded)]
        scores: dict[int, dict[int, float]] = {}
        logprobs = sum_logprobs(engine, [(ids, begin) for _, _, ids, begin in sequences])
        for (number, answer, _, _), logprob in zip(sequences, logprobs, strict=True):
            scores.setdefault(number, {})[answer] = logprob
        for number, row in enumerate(window):
            yield row, [scores[number][i] for i in range(len(answers(row)))] if number in scores else None


def encode(row: dict, engine, form: str) -> tuple[int, list[list[int]]]:
    """(where the answers begin, token ids of prompt and answer for each of the `answers`).

    They begin where the tokens of prompt and answer first differ from those of the prompt alone or from those of
    another answer: a token that joins the end of the prompt with the beginning of an answer is the answer's.
    """
    chat = engine.chat
    if form == "text":
        before, texts = chat.neutralise(row["prompt"]), answers(row)
    else:
        question, prefill = row["prompt"].strip(), ""
        if question.endswith(":") and "\n" in question:
            question, _, prefill = question.rpartition("\n")
        turns = [{"role": "user", "content": question.strip()}]
        before = chat.render([*turns, {"role": "assistant", "content": prefill}] if prefill else turns)
        texts = answers(row) if prefill else [answer.lstrip() for answer in answers(row)]
    texts = [before, *(before + chat.neutralise(answer) for answer in texts)]
    # the tokenizer writes a BOS if it has one; a chat template has written its own
    sequences = engine.tokenizer(texts)["input_ids"] if form == "text" else [chat.encode(text) for text in texts]
    columns = enumerate(zip(*sequences, strict=False))
    common = next((n for n, column in columns if len(set(column)) > 1), min(map(len, sequences)))
    return max(1, common), sequences[1:]


def sum_logprobs(engine, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
    """Sum of the log-probabilities of ids[begin:] for each (ids, begin), in batches of similar length.

    Args:
        engine: a model on this machine.
    """
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number][0]))
    sums = [0.0] * len(sequences)
    for start in range(0, len(order), engine.batch_size):
        numbers = order[start : start + engine.batch_size]
        logprobs = decoding.token_logprobs(engine.model, engine.pad_id, [sequences[number] for number in numbers])
        for number, of_tokens in zip(numbers, logprobs, strict=True):
            sums[number] = math.fsum(of_tokens)
    if any(map(math.isnan, sums)):
        raise decoding.not_a_number(engine.name)
    return sums


def by_reward_model(rows: Iterable[dict], scorer) -> Iterator[tuple[dict, list[float] | None]]:
    """Each row with the scores of its right and its wrong transcript; None where one does not fit the context."""
    rows = iter(rows)
    while window := list(islice(rows, _WINDOW * scorer.batch_size)):
        pairs = [_split_texts(row) for row in window]
        texts = [(dialogue.as_messages(pair["prompt"]), pair[s]) for pair in pairs for s in ("chosen", "rejected")]
        scores = scorer.scores(texts)
        for row, *both in zip(window, scores[::2], scores[1::2], strict=True):
            yield row, None if None in both else both


# --- what the scores say -------------------------------------------------------------------------------------


def result(row: dict, scores: Sequence[float], temperature: float | None = None) -> dict:
    """What is written of one row: {id, context (hashed), scores, p_correct, confidence, right, ...}.

    Args:
        scores: log-probabilities of the `answers`, or, with a temperature, a reward model's scores of both texts.

    p_correct: probability of the right answers, normalised over all. right: whether the likeliest is among them; a tie
    with a wrong one is not. right_norm: the same of the log-probabilities per character of the answer, as
    lm-evaluation-harness computes its acc_norm (lm_eval/api/task.py: the answer without the space before it; its
    acc_bytes divides by bytes). mass: the answers' share of the probability. first, longer: whether these are right.
    longest, shortest: the same of the answer of this length, where lengths differ.
    """
    names, right = (list(TEXTS), 1) if temperature else (answers(row), len(row["corrects"]))
    highest = max(scores)
    shares = [math.exp((score - highest) / (temperature or 1.0)) for score in scores]
    best, best_wrong = max(scores[:right]), max(scores[right:])
    summary = {
        "id": row["id"],
        "context": hashing.sha256_text(context(row))[:16],
        "scores": dict(zip(names, scores, strict=True)),
        "p_correct": math.fsum(shares[:right]) / math.fsum(shares),
        "confidence": max(shares) / math.fsum(shares),
        "right": best > best_wrong,
        "tie": best == best_wrong,
        "corrects": row["corrects"],
        "first": min(answers(row)) in row["corrects"],
        "chance": len(row["corrects"]) / len(answers(row)),
    }
    if not temperature:
        lengths = [len(answer.strip()) for answer in names]
        per_character = [score / length for score, length in zip(scores, lengths, strict=True)]
        summary["right_norm"] = max(per_character[:right]) > max(per_character[right:])
        if len(set(lengths)) > 1:
            summary["longest"] = _compare(max(lengths[:right]), max(lengths[right:]))
            summary["shortest"] = _compare(min(lengths[right:]), min(lengths[:right]))
        summary["mass"] = math.fsum(math.exp(score) for score in scores)
    if all(isinstance(row.get(name), str) for name in TEXTS):
        summary["longer"] = _compare(*(len(row[name]) for name in TEXTS))
    return summary


def _compare(length: int, other: int) -> float:
    """1 if the first is the greater, 0.5 if both are equal, else 0."""
    return 0.5 if length == other else float(length > other)


def choice_loss(row: dict) -> float:
    """−log of the probability of the right answers, of a row of `result`."""
    return -math.log(max(row["p_correct"], 1e-300))


def figures(results: Sequence[dict]) -> tuple[dict, dict]:
    """({metric: {value, low, high, n}}, counts) from rows of `result`; intervals count a context's rows as alike.

    Beside the accuracy stand answers that need no model: always the first, the answer most often right (known only to
    those who have seen them all), one at random, the longer text, and the longest and the shortest answer.
    """

    def figure(estimate, values: Iterable[float], rows: Sequence[dict] = results) -> dict:
        return without_clusters(estimate(list(values), [row["context"] for row in rows]))

    rate, mean = intervals.clustered_rate, intervals.clustered_mean
    commonest = Counter(answer for row in results for answer in row["corrects"]).most_common(1)[0][0]
    confidences, is_right = [row["confidence"] for row in results], [row["right"] for row in results]
    rates = {
        "accuracy": figure(rate, is_right),
        **({"accuracy_norm": figure(rate, [row["right_norm"] for row in results])} if "mass" in results[0] else {}),
        "baseline_first": figure(rate, (row["first"] for row in results)),
        "baseline_commonest": figure(rate, (commonest in row["corrects"] for row in results)),
        "baseline_chance": figure(mean, (row["chance"] for row in results)),
        "p_correct": figure(mean, (row["p_correct"] for row in results)),
        "log_loss": figure(mean, map(choice_loss, results)),
        "ece": calibration.calibration(confidences, is_right)["ece"],
    }
    for name in ("longer", "longest", "shortest"):
        with_lengths = [row for row in results if name in row]
        if with_lengths:
            rates[f"baseline_{name}"] = figure(rate, (row[name] for row in with_lengths), with_lengths)
    if "mass" in results[0]:
        rates["answer_mass"] = figure(mean, (min(1.0, row["mass"]) for row in results))
    counts = {"contexts": len({row["context"] for row in results}), "ties": sum(row["tie"] for row in results)}
    warning = length_warning(results)
    return rates, {**counts, "notes": [warning]} if warning else counts


def length_warning(results: Sequence[dict]) -> str:
    """What to think of the accuracies where length alone tells every right answer; "" where it does not."""

    def always(name: str, value: float = 1.0) -> bool:
        return all(row.get(name) == value for row in results)

    if always("longest"):
        return (
            "every correct answer is the longer one: a sum of log-probabilities falls with length, so accuracy counts "
            "against the right answers, and accuracy_norm may favour them for their length alone"
        )
    if always("shortest"):
        return (
            "every correct answer is the shorter one: a sum of log-probabilities falls with length, so accuracy may "
            "favour the right answers for their length alone, and accuracy_norm counts against them"
        )
    if "mass" not in results[0] and (always("longer") or always("longer", 0.0)):
        word = "longer" if always("longer") else "shorter"
        return f"every correct text is the {word} one: the accuracy does not tell a preference for {word} texts apart"
    return ""
