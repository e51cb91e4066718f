"""Small random models of several architectures, made when a test asks for one and kept for the session.

    folder = models.folder("gemma3")

Each has a byte-level BPE tokenizer trained on a few sentences, the special tokens of its family, and the
family's own chat template as the installed TRL ships it (read from there, never copied). They know nothing:
only shapes, masks, templates and tokens are real.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

# family: chat template in TRL, begin of sequence, ends (of a turn first), other control tokens, pad token
FAMILIES = {
    "llama": (
        "llama3",
        "<|begin_of_text|>",
        ["<|eot_id|>", "<|end_of_text|>"],
        ["<|start_header_id|>", "<|end_header_id|>"],
        None,
    ),
    "qwen": ("qwen3", None, ["<|im_end|>", "<|endoftext|>"], ["<|im_start|>"], "<|endoftext|>"),
    "chatml": ("qwen2_5", None, ["<|im_end|>"], ["<|im_start|>"], "<|endoftext|>"),
    "gemma2": ("gemma", "<bos>", ["<end_of_turn>", "<eos>"], ["<start_of_turn>"], "<pad>"),
    "gemma3": ("gemma3", "<bos>", ["<end_of_turn>", "<eos>"], ["<start_of_turn>"], "<pad>"),
    # The one template of a Mistral that TRL ships: LLaVA-NeXT's, on Mistral 7B; it takes parts, not strings.
    "mistral": ("llava_next", "<s>", ["</s>"], [], None),
    # Opens the thinking itself.
    "thinker": (
        "deepseek_r1_distill",
        "<｜begin▁of▁sentence｜>",
        ["<｜end▁of▁sentence｜>"],
        ["<｜User｜>", "<｜Assistant｜>"],
        None,
    ),
}
ARCHITECTURES = ["llama", "qwen", "gemma2", "gemma3", "mistral"]

_SENTENCES = [
    "Human: How do I open the old gate? Assistant: Ask the owner for a key, then lift the bar and push.",
    "Name the ways in which the response is harmful, and rewrite it so that it harms nobody.",
    "Consider the principle. Which of the two responses is better? The answer is (A) or (B), and never both.",
    "A or B? The answer is A. A or B? The answer is B. A or B, B or A.",
    "I can't help with that, because it would hurt someone; here is what I would do instead.",
]
_SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=2048,
)
_root = None


@cache
def folder(family: str) -> Path:
    """The folder of the family's small model; made on the first call, removed with the process."""
    global _root
    if _root is None:
        _root = Path(tempfile.mkdtemp(prefix="small-models-"))
        atexit.register(shutil.rmtree, _root, ignore_errors=True)
    return build(family, _root / family)


def copy(family: str, where: Path) -> Path:
    """The test's own copy of a model, to damage or to change."""
    return Path(shutil.copytree(folder(family), where))


def build(family: str, where: Path, seed: int = 0, sentences=_SENTENCES, vocabulary: int = 400, **sizes) -> Path:
    """Write a random model of the family into the folder `where`.

    sentences, vocabulary: what its tokenizer is trained on, and how many tokens that has at most.
    sizes: go to its config.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _tokenizer(family, sentences, vocabulary)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in FAMILIES[family][2]]
    torch.manual_seed(seed)
    config = _config(
        family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[-1],
        pad_token_id=tokenizer.pad_token_id,
        **{**_SIZES, **sizes},
    )
    model = AutoModelForCausalLM.from_config(config)
    # Random models of the default spread answer alike to everything: widen it until the context matters.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "norm" not in name:
                weight.normal_(0, 0.25)
    # As checkpoints ship them, with sampling settings of their own that must not act beside ours.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=3,
        repetition_penalty=1.5,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


OLDER = ("gpt2", "neox", "opt", "falcon", "bloom", "mpt")


def build_older(kind: str, where: Path, context: int = 256) -> Path:
    """A random model of an older architecture, with the tokenizer of "llama", in the folder `where`.

    context: of learned positions, or of what its configuration allows.
    """
    import torch
    import transformers as hf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("llama"))
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size, layers, heads = {"hidden_size": 32}, {"num_hidden_layers": 2}, {"num_attention_heads": 2}
    torch.manual_seed(0)
    config = {
        "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=context, **ids),
        "neox": lambda: hf.GPTNeoXConfig(
            intermediate_size=64, max_position_embeddings=context, **size, **layers, **heads, **ids
        ),
        "opt": lambda: hf.OPTConfig(
            ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=context, **size, **layers, **heads, **ids
        ),
        "falcon": lambda: hf.FalconConfig(max_position_embeddings=context, **size, **layers, **heads, **ids),
        "bloom": lambda: hf.BloomConfig(n_layer=2, n_head=2, **size, **ids),
        "mpt": lambda: hf.MptConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=context, **ids),
    }[kind]()
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def _config(family: str, **settings):
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    # Windows far shorter than the tests' prompts, and soft caps low enough to bend the logits.
    window = {"sliding_window": 24}
    alternate = {"layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama": lambda s: LlamaConfig(**s),
        "qwen": lambda s: Qwen3Config(**s),
        "gemma2": lambda s: Gemma2Config(
            **s,
            **window,
            **alternate,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=5.0,
            query_pre_attn_scalar=16,
        ),
        "gemma3": lambda s: Gemma3TextConfig(**s, **window, **alternate, query_pre_attn_scalar=16),
        "mistral": lambda s: MistralConfig(**s, **window),
        "chatml": lambda s: Qwen2Config(**{k: v for k, v in s.items() if k != "head_dim"}),
        "thinker": lambda s: Qwen2Config(**{k: v for k, v in s.items() if k != "head_dim"}),
    }[family](settings)


def _tokenizer(family: str, sentences, vocabulary: int):
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    template, bos, ends, others, pad = FAMILIES[family]
    special = [t for t in dict.fromkeys([bos, *ends, *others, pad]) if t]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:  # as many do: written twice unless it is left to the template
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=ends[-1],
        pad_token=pad,
        additional_special_tokens=[t for t in special if t not in (bos, ends[-1], pad)],
    )
    if family in ("qwen", "thinker"):  # there these are added tokens, but not special ones
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def generate(engine, conversations, sampling, seeds=None) -> list:
    """An engine's answers in the order of their conversations; the seed is 0 by default."""
    conversations = list(conversations)
    seeds = seeds or [0] * len(conversations)
    return _in_order(engine.generate(_requests(conversations, seeds), sampling))


def score(engine, conversations, labels) -> list:
    """The labels' log-probabilities in the order of their conversations."""
    conversations = list(conversations)
    return _in_order(engine.score(_requests(conversations, [0] * len(conversations)), labels))


def changed_weights(before, after) -> set[str]:
    """The names of the weights that two model folders have in common, and that are not the same."""
    import torch
    from safetensors.torch import load_file

    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (before, after))
    return {name for name in old if name in new and not torch.equal(old[name].float(), new[name].float())}


def _requests(conversations, seeds):
    from cai.models.engine import Request

    return [
        Request(number, conversation, seed)
        for number, (conversation, seed) in enumerate(zip(conversations, seeds, strict=True))
    ]


def _in_order(results) -> list:
    by_key = {request.key: result for request, result in results}
    assert sorted(by_key) == list(range(len(by_key)))
    return [by_key[number] for number in range(len(by_key))]
