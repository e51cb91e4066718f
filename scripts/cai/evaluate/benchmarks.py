"""Multiple-choice evaluations in the format of the paper's three sets: read, scored, and set beside trivial answers.

    source = Source(["438HHHEvaluations.jsonl"], require=choice.FIELDS, check=choice.check)
    for row, scores in choice.by_model(source, load_engine("tiny"), "chat"): ...

A row: `prompt`, `corrects`, `incorrects` (answers, each with the space that follows the prompt); for a reward model
`text_correct` and `text_incorrect`, two whole transcripts. An answer's score is the sum of the log-probabilities of
its tokens after the prompt, over the whole vocabulary. Leaves out answers written freely and then parsed, examples
before the question, and scores divided by the answer's length: the sets' answers are letters.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cai.base import hashing
from cai.base.errors import CaiError, InputError, shorten
from cai.data import dialogue
from cai.data.dialogue import as_messages, prompt_text
from cai.stats import calibration, intervals

FIELDS = ("prompt", "corrects", "incorrects")

TEXTS = ("text_correct", "text_incorrect")

FORMS = ("chat", "text")

_WINDOW = 32  # batches of sequences that are sorted by length together


# --- rows ----------------------------------------------------------------------------------------------------


def check(row: dict, where, line: int) -> None:
    """InputError unless the row has right and wrong answers, all different, to a prompt that is one text."""
    if not isinstance(row["prompt"], str):
        raise InputError(
            "the prompt is a conversation",
            where=where,
            line=line,
            expected="one text",
            remedy="Begin it otherwise than with `Human:`, as the paper's sets do",
        )
    for name in ("corrects", "incorrects"):
        found = row[name]
        if not isinstance(found, list) or not found or not all(isinstance(one, str) and one.strip() for one in found):
            raise InputError(
                f"{name!r} is {shorten(found)!r}",
                where=where,
                line=line,
                expected="a list of at least one answer, each a text",
                remedy="Mend or delete this row",
            )
    every = [one.strip() for one in answers(row)]
    if len(set(every)) < len(every):
        [(twice, _)] = Counter(every).most_common(1)
        raise InputError(
            f"the answer {shorten(twice)!r} is there twice",
            where=where,
            line=line,
            expected="answers that differ",
            remedy="Mend or delete this row",
        )


def check_texts(row: dict, where, line: int) -> None:
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
    if _pair(row) is None:
        raise InputError(
            "text_correct and text_incorrect do not begin alike",
            where=where,
            line=line,
            expected=r"transcripts (\n\nHuman: ... \n\nAssistant: ...) with the same first turn",
            remedy="Mend or delete this row",
        )


def answers(row: dict) -> list[str]:
    """All answers, the right ones first."""
    return [*row["corrects"], *row["incorrects"]]


def _pair(row: dict) -> dict | None:
    """{prompt, chosen, rejected} of the two transcripts, None if they share nothing."""
    made = dialogue.split_pair({"chosen": row["text_correct"], "rejected": row["text_incorrect"]})
    return made if "prompt" in made else None


def context(row: dict) -> str:
    """What several questions may share: the conversation that they are about, without the question and its options."""
    if isinstance(row.get("context"), str):
        found = row["context"]
    elif all(isinstance(row.get(name), str) for name in TEXTS) and (pair := _pair(row)):
        found = prompt_text(pair["prompt"])
    else:
        first = min(one.strip() for one in answers(row))
        before, options, _ = row["prompt"].partition(f"\n {first}")
        found = before.rstrip().rpartition("\n\n")[0] if options else ""
    return " ".join((found or row["prompt"]).split())


# --- scores --------------------------------------------------------------------------------------------------


def by_model(rows: Iterable[dict], engine, form: str) -> Iterator[tuple[dict, list[float] | None]]:
    """Each row with the log-probability of each of its `answers`; None where one does not fit the model's context.

    Args:
        engine: of `engines.load_engine`.
        form: "text" goes on where the prompt ends, as a pretrained model would; "chat" puts the prompt into a user's
            turn, and its last line, where that ends with a colon ("The answer is:"), into the assistant's.
    """
    rows = iter(rows)
    while window := list(islice(rows, _WINDOW * engine.batch_size)):
        asked: list[tuple[int, list[int], int]] = []  # row, token ids, where the answer begins
        lost = set()
        for number, row in enumerate(window):
            begins, sequences = encoded(row, engine, form)
            if engine.context and max(map(len, sequences)) > engine.context:
                lost.add(number)
            else:
                asked += [(number, ids, begins) for ids in sequences]
        scores: list[list[float]] = [[] for _ in window]
        found: dict[int, float] = {}
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][1]))
        for start in range(0, len(order), engine.batch_size):
            batch = order[start : start + engine.batch_size]
            found |= zip(batch, _logprobs(engine, [asked[i][1:] for i in batch]), strict=True)
        for i, (number, *_) in enumerate(asked):
            scores[number].append(found[i])
        yield from ((row, None if number in lost else scores[number]) for number, row in enumerate(window))


def encoded(row: dict, engine, form: str) -> tuple[int, list[list[int]]]:
    """(where the answers begin, token ids of prompt and answer for each of the `answers`).

    They begin where the tokens of prompt and answer first differ from those of the prompt alone or from those of
    another answer: a token that joins the end of the prompt with the beginning of an answer is the answer's.
    """
    chat = engine.chat
    if form == "text":
        before = chat.neutralise(row["prompt"])
        made = [before + chat.neutralise(answer) for answer in answers(row)]
        lists = engine.tokenizer([before, *made])["input_ids"]  # with the BOS, if the tokenizer writes one
    else:
        question, last = row["prompt"].strip(), ""
        if question.endswith(":"):
            question, _, last = question.rpartition("\n")
        if not question:
            question, last = last, ""
        turns = [{"role": "user", "content": question.strip()}]
        before = chat.render([*turns, {"role": "assistant", "content": last}] if last else turns)
        said = answers(row) if last else [answer.lstrip() for answer in answers(row)]
        lists = [chat.encode(before + chat.neutralise(answer)) for answer in ["", *said]]
    shared = next(
        (n for n, column in enumerate(zip(*lists, strict=False)) if len(set(column)) > 1), min(map(len, lists))
    )
    return max(1, shared), lists[1:]


def _logprobs(engine, batch: Sequence[tuple[list[int], int]]) -> list[float]:
    """Sum of the log-probabilities of ids[begins:] for each (ids, begins), in one forward pass.

    Padded on the right, which no token before can see. Logits are made for the answers' columns alone.
    """
    import torch

    model = engine.model
    width, most = max(len(ids) for ids, _ in batch), max(len(ids) - begins for ids, begins in batch)
    ids = torch.tensor([[*ids, *[engine.pad_id] * (width - len(ids))] for ids, _ in batch])
    # The token in column c is foretold in column c − 1; what is beyond the answer is read and left out.
    columns = torch.tensor([[min(begins + k, len(row)) - 1 for k in range(most)] for row, begins in batch])
    rows = torch.arange(len(batch))[:, None]
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0][rows.to(args[0].device), columns.to(args[0].device)],)
    )
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            logprobs = logits.float().log_softmax(-1).cpu()
    except torch.OutOfMemoryError as error:
        raise CaiError(f"{len(batch)} rows of {width} tokens do not fit the memory. Lower --batch-size") from error
    finally:
        hook.remove()
    if logprobs.isnan().any():
        raise CaiError(f"{engine.name}: the model's logits are not numbers (NaN). Try --dtype float32 or bfloat16")
    return [
        math.fsum(logprobs[number, k, token].item() for k, token in enumerate(row[begins:]))
        for number, (row, begins) in enumerate(batch)
    ]


def by_reward_model(rows: Iterable[dict], scorer) -> Iterator[tuple[dict, list[float] | None]]:
    """Each row with the scores of its right and its wrong transcript; None where one does not fit the context.

    scorer: of `reward.load_scorer`.
    """
    rows = iter(rows)
    while window := list(islice(rows, _WINDOW * scorer.batch_size)):
        pairs = [_pair(row) for row in window]
        texts = [(as_messages(pair["prompt"]), pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        scores = scorer.scores(texts)
        for row, both in zip(window, zip(scores[::2], scores[1::2], strict=True), strict=True):
            yield row, None if None in both else list(both)


# --- what they say -------------------------------------------------------------------------------------------


def result(row: dict, scores: Sequence[float], temperature: float | None = None) -> dict:
    """What is written of one row: {id, context (hashed), scores, p_correct, confidence, right, ...}.

    Args:
        scores: log-probabilities of the `answers`, or, with a temperature, a reward model's scores of both texts.

    p_correct: probability of the right answers, normalised over all. right: whether the likeliest is among them; a tie
    with a wrong one is not. mass: what the answers have of the probability. first, longer: whether these are right.
    """
    texts = [row.get(name) for name in TEXTS]
    names, right = (list(TEXTS), 1) if temperature else (answers(row), len(row["corrects"]))
    scaled = [score / (temperature or 1.0) for score in scores]
    top = max(scaled)
    shares = [math.exp(score - top) for score in scaled]
    shares = [share / math.fsum(shares) for share in shares]
    made = {
        "id": row["id"],
        "context": hashing.sha256_text(context(row))[:16],
        "scores": dict(zip(names, scores, strict=True)),
        "p_correct": math.fsum(shares[:right]),
        "confidence": max(shares),
        "right": max(scores[:right]) > max(scores[right:]),
        "tie": max(scores[:right]) == max(scores[right:]),
        "corrects": row["corrects"],
        "first": min(answers(row)) in row["corrects"],
        "chance": len(row["corrects"]) / len(answers(row)),
    }
    if not temperature:
        made["mass"] = math.fsum(math.exp(score) for score in scores)
    if all(isinstance(text, str) for text in texts):
        longer, shorter = map(len, texts)
        made["longer"] = 0.5 if longer == shorter else float(longer > shorter)
    return made


def figures(results: Sequence[dict]) -> tuple[dict, dict]:
    """({metric: {value, low, high, n}}, counts) from rows of `result`; intervals count a context's rows as alike.

    Beside the accuracy stand answers that need no model: always the first, the answer most often right (known only to
    one who has seen them all), one at random, and the longer text.
    """
    contexts = [one["context"] for one in results]

    def share(values: Iterable[bool]) -> dict:
        return _plain(intervals.clustered_rate(list(values), contexts))

    def mean(values: Iterable[float]) -> dict:
        return _plain(intervals.clustered_mean(list(values), contexts))

    commonest = Counter(answer for one in results for answer in one["corrects"]).most_common(1)[0][0]
    rates = {
        "accuracy": share(one["right"] for one in results),
        "baseline_first": share(one["first"] for one in results),
        "baseline_commonest": share(commonest in one["corrects"] for one in results),
        "baseline_chance": mean(one["chance"] for one in results),
        "p_correct": mean(one["p_correct"] for one in results),
        "log_loss": mean(-math.log(max(one["p_correct"], 1e-300)) for one in results),
        "ece": calibration.calibration([one["confidence"] for one in results], [one["right"] for one in results])[
            "ece"
        ],
    }
    lengths = [one for one in results if "longer" in one]
    if lengths:
        found = intervals.clustered_rate([one["longer"] for one in lengths], [one["context"] for one in lengths])
        rates["baseline_longer"] = _plain(found)
    if "mass" in results[0]:
        rates["answer_mass"] = mean(min(1.0, one["mass"]) for one in results)
    return rates, {"contexts": len(set(contexts)), "ties": sum(one["tie"] for one in results)}


def _plain(measured: dict) -> dict:
    return {name: measured[name] for name in ("value", "low", "high", "n")}
