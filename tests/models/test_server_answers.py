"""What servers send beside the text: finish reasons, control tokens in the content, counts of tokens."""

import json
import math

import pytest
from canned_server import CannedServer

from cai.data.dialogue import cut_at_end_token
from cai.models.server_answers import read_finish
from cai.models.servers import load_server

PROMPTS = [{"id": name, "prompt": f"How do I oil the hinge of door {name}?"} for name in ("a", "b")]
COUNTS = {"prompt_tokens": 12, "completion_tokens": 7}


def choice(finish, text="Two drops on the pin.", **more) -> dict:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": text}, **more}


def generate(invoke, tmp_path, answer, *more):
    """(result, rows, manifest) of generate.py with a server that always gives this answer."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    with CannedServer(answer, COUNTS) as server:
        result = invoke(
            *("generate", "--input", prompts, "--output", output, "--model", "openai:x", "--endpoint", server.address),
            *more,
        )
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return result, rows, json.loads((tmp_path / "out.jsonl.run.json").read_text())


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("stop", "stop"),  # OpenAI
        ("eos_token", "stop"),  # TGI
        ("stop_sequence", "stop"),  # TGI, Anthropic
        ("end_turn", "stop"),  # Anthropic
        ("COMPLETE", "stop"),  # Cohere
        ("eos", "stop"),  # Together
        ("STOP", "stop"),  # Gemini
        ("FINISH_REASON_STOP", "stop"),  # Vertex
        ("<|im_end|>", "stop"),  # servers that name the token that stopped
        ("</s>", "stop"),
        ("length", "length"),
        ("MAX_TOKENS", "length"),  # Gemini, Cohere
        ("max_tokens", "length"),  # Anthropic
        ("model_length", "length"),  # Mistral
        ("max_output_tokens", "length"),  # OpenAI's responses
        ("model_context_window_exceeded", "length"),  # Anthropic
        ("content_filter", "failed"),  # OpenAI
        ("content_filter: PROHIBITED_CONTENT", "failed"),  # a proxy in front of Gemini
        ("SAFETY", "failed"),  # Gemini
        ("RECITATION", "failed"),  # Gemini
        ("refusal", "failed"),  # Anthropic
        ("abort", "failed"),  # vLLM, SGLang
        ("error", "failed"),  # OpenRouter, Mistral
        ("insufficient_system_resource", "failed"),  # DeepSeek
        ("load", "failed"),  # Ollama, where the model was only loaded
        ("tool_calls", "failed"),  # OpenAI
        ("", "failed"),
        (None, "failed"),
        (0, "failed"),
    ],
)
def test_only_a_stop_is_a_stop(reason, finish):
    """The values are those of the API references of the makers named (read in 2026), of vLLM's `FinishReason` and of
    llama.cpp's, Ollama's and TGI's servers."""
    found, explanation = read_finish({"finish_reason": reason})
    assert found == finish
    assert bool(explanation) == (finish == "failed") and (
        not reason or finish != "failed" or str(reason) in explanation
    )


def test_a_failed_answer_is_a_failed_row_with_its_reason(invoke, tmp_path):
    """OpenRouter's documentation, "Error Handling": an error after the first token has `finish_reason: "error"`, with
    the provider's message in the choice."""
    broken = choice("error", "Two dro", error={"code": 502, "message": "Provider went away"})
    result, rows, manifest = generate(invoke, tmp_path, broken)
    assert result.exit_code == 3 and not rows
    assert manifest["counts"]["failed"] == 2
    assert all(
        'the server\'s finish reason is "error"' in reason and "Provider went away" in reason
        for reason in manifest["failed_rows"].values()
    )
    assert "went away" in result.stderr and "Traceback" not in result.stderr


def test_an_answer_cut_by_another_name_is_unfinished(invoke, tmp_path):
    result, rows, manifest = generate(invoke, tmp_path, choice("MAX_TOKENS", "Two drops on"))
    assert result.exit_code == 0 and [row["finish"] for row in rows] == ["length", "length"]
    assert manifest["counts"]["unfinished"] == 2


