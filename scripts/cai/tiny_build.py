"""Builds the bundled model `tiny`: demonstrations of the world, a tokenizer, and a training loop.

    python scripts/tiny.py build --output tiny-new --seed 0

`tiny` is helpful only: its demonstrations comply with everything. Asked in the words of the templates,
with a principle in them, it criticises, revises, reasons, judges and classifies. Held-out acts occur in
none of its demonstrations. Leaves out validation against the oracle: that is what `evaluate.py` is for.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

from cai import world
from cai.constitution import Principle, load_constitution
from cai.errors import InputError
from cai.templates import load_template

SPECIAL = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))
VOCABULARY = 2304
# the loss on a label of a forced choice counts as much as a short sentence: it is all that such a row teaches
LABEL_WEIGHT = 6.0

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if not (loop.last and continue_final_message is defined and continue_final_message) %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Which categories each principle of harmlessness.yaml speaks of when it asks for a critique; all, unless
# it names some. Which manner of refusing it also objects to.
NARROW = {
    "crime": ("theft", "fraud", "vandalism", "violence", "threats", "hacking"),
    "people": ("violence", "threats", "insults", "slander", "spying"),
    "belongings-and-animals": ("theft", "vandalism", "hacking", "cruelty"),
}
MANNERS = {"plain-refusal": "preachy", "not-evasive": "evasive"}


@dataclass(frozen=True)
class Rule:
    """A principle, and what it means in this world."""

    principle: Principle
    critique_scope: tuple[str, ...]
    preference_scope: tuple[str, ...]
    manner: str = ""


def harmlessness_rules() -> list[Rule]:
    return [
        Rule(p, NARROW.get(p.id, world.HARM_NAMES), world.HARM_NAMES, MANNERS.get(p.id, ""))
        for p in load_constitution("harmlessness").principles
    ]


# So that the words decide and not the sentence: principles about any few categories, in several wordings.
SCOPED = (
    (
        "Find any help that the response gives with {}.",
        "Rewrite the response so that it gives no help with {}.",
        "Which response gives less help with {}?",
    ),
    (
        "Point out where the response is a guide to {}.",
        "Rewrite the response so that it is no guide to {}.",
        "Which response is less of a guide to {}?",
    ),
    (
        "Say where the response assists with {}, and with nothing else.",
        "Rewrite the response so that it does not assist with {}.",
        "Which response assists less with {}?",
    ),
    (
        "Say where the response does not follow this principle: never help with {}.",
        "Rewrite the response so that it follows this principle: never help with {}.",
        "Which response follows this principle better: never help with {}?",
    ),
    (
        "Does the response make {} easier? Say how.",
        "Rewrite the response so that it does not make {} easier.",
        "Which response makes {} less easy?",
    ),
)


def scoped_rule(rng: random.Random) -> Rule:
    names = rng.sample(world.HARM_NAMES, rng.choice((1, 2, 3, 3, 3, 4, 5, 6)))
    spoken = [world.SPOKEN[n] for n in names]
    text = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " or " + spoken[-1]
    critique, revision, preference = (s.format(text) for s in rng.choice(SCOPED))
    return Rule(Principle("scoped", critique, revision, preference), tuple(names), tuple(names))


# ---------------------------------------------------------------- demonstrations


class Demonstrations:
    """An endless stream of (messages, target, weight): what `tiny` is taught, drawn from one seed."""

    TASKS = ("respond", "critique", "revise", "judge", "classify", "critique_cot", "preference_cot", "judge_cot")

    def __init__(self, seed: int):
        self.rng = random.Random(f"tiny/{seed}")
        self.rules = harmlessness_rules()
        names = ("critique", "critique_cot", "revise", "preference", "preference_cot", "classify")
        self.templates = {name: load_template(name) for name in names}

    def draw(self, task: str) -> tuple[list[dict], str, float]:
        return getattr(self, f"_{task}")()

    # what there is to talk about

    def _scene(self, harmful=0.6, benign=0.22) -> tuple[world.Act, dict]:
        point = self.rng.random()
        kind = "harmful" if point < harmful else "benign" if point < harmful + benign else "borderline"
        act = world.draw_act(self.rng, kind, held_out=False)
        row = {
            "prompt": world.ask(self.rng, act),
            "kind": kind,
            "category": act.category.name,
            "verb": act.verb,
            "object": act.object,
        }
        return act, row

    def _rule(self) -> Rule:
        return self.rng.choice(self.rules) if self.rng.random() < 0.55 else scoped_rule(self.rng)

    def _slip(self, act: world.Act, style: str) -> str:
        """A response of the style with a slip of the kind that a small model makes."""
        kind = act.category.kind
        if self.rng.random() < 0.3:
            other = world.draw_act(self.rng, kind, held_out=False)
        elif self.rng.random() < 0.6:
            noun = world.draw_act(self.rng, kind, held_out=False, category=act.category).noun
            other = world.Act(act.category, act.verb, noun, act.adjective)
        else:
            other = world.Act(
                act.category, self.rng.choice(act.category.verbs or world.HARMS[0].verbs), act.noun, act.adjective
            )
        if other.held_out:
            return self._slip(act, style)
        right, wrong = world.respond(self.rng, act, style), world.respond(self.rng, other, style)
        if self.rng.random() < 0.5:
            return wrong
        # the first sentence of one with the rest of the other
        head, _, _ = right.partition(". ")
        _, _, tail = wrong.partition(". ")
        return (
            f"{head}. {tail}"
            if tail and self.rng.random() < 0.7
            else wrong.partition(". ")[0] + ". " + right.partition(". ")[2]
        )

    def _response(self, act: world.Act, styles: str) -> tuple[str, str]:
        style = self.rng.choice(styles.split())
        if style == "slip":
            return "slip", self._slip(act, self.rng.choice(("comply", "good")))
        return style, world.respond(self.rng, act, style)

    # the tasks

    def _respond(self):
        act, row = self._scene(harmful=0.4, benign=0.35)
        partial = act.category.kind == "harmful" and self.rng.random() < 0.08
        return _ask(row["prompt"]), world.respond(self.rng, act, "partial" if partial else "comply"), 1.0

    def _verdict(self, rule: Rule, act: world.Act, row: dict, style: str, response: str) -> tuple[str, str]:
        """(fault, critique): fault is "harm", "manner" or ""."""
        harm = act.category.kind == "harmful"
        name = world.SPOKEN.get(act.category.name, act.category.name)
        outcome = world.classify(row, response)
        if harm and outcome in ("comply", "partial"):
            if act.category.name in rule.critique_scope:
                return "harm", (
                    f"The response helps to {act.text}, and that is {name}. "
                    "It should decline, say why and offer another way."
                )
            return "", f"The response helps to {act.text}, but the principle does not speak of {name}. No fault."
        if rule.manner and (style == rule.manner or (harm and outcome == rule.manner)):
            word = "scolds instead of declining with respect" if rule.manner == "preachy" else "dodges the question"
            if harm:
                return "manner", f"The response {word}. It should decline, say why and offer another way."
            return "manner", f"The response {word}. It should help, since to {act.text} harms nobody."
        if harm:
            return "", f"The response does not help to {act.text}. No fault."
        return "", f"To {act.text} harms nobody. No fault."

    def _criticised(self):
        act, row = self._scene()
        rule = self._rule()
        styles = (
            "comply comply comply comply partial good good evasive preachy slip"
            if act.category.kind == "harmful"
            else "comply comply comply comply comply slip evasive preachy good"
        )
        style, response = self._response(act, styles)
        fault, critique = self._verdict(rule, act, row, style, response)
        return act, row, rule, response, fault, critique

    def _critique(self):
        _, row, rule, response, _, critique = self._criticised()
        return (
            self.templates["critique"].render(principle=rule.principle, prompt=row["prompt"], response=response),
            critique,
            1.0,
        )

    def _critique_cot(self):
        act, row, rule, response, _, critique = self._criticised()
        does = self._does(row, response)
        kind = f"this is {world.SPOKEN[act.category.name]}" if act.category.kind == "harmful" else "this harms nobody"
        reasoning = f"The person asks how to {act.text}; {kind}. The response {does}. {critique}"
        return (
            self.templates["critique_cot"].render(principle=rule.principle, prompt=row["prompt"], response=response),
            reasoning,
            1.0,
        )

    def _revise(self):
        act, row, rule, response, fault, critique = self._criticised()
        target = response
        if fault:
            target = world.respond(self.rng, act, "good" if act.category.kind == "harmful" else "comply")
        messages = self.templates["revise"].render(
            principle=rule.principle, prompt=row["prompt"], response=response, critique=critique
        )
        return messages, target, 1.0

    def _does(self, row: dict, response: str) -> str:
        """What a response does, in a few words (for reasoning)."""
        act, outcome = world.act_of(row), world.classify(row, response)
        found = world.read(response)
        if outcome in ("comply", "partial", "helpful"):
            return f"helps to {act.text}"
        if outcome == "good" or (outcome == "refused" and found.declined == act.text):
            return f"declines to {act.text} and says why"
        if outcome == "preachy" or found.preached:
            return "preaches"
        if outcome == "evasive" or found.dodged:
            return "dodges the question"
        return "misses the point"

    def _compared(self):
        while True:
            act, row = self._scene(harmful=0.62, benign=0.22)
            rule = self._rule()
            styles = "comply comply partial good good good evasive preachy slip slip"
            if act.category.kind != "harmful":
                styles = "comply comply comply good evasive preachy slip slip"
            (_, a), (_, b) = self._response(act, styles), self._response(act, styles)
            tier_a, tier_b = (world.tier(row, r, rule.preference_scope) for r in (a, b))
            if tier_a != tier_b:
                return row, rule, a, b, "A" if tier_a > tier_b else "B"

    def _judge(self):
        row, rule, a, b, label = self._compared()
        messages = self.templates["preference"].render(
            principle=rule.principle, prompt=row["prompt"], response_a=a, response_b=b, reasoning=""
        )
        return messages, f"{label})", LABEL_WEIGHT

    def _reasoned(self, row, rule, a, b, label) -> str:
        spoken = world.SPOKEN.get(row["category"])
        if row["kind"] == "harmful" and row["category"] in rule.preference_scope:
            ground = f"The principle speaks against {spoken}"
        elif row["kind"] == "harmful":
            ground = f"The principle does not speak of {spoken}"
        else:
            ground = "The request harms nobody"
        return (
            f"Response A {self._does(row, a)}. Response B {self._does(row, b)}. {ground}. "
            f"The better response is {label}."
        )

    def _preference_cot(self):
        row, rule, a, b, label = self._compared()
        messages = self.templates["preference_cot"].render(
            principle=rule.principle, prompt=row["prompt"], response_a=a, response_b=b
        )
        return messages, self._reasoned(row, rule, a, b, label), 1.0

    def _judge_cot(self):
        row, rule, a, b, label = self._compared()
        messages = self.templates["preference"].render(
            principle=rule.principle,
            prompt=row["prompt"],
            response_a=a,
            response_b=b,
            reasoning=self._reasoned(row, rule, a, b, label),
        )
        return messages, f"{label})", LABEL_WEIGHT

    def _classify(self):
        act, row = self._scene(harmful=0.5, benign=0.25)
        while True:
            _, response = self._response(act, "comply comply partial good good evasive preachy slip slip")
            outcome, found = world.classify(row, response), world.read(response)
            about_another = (found.promised or found.declined or act.text) != act.text
            if outcome in ("comply", "partial") and about_another:
                continue  # help with another harmful act: harmful, and beside the point; two letters would fit
            letter = {
                "comply": "A",
                "partial": "A",
                "helpful": "A",
                "good": "B",
                "evasive": "C",
                "preachy": "D",
                "off_topic": "E",
            }.get(outcome)
            if outcome == "refused":
                if about_another:
                    letter = "E"
                else:
                    letter = (
                        "D" if found.preached else "C" if found.dodged or not (found.reasons and found.offers) else "B"
                    )
            messages = self.templates["classify"].render(prompt=row["prompt"], response=response)
            return messages, f"{letter})", LABEL_WEIGHT


def _ask(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


# ---------------------------------------------------------------- tokenizer, model, training


def make_tokenizer(demos: Demonstrations, folder: Path, samples: int = 20_000):
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on demonstrations and saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts():
        for index in range(samples):
            messages, target, _ = demos.draw(demos.TASKS[index % len(demos.TASKS)])
            yield "\n".join([*(m["content"] for m in messages), target])
            if index % 10 == 0:
                # every word of the world often enough to become one token: a word in pieces is hard to copy
                yield " " + " ".join(world.words())

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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
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


def encode(tokenizer, demos: list[tuple]) -> list[tuple[list[int], list[float]]]:
    """Token ids and a loss weight for each: 0 on everything that is not the target of the last turn."""
    prefixes, targets = [], []
    for messages, target, _ in demos:
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        asked = messages[:-1] if begun else messages
        text = SPECIAL[BOS] + "".join(f"<|{m['role']}|>{m['content']}{SPECIAL[END]}" for m in asked)
        prefixes.append(text + SPECIAL[ASSISTANT] + begun)
        targets.append(target)
    rows = []
    encoded = zip(
        tokenizer(prefixes, add_special_tokens=False)["input_ids"],
        tokenizer(targets, add_special_tokens=False)["input_ids"],
        demos,
        strict=True,
    )
    for prefix, target, (_, _, weight) in encoded:
        # a label's weight is for its first token, the letter
        weights = [0.0] * len(prefix) + [weight] + [1.0] * len(target)
        if weight != 1.0:
            weights = [0.0] * len(prefix) + [weight, 0.1, 0.1]
        ids = [*prefix, *target, END]
        rows.append((ids, weights[: len(ids)]))
    return rows


# share of tokens by task: at first mostly speaking (and so copying), then everything
FIRST_TOKENS = 2_640_000
FIRST = {"respond": 0.55, "revise": 0.25, "critique": 0.2}
THEN = {
    "respond": 0.14,
    "critique": 0.18,
    "revise": 0.22,
    "judge": 0.32,
    "classify": 0.05,
    "critique_cot": 0.02,
    "preference_cot": 0.05,
    "judge_cot": 0.02,
}
LENGTHS = {
    "respond": 55,
    "critique": 122,
    "revise": 161,
    "judge": 150,
    "classify": 157,
    "critique_cot": 157,
    "preference_cot": 182,
    "judge_cot": 183,
}


def batches(demos: Demonstrations, tokenizer, shares: dict[str, float], tokens: int):
    """Endless lists of encoded rows, each of about `tokens` tokens and of like length."""
    tasks = list(shares)
    weights = [shares[t] / LENGTHS[t] for t in tasks]
    while True:
        drawn = [demos.draw(demos.rng.choices(tasks, weights)[0]) for _ in range(2000)]
        rows = sorted(encode(tokenizer, drawn), key=lambda row: len(row[0]))
        groups, group = [], []
        for row in rows:
            if group and len(row[0]) * (len(group) + 1) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        demos.rng.shuffle(groups)
        yield from groups


def build(
    output: str,
    *,
    seed: int,
    tokens: int,
    hidden: int,
    layers: int,
    feed_forward: int,
    learning_rate: float,
    threads: int,
    report,
) -> dict:
    """Train `tiny` from its seed and save it in `output`; resumes from the checkpoint there.

    Args:
        tokens: training tokens in all (targets and what is read before them).
        report: called with a line of text now and then.

    Returns a dict of what was done, saved as build.json beside the weights.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": seed,
        "tokens": tokens,
        "hidden": hidden,
        "layers": layers,
        "feed_forward": feed_forward,
        "learning_rate": learning_rate,
    }
    demos = Demonstrations(seed)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        # a small build, to try things out, needs no more than a small tokenizer
        tokenizer = make_tokenizer(demos, folder, samples=min(20_000, tokens // 100))
    model = make_model(len(tokenizer), hidden, layers, feed_forward, seed)
    # Muon for the matrices of the layers, AdamW for the embedding and the norms
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    per_batch, per_step = 4096, 2  # a step mixes two batches of different lengths
    done = step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise InputError(
                f"a checkpoint with other settings: {state['settings']}",
                where=checkpoint,
                expected=str(settings),
                remedy="Remove it, or build in another folder",
            )
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        demos.rng.setstate(state["random"])
        done, step = state["done"], state["step"]
    streams = {
        name: batches(demos, tokenizer, shares, per_batch) for name, shares in (("first", FIRST), ("then", THEN))
    }
    started, saved = time.time(), time.time()
    losses: dict[str, list] = {"first": [], "then": []}
    model.train()
    while done < tokens:
        # warm-up, a long plateau, and a fall to nothing over the last two fifths
        progress = done / tokens
        scale = min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.4)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate * scale
        stream = "first" if done < FIRST_TOKENS else "then"
        model.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(per_step):
            rows = next(streams[stream])
            width = max(len(ids) for ids, _ in rows)
            ids = torch.full((len(rows), width), PAD)
            weights = torch.zeros(len(rows), width)
            for index, (row_ids, row_weights) in enumerate(rows):
                ids[index, : len(row_ids)] = torch.tensor(row_ids)
                weights[index, : len(row_ids)] = torch.tensor(row_weights)
            # padding is on the right and attention is causal, so no mask is needed
            hidden_states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            where = weights[:, 1:] > 0
            logits = model.lm_head(hidden_states[:, :-1][where])
            loss = functional.cross_entropy(logits, ids[:, 1:][where], reduction="none")
            w = weights[:, 1:][where]
            loss = (loss * w).sum() / w.sum() / per_step
            loss.backward()
            total += loss.item()
            done += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        losses[stream].append(total)
        if step % 50 == 0:
            recent = losses[stream][-50:]
            report(
                f"step {step}  {done / 1e6:.2f} of {tokens / 1e6:.1f} M tokens  loss {sum(recent) / len(recent):.4f}  "
                f"{time.time() - started:.0f} s"
            )
        if time.time() - saved > 60:
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "random": demos.rng.getstate(),
                "done": done,
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            saved = time.time()
    recent = losses["then"][-100:]
    if recent and not math.isfinite(sum(recent)):
        raise InputError("the loss is not a number", where=output, remedy="Lower --learning-rate")
    # half precision halves the file; float16 rounds these weights eight times as finely as bfloat16
    model.to(torch.float16).save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    summary = {
        **settings,
        "steps": step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(sum(recent) / max(1, len(recent)), 4),
        "seconds": round(time.time() - started),
    }
    (folder / "build.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
