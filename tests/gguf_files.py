"""GGUF files of small Llama models, written with llama.cpp's own package (`gguf`), which the caller must have.

    file = gguf_files.write(models.folder("llama"), tmp_path / "small.gguf")

By default the weights stay in float32, so that what is read back can be compared with the folder exactly.
"""

import json
from pathlib import Path


def write(folder: Path, file: Path, *, architecture: str = "llama", template: bool = True, packed: str = "") -> Path:
    """Write the Llama model of a folder, with its tokenizer, as one GGUF file.

    Args:
        architecture: what the file says it is. template: whether it has the chat template.
        packed: matrices with this in their names are stored in 8 bits (Q8_0).
    """
    import gguf
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, tokenizer, json.loads((folder / "tokenizer.json").read_text()), template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weights in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            weights = _interleave(weights, heads if "q_proj" in name else key_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if packed and packed in name else None
        weights = weights if kind is None else gguf.quants.quantize(weights, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weights, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer, tokenizer, files: dict, template: bool) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.all_special_tokens) | {t["content"] for t in files["added_tokens"] if t["special"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in files["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)


def _interleave(weights, heads: int):
    """The rows of a query or key matrix as llama.cpp's rotary embedding pairs them: halves of each head interleaved."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
