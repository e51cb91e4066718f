"""Policies of one layer over a handful of words, on which reinforcement learning takes seconds.

chat, make = toys.indifferent(["a", "b"])     # knows nothing: every token is about as likely as any other
chat, make = toys.talker(words)               # answers with a few random words and an end
"""

from functools import cache
from itertools import repeat

import torch

from cai.models.chat import Chat
from cai.train import common

CONTROL = ["<pad>", "<end>", "<user>", "<assistant>"]


def chat_of(words) -> Chat:
    """A chat over whole words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokens = {token: i for i, token in enumerate([*CONTROL, *words])}
    backend = Tokenizer(WordLevel(tokens, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return Chat(tokenizer, "a few words")


def policy(size: int, seed: int, hidden: int = 16):
    """An untrained model of one layer over `size` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def indifferent(words):
    """(chat, seed -> policy) of policies that know nothing."""
    return chat_of(words), lambda seed: policy(len(CONTROL) + len(words), seed)


@cache
def talker(words: tuple[str, ...], end: float = 0.2):
    """(chat, seed -> policy) of one policy, trained to say random words, each the last by a chance of `end`."""
    chat, size = chat_of(words), len(CONTROL) + len(words)
    model = policy(size, 0, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(120):
        prompts = torch.stack(
            [torch.full((64,), 2), torch.randint(4, size, (64,), generator=draw), torch.full((64,), 3)], 1
        )
        said = torch.randint(4, size, (64, 24), generator=draw)
        over = torch.rand(64, 24, generator=draw) < end
        over[:, 0] = False
        ended = (over.cumsum(1) - over.long()) > 0  # after the first end
        ids = torch.cat([prompts, torch.where(over, 1, said)], 1)
        labels = torch.cat([torch.full_like(prompts, -100), torch.where(ended, -100, ids[:, 3:])], 1)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()

    def make(_seed=0):
        made = policy(size, 0, hidden=32)
        made.load_state_dict(state)
        return made

    return chat, make


def prompts_of(words) -> list[list[dict]]:
    """One prompt for each word."""
    return [[{"role": "user", "content": word}] for word in words]


def trainer(
    output,
    chat,
    make,
    reward,
    *,
    seed=0,
    prompts=None,
    reference=None,
    save_every=0,
    value_model=None,
    watch=None,
    judge=None,
    selection=(),
    kinds=None,
    **settings,
):
    """A trainer on the CPU with a value head."""
    from cai.train.ppo import PolicyAndValue, PPOTrainer, Settings
    from cai.train.prompts import encode_prompts

    settings = Settings(
        **{
            "updates": 20,
            "prompts_per_update": 64,
            "batch_size": 64,
            "epochs": 2,
            "minibatches": 1,
            "learning_rate": 1e-2,
            "max_new_tokens": 24,
            "missing_eos_penalty": 0.0,
            "temperature": 1.0,
            "samples_every": 100,
            "seed": seed,
            **settings,
        }
    )
    model = PolicyAndValue(make(seed), value_model, temperature=settings.temperature, kl_coef=settings.kl_coef)
    arguments = common.trainer_arguments(
        output,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        save_steps=save_every,
        seed=seed,
        device="cpu",
    )
    prompts = prompts or [[{"role": "user", "content": "go"}]]
    rows = [{"prompt": prompt, "kind": kind} for prompt, kind in zip(prompts, kinds or repeat(None), strict=False)]
    prompts = encode_prompts(rows, chat, model.policy, settings.max_new_tokens)
    return PPOTrainer(
        model,
        prompts,
        chat,
        reward,
        settings,
        arguments,
        output,
        reference or make(seed),
        watch=watch,
        judge=judge,
        selection=selection,
    )
