"""Reward models that score responses: checked, loaded, called.

    scorer = load_scorer("runs/reward")
    scorer.scores([([{"role": "user", "content": "Hello"}], "Hello! How can I help?")])

Leaves out how a reward model is trained (train/reward_model.py).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.models import loading
from cai.models.chat import Chat, encode
from cai.stats.calibration import sigmoid


def score_sequences(model, pad_id: int, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """A reward model's score of each sequence of token ids (`encode`, prompt and response joined).

    Read at the last token that is not `pad_id`; longest first, padded on the right.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    with cli.progress(len(sequences), "score") as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(sequences[rows[0]])
            ids = torch.tensor([[*sequences[i], *[pad_id] * (width - len(sequences[i]))] for i in rows])
            mask = torch.tensor([[1] * len(sequences[i]) + [0] * (width - len(sequences[i])) for i in rows])
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            values = logits[:, 0].float().tolist()
            if not all(map(math.isfinite, values)):
                raise CaiError(
                    "the reward model's scores are not numbers. Train it with a lower --learning-rate, or "
                    "--dtype float32"
                )
            for i, value in zip(rows, values, strict=True):
                found[i] = value
            bar.update(len(rows))
    return found


TEMPERATURE = "score_temperature"


def check_reward_model(folder: str) -> None:
    """Raise InputError if the folder is no reward model: its head would be drawn at random."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise InputError(
            "no such model folder",
            where=folder,
            expected="a folder written by reward_model.py",
            remedy="Check the path",
        )
    kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"not a reward model ({', '.join(kinds) or 'no architecture named'})",
            where=folder,
            expected="a folder written by reward_model.py",
            remedy="Check --reward-model",
        )


@dataclass(frozen=True)
class Scorer:
    """A reward model ready to score. Make one with `load_scorer`."""

    chat: Any
    model: Any
    batch_size: int
    temperature: float

    def scores(self, texts: Sequence[tuple[list[dict], str]]) -> list[float | None]:
        """The score of each (prompt messages, response), encoded as in training; None where it exceeds the context."""
        context = loading.context_length(self.model)
        sequences = [list(chain(*encode(self.chat, prompt, response))) for prompt, response in texts]
        fit = [i for i, ids in enumerate(sequences) if context is None or len(ids) <= context]
        pad_id = self.chat.tokenizer.pad_token_id
        made = score_sequences(self.model, pad_id, [sequences[i] for i in fit], self.batch_size)
        found = dict(zip(fit, made, strict=True))
        return [found.get(i) for i in range(len(texts))]

    def probability(self, one: float, other: float) -> float:
        """That the response with the score `one` is better than that with `other`."""
        return sigmoid((one - other) / self.temperature)


def load_scorer(folder: str, *, batch_size: int = 32, device: str | None = None, dtype: str = "auto") -> Scorer:
    """A reward model's folder, loaded. InputError if it is none."""
    check_reward_model(folder)
    chat = loading.load_chat(folder)
    model = loading.load_reward_model(folder, device, dtype).to(loading.best_device(device))
    model.config.pad_token_id = chat.tokenizer.pad_token_id
    return Scorer(chat, model, batch_size, float(getattr(model.config, TEMPERATURE, 1.0)))


class RewardModel:
    """Scores responses by a sequence classifier, read at the end token as the classifier was trained.

    Args:
        model: a sequence classifier with one output.
        chat: its tokenizer and chat template.
        batch_size: rows in one forward pass.
    """

    def __init__(self, model, chat: Chat, batch_size: int = 32):
        self.model, self.chat, self.batch_size = model.eval().requires_grad_(False), chat, batch_size
        if self.model.config.get_text_config().pad_token_id is None:
            self.model.config.get_text_config().pad_token_id = chat.tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> list[float]:
        """One score a response, in the order given."""
        import torch

        pairs = [encode(self.chat, p, r) for p, r in zip(prompts, responses, strict=True)]
        sequences = [torch.tensor(before + answer) for before, answer in pairs]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        scores = [0.0] * len(sequences)
        pad_id = self.model.config.get_text_config().pad_token_id
        with torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                ids = torch.nn.utils.rnn.pad_sequence([sequences[i] for i in rows], True, pad_id)
                found = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits[:, 0]
                for i, score in zip(rows, found.float().tolist(), strict=True):
                    scores[i] = score
        return scores
