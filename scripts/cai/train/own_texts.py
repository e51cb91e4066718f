"""What a small model writes itself while its adapters are made: answers to the prompts, and the critic's refusals.

    epochs = materials(demonstrations, chosen, prompts, named, 2, chat, "smollm2", folder)
    epochs = with_refusals(epochs, "smollm2", folder / "critic", folder)

Texts are kept in files of the folder, so that none is written twice. Leaves out what is taught with them
(adapter_rows.py).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cai.base import cli, files, hashing
from cai.data import outputs
from cai.data.readers import Row
from cai.models import loading
from cai.models.chat import Chat
from cai.models.engine import Request, Sampling
from cai.stats import refusals
from cai.train import adapter_rows

ANSWERS, REFUSALS = "own-answers.json", "own-refusals.json"

PAIRS = "helpful-pairs.jsonl"  # for run.py --mix

SAMPLING = Sampling(max_new_tokens=80, temperature=1.0)

REFUSING = Sampling(max_new_tokens=80, temperature=0.0)  # sampled at 1, only 28 % of such revisions decline

HELPING = Sampling(max_new_tokens=80, temperature=0.7)  # better answers: these are shown as good ones

LENGTHS = (48, 80)  # tokens: a critic that has seen answers of one length alone misses harm in those of another

SEED = 0  # the same texts for builds with any seed: they take minutes


def materials(
    demonstrations: Sequence[Row],
    chosen: Sequence[Row],
    prompts: Sequence[Row],
    named: Sequence[Row],
    epochs: int,
    chat: Chat,
    model: str,
    folder: Path,
) -> list[adapter_rows.Material]:
    """What each epoch is made of: the model answers the prompts, and those of the chosen demonstrations, itself."""
    answers = answers_to([*chosen, *prompts], model, folder)
    return [
        adapter_rows.Material(
            demonstrations,
            adapter_rows.own_demonstrations(chosen, cut),
            adapter_rows.own_decisions(prompts, cut),
            named,
        )
        for cut in (cut_answers(answers, chat, turn) for turn in range(epochs))
    ]


def answers_to(rows: Sequence[Row], model: str, folder: Path, sampling: Sampling = SAMPLING) -> dict[str, str]:
    """{id: the model's own answer to the row's prompt}."""
    requests = [
        Request(row["id"], [{"role": "user", "content": row["prompt"]}], hashing.hashed_seed("own", SEED, row["id"]))
        for row in rows
    ]
    return written(requests, model, sampling, folder / ANSWERS)


def with_refusals(
    materials: Sequence[adapter_rows.Material], model: str, critic: Path, folder: Path
) -> list[adapter_rows.Material]:
    """The materials with the critic's refusals of harmful prompts and of harmless ones; writes PAIRS."""
    rows = materials[0].answered()
    requests = adapter_rows.refusal_requests(rows, SEED)
    refused = adapter_rows.read_refusals(rows, written(requests, str(critic), REFUSING, folder / REFUSALS))
    harmless = [row for row in rows if row["kind"] != "harmful" and row["id"] in refused]
    if pairs := helpful_pairs(harmless, answers_to(harmless, model, folder, HELPING), refused):
        outputs.write_jsonl(folder / PAIRS, pairs)
    return [replace(material, refusals=refused) for material in materials]


def helpful_pairs(rows: Sequence[Row], answers: dict[str, str], refused: dict[str, str]) -> list[Row]:
    """Pairs of harmless prompts: the model's own answer is better than the critic's refusal.

    What human preferences of helpfulness are in the paper (section 4.1): a judge that asks about harm alone does not
    tell that a needless refusal is worse. Both sides end with a whole sentence: answers are cut more often than
    refusals, and a text that breaks off must not be known as the better one by that.

    Args:
        answers, refused: {id: text}. A pair whose answer declines, or has no whole sentence, is left out.
    """
    pairs = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "chosen": whole_sentences(answers[row["id"]]),
            "rejected": whole_sentences(refused[row["id"]]),
        }
        for row in rows
    ]
    return [pair for pair in pairs if pair["rejected"] and refusals.read(pair["prompt"], pair["chosen"]) == "complied"]


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; "" if it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"”’')]*(?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


def cut_answers(answers: dict[str, str], chat: Chat, turn: int) -> dict[str, str]:
    """The answers, each with as many tokens as the next of LENGTHS says; every turn has other lengths."""
    return {
        id_: chat.answer(chat.encode(answer)[: LENGTHS[(number + turn) % len(LENGTHS)]], continued=False)[0]
        for number, (id_, answer) in enumerate(answers.items())
    }


def written(requests: Sequence[Request], model: str, sampling: Sampling, file: Path) -> dict[str, str]:
    """{key: the text that the model writes}; what the file has is not written again."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    identity = [hashing.identity(model), vars(sampling)]
    names = {r.key: hashing.sha256_text(json.dumps([*identity, r.seed, r.conversation])) for r in requests}
    missing = [request for request in requests if names[request.key] not in kept]
    if missing:
        engine = loading.load_engine(model)
        try:
            with cli.progress(len(missing), file.stem, unit="text") as bar:
                for request, generation in engine.generate(missing, sampling):
                    kept[names[request.key]] = generation.text
                    bar.update()
        finally:  # also of a build that is stopped here
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(file, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
        loading.release_engines()
    return {str(key): kept[name] for key, name in names.items()}
