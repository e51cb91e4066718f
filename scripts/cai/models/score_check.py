"""Whether other engines read the same score of a response from a reward model's folder as we do, and if not, why.

    report = check_scores("handover/reward", responses)
    report["trl"]                 # {"compared": 50, "beyond": 0, "largest": 2e-06, "causes": {}}

Each engine's way from a response to a score is imitated from its source: which tokens it reads, at which of them, and
with which layer (references/handover.md has versions and places). The pass through the model is ours for all of
them, one response at a time. tests/benchmarks/handover.py compares with the engines' own code.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cai.models import folders, loading, reward_folders
from cai.models.chat import encode
from cai.models.decoding import context_length
from cai.models.engine import Message
from cai.models.gguf import resolve
from cai.models.reward_folders import HEAD, Head

Response = tuple[Sequence[Message], str]  # the messages of the prompt, and the response

# How far two scores of the same response may differ.
TOLERANCE = 1e-3

# {engine: whose way from a response to a score it takes}
WAYS = {"openrlhf": "openrlhf", "llamafactory": "openrlhf", "verl": "verl", "trl": "trl", "axolotl": "trl"}


@dataclass(frozen=True)
class Reading:
    """What an engine reads of a response: token ids, and the position whose hidden state becomes the score."""

    ids: list[int]
    position: int


class Engines:
    """The ways of the engines, for one reward model and the policy that writes the responses.

    Args:
        folder: of the reward model.
        policy: folder or hub id whose tokenizer the policy has; None: the reward model's.
    """

    def __init__(self, folder: str, policy: str | None = None):
        self.chat = reward_folders.load_chat(folder)
        self.stored = loading.load_tokenizer(folder)  # as engines load it: no padding token is chosen
        self.policy = loading.load_chat(policy) if policy else loading.load_chat(folder)

    def read(self, way: str, prompt: Sequence[Message], response: str) -> Reading:
        """What the engine reads of a response; `cai` is our own way (`chat.encode`)."""
        ways = {"cai": self._read_cai, "openrlhf": self._read_openrlhf, "verl": self._read_verl, "trl": self._read_trl}
        return ways[way](prompt, response)

    def try_to_read(self, way: str, prompt: Sequence[Message], response: str) -> Reading | None:
        """`read`, or None where the template refuses the conversation as this engine gives it."""
        from jinja2 import TemplateError

        try:
            return self.read(way, prompt, response)
        except (TemplateError, TypeError, ValueError):
            return None

    def _read_cai(self, prompt: Sequence[Message], response: str) -> Reading:
        ids = list(chain(*encode(self.chat, prompt, response)))
        return Reading(ids, len(ids) - 1)

    def _written(self, prompt: Sequence[Message], response: str) -> list[int]:
        """The token ids that a policy has written: the response and its end token."""
        return encode(self.policy, prompt, response)[1]

    def _read_openrlhf(self, prompt: Sequence[Message], response: str) -> Reading:
        """The policy's prompt, rendered as it is, and the ids that were written; the last one is scored.

        OpenRLHF 0.11.2: datasets/prompts_dataset.py, utils/agent.py (SingleTurnAgentExecutor), models/model.py.
        """
        tokenizer = self.policy.tokenizer
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + self._written(prompt, response)
        return Reading(ids, len(ids) - 1)

    def _read_verl(self, prompt: Sequence[Message], response: str) -> Reading:
        """The conversation rendered by the reward model's template, tokenized by vLLM with special tokens.

        verl 0.9.1: experimental/reward_loop/reward_loop.py (_preprocess_reward_inputs, compute_score_disrm).
        """
        policy, tokenizer = self.policy.tokenizer, self.stored
        text = policy.decode(self._written(prompt, response)).replace(policy.eos_token, "")
        turns = [*prompt, {"role": "assistant", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        if tokenizer.bos_token is not None:
            rendered = rendered.removeprefix(tokenizer.bos_token)
        ids = tokenizer(rendered)["input_ids"]
        return Reading(ids, len(ids) - 1)

    def _read_trl(self, prompt: Sequence[Message], response: str) -> Reading:
        """The conversation rendered by the reward model's template; the last token that is not padding is scored.

        TRL 1.16.0: trainer/grpo_trainer.py (_calculate_rewards); transformers' sequence classifiers find that token.
        """
        tokenizer = self.stored
        text = self.policy.tokenizer.decode(self._written(prompt, response), skip_special_tokens=True)
        turns = [*prompt, {"role": "assistant", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Reading(ids, max((i for i, number in enumerate(ids) if number != pad), default=0))


def explain_reading(ours: Reading, theirs: Reading, tokenizer: Any) -> str:
    """The cause of a difference between two readings, in the words of references/handover.md."""
    ids, others, bos = ours.ids, theirs.ids, tokenizer.bos_token_id
    if others == ids:
        return "pad" if theirs.position != ours.position else "numbers"
    if bos is not None and ids[:1] != others[:1] and bos in (ids[0], others[0]):
        return "bos"
    if bos is not None and others[:2] == [bos, bos]:
        return "bos"
    if others[: len(ids)] == ids:
        return "extra token"
    if ids[: len(others)] == others:
        return "missing token"
    end = ids[-1]
    if others[: len(ids) - 1] == ids[:-1] and end in others[len(ids) - 1 :]:
        return "extra token"
    half = min(len(ids), len(others)) // 4
    return "prompt" if ids[:half] != others[:half] or ids[-2:] == others[-2:] else "other tokens"


# --- heads --------------------------------------------------------------------------------------------------


def head_of(way: str, head: Head, config: dict[str, Any]) -> tuple[Any, str | None]:
    """(the weight that an engine scores with, why it is another one than that of the folder, if so).

    The weight is None where the engine refuses the folder or draws a head at random.
    """
    labels = len(config.get("id2label") or {0: "", 1: ""})
    rows = head.weight.shape[0]
    name = f"{config.get('value_head_prefix', 'score')}.weight" if way == "openrlhf" else HEAD
    if head.name != name:
        return None, "head name"
    if way == "verl" and (head.bias is not None or labels != rows):  # vLLM builds what config.json says, without bias
        return None, "head bias" if head.bias is not None else "num_labels"
    if way != "verl" and rows != 1:  # both build one score
        return None, "label order"
    weight = head.weight[-1].float()
    cause = "label order" if rows != 1 else "head bias" if head.bias is not None else None
    return weight, cause


# --- the check ----------------------------------------------------------------------------------------------


def check_scores(
    folder: str,
    responses: Sequence[Response],
    *,
    policy: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    reference: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Each engine's scores of responses against the folder's own: its stored head on our encoding.

    Args:
        folder: a reward model's.
        responses: with their prompts; those beyond the model's context are left out and counted.
        policy: folder or hub id of the model that writes the responses in the engine.
        device, dtype: as the options of the commands.
        reference: scores to compare with instead, one per response.
    Returns:
        {engine: {compared, beyond (those that differ by more than `TOLERANCE`, or have no score), largest (None
        without a score), causes: {cause: how many}}} for `cai` and each way of `WAYS`; and `scores`, the folder's own.
    """
    path = resolve(folder)
    engines, head, config = Engines(folder, policy), reward_folders.read_head(path), folders.read_config(path)
    body = _Body(folder, device, dtype)
    weight, bias = head.score_row()
    ours = [engines.read("cai", prompt, text) for prompt, text in responses]
    own = [None if body.exceeds(reading) else body.score(reading, weight) + bias for reading in ours]
    expected = list(reference) if reference is not None else own
    report: dict[str, Any] = {}
    for way in ("cai", *dict.fromkeys(WAYS.values())):
        theirs, cause = (head.weight[0].float(), None) if way == "cai" else head_of(way, head, config)
        if way == "cai" and (head.bias is not None or head.better is not None):
            cause = "label order" if head.better is not None else "head bias"
            theirs = None if head.better is not None else theirs
        causes: Counter[str] = Counter()
        differences: list[float] = []
        beyond = 0
        for (prompt, text), mine, target in zip(responses, ours, expected, strict=True):
            if target is None:
                continue
            reading = engines.try_to_read(way, prompt, text)
            if theirs is None or reading is None or body.exceeds(reading):
                causes[cause or ("template" if reading is None else "context")] += 1
                beyond += 1
                continue
            differences.append(abs(body.score(reading, theirs) - target))
            if differences[-1] > TOLERANCE:
                reason = explain_reading(mine, reading, engines.stored)
                causes.update({reason} - ({"numbers"} if cause else set()) | ({cause} if cause else set()))
                beyond += 1
        report[way] = {
            "compared": sum(score is not None for score in expected),
            "beyond": beyond,
            "largest": float(f"{max(differences):.3g}") if differences else None,
            "causes": dict(causes.most_common()),
        }
    return {"engines": report, "scores": own}


