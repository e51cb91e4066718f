"""Reward models that score responses: checked, loaded, called.

    scorer = load_scorer("runs/reward")
    scorer([[{"role": "user", "content": "Hello"}]], ["Hello! How can I help?"])

A folder and a hub id are treated alike. A prompt and response that are longer than the model's context have no score:
None. Leaves out how a reward model is trained (train/reward_model.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.models import folders, loading
from cai.models.chat import Chat, encode
from cai.models.decoding import context_length
from cai.stats.calibration import sigmoid

# The field of a reward model's config.json that holds the temperature of its scores.
TEMPERATURE = "score_temperature"

# The field that holds where its responses end (`chat.ENDINGS`); without it, at the end token.
ENDING = "score_ending"


def check_reward_model(name: str) -> None:
    """Raise InputError unless a folder or a hub id is a reward model: another model's head would be drawn at random."""
    if not loading.is_classifier(name):
        architectures = folders.architectures(loading.find_model(name)) or ["no architecture named"]
        raise InputError(
            f"not a reward model ({', '.join(architectures)})",
            where=name,
            expected="a sequence classifier with one score",
            remedy="Train one with reward_model.py",
        )


def score_sequences(
    model: Any, pad_id: int, sequences: Sequence[Sequence[int]], batch_size: int, *, show_progress: bool = True
) -> list[float]:
    """A reward model's score of each sequence, read at its last token.

    Args:
        model: a sequence classifier with one output.
        pad_id: the token to pad with, which the model's configuration names too.
        sequences: token ids of prompt and response (`chat.encode`).
        batch_size: rows in one forward pass: longest first, padded on the right.
    Raises:
        CaiError: a score is not finite.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    bar = cli.progress(len(sequences), "score") if show_progress else None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(sequences[rows[0]])
        ids = torch.tensor([[*sequences[i], *[pad_id] * (width - len(sequences[i]))] for i in rows])
        mask = torch.tensor([[1] * len(sequences[i]) + [0] * (width - len(sequences[i])) for i in rows])
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for i, score in zip(rows, logits[:, 0].float().tolist(), strict=True):
            scores[i] = score
        if bar is not None:
            bar.update(len(rows))
    if bar is not None:
        bar.close()
    if not all(map(math.isfinite, scores)):
        raise CaiError(
            "a score of the reward model is not finite. Train it with a lower --learning-rate, or --dtype float32"
        )
    return scores


@dataclass(frozen=True)
class Scorer:
    """A reward model ready to score, as a reward: (conversations, responses) -> scores. `load_scorer` makes one.

    Args:
        chat: the model's tokenizer and chat template.
        model: a sequence classifier with one output.
        batch_size: rows in one forward pass.
        temperature: what a difference of scores is divided by to make it a log-odds.
    """

    chat: Chat
    model: Any
    batch_size: int = 32
    temperature: float = 1.0

    def __call__(self, prompts: Sequence[list[dict[str, str]]], responses: Sequence[str]) -> list[float | None]:
        """One score per response, as `scores` gives them, without a progress bar."""
        return self.scores(list(zip(prompts, responses, strict=True)), show_progress=False)

    def scores(
        self, texts: Sequence[tuple[list[dict[str, str]], str]], *, show_progress: bool = True
    ) -> list[float | None]:
        """The score of each (prompt messages, response), encoded as in training; None where it exceeds the context."""
        context = context_length(self.model)
        sequences = [list(chain(*encode(self.chat, prompt, response))) for prompt, response in texts]
        fitting = [i for i, ids in enumerate(sequences) if context is None or len(ids) <= context]
        scores = score_sequences(
            self.model,
            self.chat.tokenizer.pad_token_id,
            [sequences[i] for i in fitting],
            self.batch_size,
            show_progress=show_progress,
        )
        by_row = dict(zip(fitting, scores, strict=True))
        return [by_row.get(i) for i in range(len(texts))]

    def probability(self, score: float, other: float) -> float:
        """The probability that the response with `score` is better than the one with `other`."""
        return sigmoid((score - other) / self.temperature)


def load_scorer(name: str, *, batch_size: int = 32, device: str | None = None, dtype: str = "auto") -> Scorer:
    """The scorer of a reward model, on its device.

    Args:
        name: a folder or a hub id.
        batch_size: rows in one forward pass.
        device, dtype: as the options of the commands; weights that are only read need no float32 on a GPU.
    Raises:
        InputError: no such model, not a reward model, or more than one output.
    """
    check_reward_model(name)
    chat = loading.load_chat(name)
    model = loading.load_reward_model(name, device, dtype, lora=True).to(loading.best_device(device))
    # Read by the classifier to find the last token of each row.
    model.config.get_text_config().pad_token_id = chat.tokenizer.pad_token_id
    temperature = float(getattr(model.config, TEMPERATURE, 1.0))
    chat.set_ending(getattr(model.config, ENDING, "eos"))
    return Scorer(chat, model.eval().requires_grad_(False), batch_size, temperature)
