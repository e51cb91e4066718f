"""Builds the bundled model `tiny`: a tokenizer, and a training loop over demonstrations of the world.

    python scripts/tiny.py build --output tiny-new --seed 0

Leaves out validation against the oracle: `evaluate.py` does that.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cai.base.errors import InputError
from cai.world import language, oracle
from cai.world.demonstrations import ASSISTANT, BOS, CATEGORY, DECISION, END, PAD, SPECIAL, SYSTEM, Demonstrations

VOCABULARY = 2304

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# The loss on the first token of a decision counts as much as a short sentence, since it is what such a row teaches.
DECISION_WEIGHT = 6.0

PROBES = CATEGORY + len(language.CATEGORIES)  # CATEGORY and those after it: one for each category

PROBED_LAYERS = (2, 2, 4, 4, 4, 4, 4) + (3,) * len(language.CATEGORIES)

PROBE_LOSSES = (1.0, 4.0, 1.0, 3.0, 1.0, 1.0, 1.0) + (0.5,) * len(language.CATEGORIES)  # what is wrong is rarer

PROBE_WEIGHT = 0.4

BATCH_TOKENS = 2048  # small steps, and many: matching one text with another is learned late, in steps, not in tokens

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if not (loop.last and continue_final_message is defined and continue_final_message) %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(demos: Demonstrations, folder: Path, samples: int = 20_000):
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on demonstrations and saved in `folder`."""

    def texts():
        for index in range(samples):
            messages, target, _ = demos.draw(demos.TASKS[index % len(demos.TASKS)])
            yield "\n".join([*(m["content"] for m in messages), target.replace(DECISION, "")])
            if index % 10 == 0:
                # every word of the world often enough to become one token: a word in pieces is hard to copy
                yield " " + " ".join(oracle.words())

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[END],
        additional_special_tokens=list(SPECIAL[SYSTEM:END]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(vocabulary: int, hidden: int, layers: int, feed_forward: int, seed: int):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=feed_forward,
            num_attention_heads=max(1, hidden // 64),
            num_key_value_heads=max(1, hidden // 64),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
            attention_dropout=0.0,
            initializer_range=0.05,
        )
    )
    # Keys begin equal to queries, so that a word looks for itself in what came before: "is this the noun that was asked
    # about?" then takes thousands of steps less to learn (mimetic initialization, arXiv 2305.09828).
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data *= 1.5
        attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
    return model


@dataclass(frozen=True)
class Encoded:
    """One demonstration: token ids, a loss weight for each, and (position, what the probe is to read there)."""

    ids: list[int]
    weights: list[float]
    probes: list[tuple[int, int]]


def encode(tokenizer, demos: list[tuple]) -> list[Encoded]:
    """Demonstrations as token ids. The loss weight is 0 on everything that is not the target of the last turn."""
    prefixes, pieces, marks = [], [], []
    for messages, target, marked_texts in demos:
        prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        turns = (f"<|{m['role']}|>{m['content']}{SPECIAL[END]}" for m in (messages[:-1] if prefill else messages))
        prefix = SPECIAL[BOS] + "".join(turns) + SPECIAL[ASSISTANT] + prefill
        prefixes.append(prefix)
        pieces.append(target.split(DECISION))
        marks.append([(prefix.index(text) + at, kind) for text, ends in marked_texts for at, kind in ends])
    piece_ids = iter(tokenizer([piece for parts in pieces for piece in parts], add_special_tokens=False)["input_ids"])
    encoded = tokenizer(prefixes, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for ids, spans, parts, ends in zip(encoded["input_ids"], encoded["offset_mapping"], pieces, marks, strict=True):
        token_at = {c: at for at, (start, end) in enumerate(spans) for c in range(start, end)}
        weights = [0.0] * len(ids)
        for number, _ in enumerate(parts):
            piece = next(piece_ids)
            first = DECISION_WEIGHT if number else 1.0
            ids, weights = [*ids, *piece], [*weights, *([first] + [1.0] * len(piece))[: len(piece)]]
        rows.append(Encoded([*ids, END], [*weights, 1.0], [(token_at[c], kind) for c, kind in ends]))
    return rows


# Share of tokens by task: at first speaking, and so copying; then the parts of which a judgement is made, which short
# rows teach best (does a sentence belong to the request, does a principle speak of an act); then everything.
STAGES = (
    (2_000_000, {"respond": 0.4, "check": 0.3, "revise": 0.15, "critique": 0.15}),
    (
        9_000_000,
        {
            "respond": 0.13,
            "check": 0.25,
            "scope": 0.08,
            "follow_up": 0.06,
            "judge": 0.2,
            "critique": 0.18,
            "revise": 0.1,
        },
    ),
    (
        math.inf,
        {
            "respond": 0.12,
            "critique": 0.1,
            "revise": 0.17,
            "judge": 0.24,
            "follow_up": 0.02,
            "check": 0.04,
            "scope": 0.015,
            "classify": 0.08,
            "classify_critique": 0.025,
            "critique_cot": 0.015,
            "preference_cot": 0.015,
            "judge_cot": 0.015,
            "coverage": 0.05,
            "critique_listed": 0.03,
            "revise_listed": 0.03,
            "judge_listed": 0.02,
            "critique_worked": 0.005,
            "revise_worked": 0.01,
        },
    ),
)

# tokens of a demonstration, about
LENGTHS = {
    "respond": 66,
    "critique": 137,
    "revise": 180,
    "judge": 176,
    "follow_up": 65,
    "check": 85,
    "scope": 45,
    "classify": 170,
    "classify_critique": 158,
    "critique_cot": 170,
    "preference_cot": 200,
    "judge_cot": 205,
    "coverage": 136,
    "critique_listed": 272,
    "revise_listed": 302,
    "judge_listed": 278,
    "critique_worked": 405,
    "revise_worked": 550,
}


def _padded_width(tokens: int) -> int:
    """The width of a batch whose longest row has so many tokens: few different widths, each compiled once."""
    step = 32 if tokens <= 256 else 128
    return -(-tokens // step) * step


def batches(demos: Demonstrations, tokenizer, shares: dict[str, float], tokens: int):
    """Endless lists of encoded rows, each of about `tokens` tokens and of like length."""
    tasks = list(shares)
    weights = [shares[t] / LENGTHS[t] for t in tasks]
    while True:
        drawn = [demos.draw(demos.rng.choices(tasks, weights)[0]) for _ in range(2000)]
        rows = sorted(encode(tokenizer, drawn), key=lambda row: len(row.ids))
        groups, group = [], []
        for row in rows:
            width = _padded_width(len(row.ids))
            if group and width * (len(group) + 1) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        demos.rng.shuffle(groups)
        yield from groups


def build(
    output: str,
    *,
    tokens: int,
    threads: int,
    report: Callable[[str], None],
    start: Path | None = None,
    compiled: bool = True,
    **settings: Any,
) -> dict:
    """Train `tiny` from its seed and save it in `output`; resumes from the checkpoint there.

    Args:
        tokens: training tokens in all (targets and what is read before them).
        start: the folder of an earlier build of the same sizes, to continue from. Its tokenizer is kept, the
            optimizers begin again, and all demonstrations are of the last stage.
        report: called with a line of text now and then.
        compiled: torch.compile the layers, which takes a C++ compiler and then two thirds of the time.
        settings: seed, hidden, layers, feed_forward and learning_rate; others are kept in build.json.

    Returns a dict of what was done, saved as build.json beside the weights.
    """
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64  # one for each width of a batch
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": settings["seed"], "tokens": tokens, **settings}
    stages = STAGES if start is None else STAGES[-1:]
    checkpoint = folder / "checkpoint.pt"
    training = _Training(settings, folder, start, resumed=checkpoint.exists(), compiled=compiled)
    if checkpoint.exists():
        training.load(checkpoint)
    started = saved = time.time()
    streams = [batches(training.demos, training.tokenizer, shares, BATCH_TOKENS) for _, shares in stages]
    while training.done < tokens:
        training.set_learning_rate()
        stage = next(number for number, (until, _) in enumerate(stages) if training.done < until)
        training.update(next(streams[stage]))
        if training.step % 100 == 0:
            report(
                f"step {training.step}  {training.done / 1e6:.2f} of {tokens / 1e6:.1f} M tokens  "
                f"loss {_recent(training.losses):.4f}  probes {' '.join(map(str, training.probe_rates()))}  "
                f"{time.time() - started:.0f} s"
            )
        if time.time() - saved > 60:
            training.save(checkpoint)
            saved = time.time()
    if not math.isfinite(_recent(training.losses)):
        raise InputError("the loss is NaN or infinite", where=output, remedy="Lower --learning-rate")
    summary = training.finish(folder, round(time.time() - started))
    checkpoint.unlink(missing_ok=True)
    return summary


class _Training:
    """The model in training, its optimizers and its demonstrations, at `step` after `done` tokens."""

    def __init__(self, settings: dict[str, Any], folder: Path, start: Path | None, *, resumed: bool, compiled: bool):
        self.settings, self.done, self.step = settings, 0, 0
        self.demos = Demonstrations(settings["seed"])
        if start is not None:
            for name in TOKENIZER_FILES:
                shutil.copyfile(start / name, folder / name)
        if resumed or start is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            # a small build, to try things out, needs no more than a small tokenizer
            self.tokenizer = make_tokenizer(self.demos, folder, samples=min(20_000, settings["tokens"] // 100))
        sizes = (settings[name] for name in ("hidden", "layers", "feed_forward", "seed"))
        self.model = make_model(len(self.tokenizer), *sizes)
        if start is not None:
            self.model.load_state_dict(LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
        self.probe = torch.nn.Linear(settings["hidden"], PROBES)
        self.probe_losses = torch.tensor(PROBE_LOSSES)
        # Muon for the matrices of the layers, AdamW for the embedding, the norms and the probe
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        rate = settings["learning_rate"]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([*others, *self.probe.parameters()], lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.losses: list[float] = []  # of each update
        self.probed: list[list[tuple[int, int]]] = []  # of each of the last updates: (right, all) by kind of probe
        self.model.train()
        self.body = torch.compile(self.model.model, dynamic=False) if compiled else self.model.model

    def save(self, checkpoint: Path) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.demos.rng.getstate(),
            "done": self.done,
            "step": self.step,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. InputError if it was saved with other settings."""
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != self.settings:
            raise InputError(
                f"a checkpoint with other settings: {state['settings']}",
                where=checkpoint,
                expected=str(self.settings),
                remedy="Remove it, or build in another folder",
            )
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.demos.rng.setstate(state["random"])
        self.done, self.step = state["done"], state["step"]

    def finish(self, folder: Path, seconds: int) -> dict:
        """Save the weights and build.json, and return what it holds."""
        # half precision halves the file; float16 rounds these weights eight times as finely as bfloat16
        self.model.to(torch.float16).save_pretrained(folder)
        summary = {
            **self.settings,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": round(_recent(self.losses), 4),
            "probes_right": self.probe_rates(),
            "seconds": seconds,
        }
        (folder / "build.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def set_learning_rate(self) -> None:
        """A warm-up, a long plateau, and a linear decay to zero over the last two fifths."""
        progress = self.done / self.settings["tokens"]
        scale = min(1.0, (self.step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.4)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.settings["learning_rate"] * scale

    def update(self, rows: list[Encoded]) -> None:
        """One optimizer step on the rows."""
        self.model.zero_grad(set_to_none=True)
        ids, weights, probes = self._batch(rows)
        # padding is on the right and attention is causal, so no mask is needed
        with torch.autocast("cpu", torch.bfloat16):
            states = self.body(input_ids=ids, use_cache=False, output_hidden_states=True)
            is_target = weights[:, 1:] > 0
            logits = self.model.lm_head(states.last_hidden_state[:, :-1][is_target])
            layer, row, position, kind = probes
            probed = torch.stack(states.hidden_states)[layer, row, position]
            readings = self.probe(functional.rms_norm(probed, (self.settings["hidden"],)))
        losses = functional.cross_entropy(logits.float(), ids[:, 1:][is_target], reduction="none")
        weights = weights[:, 1:][is_target]
        loss = (losses * weights).sum() / weights.sum()
        self.losses.append(loss.item())
        if len(readings):
            loss = loss + PROBE_WEIGHT * functional.cross_entropy(readings.float(), kind, weight=self.probe_losses)
            right, group = readings.argmax(1) == kind, kind.clamp(max=CATEGORY)
            counts = [(right[group == k].sum().item(), (group == k).sum().item()) for k in range(CATEGORY + 1)]
            self.probed = [*self.probed[-99:], counts]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += sum(len(row.ids) for row in rows)
        self.step += 1

    def _batch(self, rows: list[Encoded]):
        """(token ids, loss weights), both (rows, tokens), and (layer, row, position, kind) of the probes."""
        # few different shapes, so that each is compiled once; rows of padding alone weigh nothing
        width = _padded_width(max(len(row.ids) for row in rows))
        height = max(len(rows), BATCH_TOKENS // width)
        ids, weights, probes = torch.full((height, width), PAD), torch.zeros(height, width), []
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            weights[index, : len(row.ids)] = torch.tensor(row.weights)
            probes += [
                (min(PROBED_LAYERS[kind], self.settings["layers"]), index, position, kind)
                for position, kind in row.probes
            ]
        return ids, weights, torch.tensor(probes, dtype=torch.long).reshape(-1, 4).T

    def probe_rates(self) -> list[float]:
        """How often the probe was right of late: for each of the first seven, and for the categories together."""
        sums = [[sum(numbers) for numbers in zip(*column, strict=True)] for column in zip(*self.probed, strict=True)]
        return [round(right / max(1, total), 3) for right, total in sums]


def _recent(losses: list[float]) -> float:
    return sum(losses[-100:]) / max(1, len(losses[-100:]))
