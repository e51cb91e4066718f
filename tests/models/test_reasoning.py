"""Reasoning cut out of answers, in the spellings of many families."""

import pytest

from cai.models.reasoning import THINKING, closing_tag, has_reasoning_tag, strip_thinking


@pytest.mark.parametrize(
    "text",
    [
        "<think>So: oil.</think>\n\nTwo drops.",  # DeepSeek-R1, Qwen3, QwQ, GLM
        "So: oil.\n</think>\n\nTwo drops.",  # where the template opens it
        "<think>\n<think>So</think>Two drops.",  # opened by the template and by the model
        "<thinking>So <reflection>no</reflection></thinking><output>Two drops.</output>",  # Reflection-70B
        "<Thought>So</Thought>\n<Output>Two drops.</Output>",  # Marco-o1
        "<thought>\nSo\n</thought>\nTwo drops.",  # EXAONE Deep, Gemini's OpenAI-compatible API
        "So\n</thought>\n\nTwo drops.",
        "<seed:think>So <seed:cot_budget_reflect>9</seed:cot_budget_reflect></seed:think>Two drops.",  # Seed-OSS
        "<longcat_think>So</longcat_think>Two drops.",  # LongCat-Flash-Thinking
        "[THINK]So[/THINK]Two drops.",  # Magistral
        "◁think▷So◁/think▷Two drops.",  # Kimi-VL-Thinking
        "<|START_THINKING|>So<|END_THINKING|><|START_RESPONSE|>Two drops.<|END_RESPONSE|>",  # Command A Reasoning
        "<|begin_of_thought|>So<|end_of_thought|>\n\n<|begin_of_solution|>Two drops.<|end_of_solution|>",  # Sky-T1
        "<|channel|>analysis<|message|>So<|end|><|start|>assistant<|channel|>final<|message|>Two drops.",  # gpt-oss
        "analysisWe need oil.assistantfinalTwo drops.",  # the same without its control tokens
        "<|channel>thought\nSo<channel|>Two drops.",  # Gemma 4
        "<|think|>So<|end|><|begin|>assistant<|content|>Two drops.",  # Solar Open
        "<unused94>thought\nSo<unused95>Two drops.",  # MedGemma 1.5
        "<|inner_prefix|>So<|inner_suffix|>Two drops.",  # Apertus
        "Here is my thought process:\n\nSo\n\nHere is my response:\n\nTwo drops.",  # Granite 3.2
        "<reasoning>So</reasoning>\n<answer>\nTwo drops.\n</answer>",  # the usual GRPO recipes
        "<scratch_pad>So</scratch_pad>Two drops.",  # Hermes 3
        "<SCRATCHPAD_REASONING>So</SCRATCHPAD_REASONING>Two drops.",
        '<details type="reasoning" done="true">So</details>\nTwo drops.',  # Open WebUI
        "<analysis>So</analysis><reflection>Yes</reflection>Two drops.",  # several, one after the other
        "<chain_of_thought>So</chain_of_thought>Two drops.",
        "Two drops.",
    ],
)
def test_a_block_of_reasoning_is_cut_out(text):
    """The spellings are those of the models' chat templates and cards named beside them, and of the reasoning parsers
    in vLLM's documentation ("Reasoning Outputs") and SGLang's ("Reasoning Parser")."""
    answer = strip_thinking(text).strip()
    assert answer == "Two drops." and not has_reasoning_tag(answer)


@pytest.mark.parametrize("opening", [*(opening for opening, _ in THINKING), "<thought>", "<reasoning>", "<|thinking|>"])
def test_reasoning_that_was_cut_off_is_no_answer(opening):
    assert strip_thinking(f"{opening} So: oil, but wh").strip() == ""


@pytest.mark.parametrize(
    "text",
    [
        "I think so. <b>Two</b> drops <i>of oil</i>.",
        "<answer>Two drops.</answer>",
        "<response>Two drops.</response>",
        "A tag <thinker> is none, [Reasoning] is a heading, and analysis of the final text is a phrase.",
        "analysis: two drops",
        "1 < 2 and <|x|> and </p>",
    ],
)
def test_other_text_stays(text):
    assert strip_thinking(text) == text and not has_reasoning_tag(text)


def test_a_pair_of_your_own():
    tags = [("<<hm>>", "<</hm>>")]
    assert strip_thinking("<<hm>>So<</hm>>Two drops.", tags=tags) == "Two drops."
    assert strip_thinking("So<</hm>>Two drops.", tags=tags) == "Two drops."
    assert strip_thinking("<<hm>>So", tags=tags) == ""
    assert closing_tag("<|assistant|><<hm>>\n", tags) == "<</hm>>"


@pytest.mark.parametrize(
    ("prompt_end", "closing"),
    [
        ("<｜Assistant｜><think>\n", "</think>"),  # DeepSeek-R1
        ("[|assistant|]<thought>\n", "</thought>"),  # EXAONE Deep
        ("<|im_start|>assistant\n<seed:think>", "</seed:think>"),
        ("<|im_assistant|>assistant<|im_middle|>◁think▷", "◁/think▷"),  # Kimi-VL-Thinking
        ("<|assistant|><|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|assistant|><|start_reasoning|>", "<|end_reasoning|>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None),  # Qwen3 with the thinking switched off
        ("<|assistant|>\n", None),
    ],
)
def test_what_closes_the_block_that_a_prompt_opens(prompt_end, closing):
    assert closing_tag(prompt_end) == closing


def test_a_leftover_tag_is_seen():
    for text in ("Two </think> drops", "Two <reasoning> drops", "Two drops [/THINK]", "Two <|end_of_thought|>"):
        assert has_reasoning_tag(text), text