@pytest.mark.parametrize(
    ("content", "response"),
    [
        ("Two drops.<|im_end|>", "Two drops."),  # ChatML
        ("Two drops.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnd wipe it.", "Two drops."),  # Llama 3
        ("Two drops. \n<end_of_turn>\n<start_of_turn>user\nThanks", "Two drops."),  # Gemma
        ("Two drops.</s>", "Two drops."),  # Mistral
        ("Two drops.<|end|>", "Two drops."),  # Phi
        ("Two drops.<｜end▁of▁sentence｜>", "Two drops."),  # DeepSeek
        ("Two drops.<|END_OF_TURN_TOKEN|>", "Two drops."),  # Command R
        ("Two drops.[|endofturn|]", "Two drops."),  # EXAONE
        ("Two drops.<|eot|>", "Two drops."),  # Llama 4
        ("Two drops.<turn|>", "Two drops."),  # Gemma 4
        ("Two drops.\n<|user|>\nThanks", "Two drops."),  # Zephyr, GLM
        ("Two drops.<|return|>", "Two drops."),  # gpt-oss
        ("<|im_start|>assistant\nTwo drops.<|im_end|>", "Two drops."),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nTwo drops.", "Two drops."),
        ("[/INST] Two drops.</s>", "Two drops."),
        ("<s> Two drops.</s>", "Two drops."),
        ("It was <s>three</s> two drops.", "It was <s>three</s> two drops."),  # HTML
        ("Use <b>two</b> drops, a < b and c|d.", "Use <b>two</b> drops, a < b and c|d."),
        ("Two drops.", "Two drops."),
    ],
)
def test_an_answer_ends_at_the_first_end_token(content, response):
    """The spellings are those of the families' chat templates. That servers send them: vllm-project/vllm #4180 and
    #9320 (Llama 3's `<|eot_id|>` in the text), OpenBMB/MiniCPM-V #373 (dozens of them), vllm-project/vllm #1183
    (`<|end|>` of StarChat, whose config.json names another end)."""
    assert cut_at_end_token(content).strip() == response


def test_an_end_token_does_not_reach_the_row(invoke, tmp_path):
    """vLLM's documentation of `skip_special_tokens` and `include_stop_str_in_output`: either puts it there."""
    result, rows, _ = generate(invoke, tmp_path, choice("stop", "Two drops.<|im_end|>\n<|im_start|>user\nThanks!"))
    assert result.exit_code == 0 and [row["response"] for row in rows] == ["Two drops."] * 2


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},  # the same for every question
        {"prompt_tokens": None, "completion_tokens": None},
        None,
        lambda body: {"prompt_tokens": 6 + 4 * len(body["messages"]), "completion_tokens": 1},  # closes the prefill
    ],
)
def test_a_count_that_proves_nothing_is_no_proof(invoke, tmp_path, usage):
    """neuralmagic/deepsparse #1496: usage was 2 tokens for every question; anomalyco/opencode #423: no usage from some
    local servers."""
    pairs = [{"id": "p", "prompt": "How?", "response_a": "Two drops.", "response_b": "No."}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    listed = [{"token": token, "logprob": math.log(p)} for token, p in (("The", 0.5), ("A", 0.2), ("B", 0.1))]

    def answer(body):
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]} if body.get("logprobs") else None
        return choice("length", "A", logprobs=logprobs)

    with CannedServer(answer, usage) as server:
        result = invoke(
            *("judge", "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "out.jsonl"),
            *("--model", "openai:x", "--endpoint", server.address),
        )
        questions = [body for body in server.requests if body.get("logprobs")][1:]
    assert result.exit_code == 0, result.stderr
    assert "can't go on from a prefilled answer" in result.stderr
    assert questions and all(body["messages"][-1]["role"] == "user" for body in questions)
    assert all("(" in body["messages"][-1]["content"][-20:] for body in questions)


def test_positive_counts_are_proof():
    def usage(body):
        last = body["messages"][-1]
        is_open = last["role"] == "assistant" and body.get("continue_final_message")
        words = sum(len(message["content"].split()) for message in body["messages"])
        return {"prompt_tokens": 8 + words + (0 if is_open else 4 * len(body["messages"]) - 4), "completion_tokens": 1}

    from cai.models.engine import Request, Sampling

    conversation = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "With"}]
    with CannedServer(choice("stop", "oil."), usage) as server:
        engine = load_server("openai:x", endpoints=[server.address])
        [(_, generation)] = engine.generate([Request("a", conversation)], Sampling(8))
        assert generation.text == "oil."
        assert server.requests[-1]["messages"][-1] == {"role": "assistant", "content": "With"}