class _Body:
    """A reward model without its head: hidden states of token sequences, each computed once."""

    def __init__(self, folder: str, device: str | None, dtype: str):
        from transformers import AutoModel

        with loading.quiet_report():  # the head is not used
            model = loading.load_weights(AutoModel, folder, loading.precision(device, dtype)[0])
        self._model = model.to(loading.best_device(device)).eval()
        self._states: dict[tuple[int, ...], Any] = {}
        self._context = context_length(self._model)

    def exceeds(self, reading: Reading) -> bool:
        return self._context is not None and len(reading.ids) > self._context

    def score(self, reading: Reading, weight: Any) -> float:
        import torch

        key = (*reading.ids, -1, reading.position)
        if key not in self._states:
            ids = torch.tensor([reading.ids[: reading.position + 1]], device=self._model.device)
            with torch.inference_mode():
                states = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            self._states[key] = states[0, -1].float().cpu()
        return float(self._states[key] @ weight)


def show_report(report: dict[str, Any]) -> list[str]:
    """One line per engine that differs, for people."""
    lines = []
    for name, figures in report.items():
        if figures["beyond"]:
            causes = ", ".join(f"{cause} {count}" for cause, count in figures["causes"].items())
            difference = "no score" if figures["largest"] is None else f"up to {figures['largest']:.3g}"
            lines.append(f"{name}: {figures['beyond']} of {figures['compared']} scores differ ({difference}): {causes}")
    return lines
