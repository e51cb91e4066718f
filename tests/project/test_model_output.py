"""What models write, by the thousand: the answer comes through as it was, whatever stands around it.

pytest tests/project/test_model_output.py                                   # a fast share
BAD_INPUT_EXAMPLES=10000 pytest tests/project/test_model_output.py          # the long run
"""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.data.dialogue import cut_at_end_token
from cai.models.reasoning import THINKING, closing_tag, has_reasoning_tag, strip_thinking
from cai.models.server_answers import read_finish, without_thinking

EXAMPLES = int(os.environ.get("BAD_INPUT_EXAMPLES", "200"))

many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

WORDS = (
    "think",
    "thinking",
    "thought",
    "thoughts",
    "reasoning",
    "reason",
    "reflection",
    "analysis",
    "scratchpad",
    "cot",
)
PREFIXES = ("", "seed:", "longcat_", "my-", "x.")
PAIRS = st.one_of(
    st.sampled_from([pair for pair in THINKING if "channel" not in pair[0]]),
    st.builds(
        lambda prefix, word: (f"<{prefix}{word}>", f"</{prefix}{word}>"),
        st.sampled_from(PREFIXES),
        st.sampled_from(WORDS),
    ),
    st.builds(lambda word: (f"<|begin_of_{word}|>", f"<|end_of_{word}|>"), st.sampled_from(WORDS)),
    st.builds(lambda word: (f"<|{word}_start|>", f"<|{word}_end|>"), st.sampled_from(WORDS)),
    st.builds(lambda word: (f"◁{word}▷", f"◁/{word}▷"), st.sampled_from(WORDS)),
)
# Text as models write it, with signs that tags are made of, but no tag.
PLAIN = st.text(st.sampled_from("ab .,\n'*#&/|<é漢🙂-"), max_size=40).filter(
    lambda text: not has_reasoning_tag(text) and cut_at_end_token(text) == text and "<s" not in text
)
ANSWERS = PLAIN.filter(lambda text: text.strip() and text.strip()[0] not in "<[◁")
ENDS = st.sampled_from(
    [
        "",
        "<|im_end|>",
        "</s>",
        "<end_of_turn>",
        "<|eot_id|>",
        "<|end|>",
        "<｜end▁of▁sentence｜>",
        "<turn|>",
        "[|endofturn|]",
    ]
)


@many
@given(PAIRS, PLAIN, ANSWERS, st.booleans(), ENDS, PLAIN)
def test_the_answer_comes_through(pair, reasoning, answer, is_opened, end, rest):
    text = f"{pair[0] if is_opened else ''}{reasoning}{pair[1]}{answer}{end}{rest if end else ''}"
    assert cut_at_end_token(without_thinking(text)).strip() == answer.strip()


@many
@given(PAIRS, PLAIN)
def test_reasoning_alone_is_no_answer(pair, reasoning):
    assert strip_thinking(pair[0] + reasoning).strip() == ""


@many
@given(PAIRS, ANSWERS)
def test_a_prompt_that_opens_it_is_recognised(pair, answer):
    closing = closing_tag(f"<|assistant|>\n{pair[0]}\n")
    assert closing is not None
    assert strip_thinking(f"so{closing}{answer}", closing).strip() == answer.strip()


@many
@given(st.text(max_size=60))
def test_any_text_is_read(text):
    assert isinstance(strip_thinking(text), str)
    cut = cut_at_end_token(text)
    assert cut in text and cut_at_end_token(cut.strip()) is not None


@many
@given(st.one_of(st.none(), st.integers(), st.text(max_size=20), st.sampled_from(["stop", "length", "error", "STOP"])))
def test_any_finish_reason_is_one_of_three(reason):
    finish, explanation = read_finish({"finish_reason": reason})
    assert finish in ("stop", "length", "failed") and bool(explanation) == (finish == "failed")
