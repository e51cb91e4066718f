"""Frames: the bundled file, how a prompt gets one, and what is refused with file and line."""

import re
from collections import Counter

import pytest

from cai.base.errors import InputError
from cai.base.paths import TEMPLATES
from cai.constitution.frames import KINDS, SPLITS, frame_row, load_frames

FRAME = """\
frames:
  - id: rex
    kind: role_play
    split: seen
    messages:
      - {role: system, content: "You play Rex."}
      - {role: user, content: "Rex, {{ prompt }}"}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "frames.yaml"
        path.write_text(text, encoding="utf-8")
        return load_frames(str(path))

    return load


def test_the_bundled_frames_are_of_every_kind_seen_and_held_out():
    frames = load_frames("frames").frames
    counts = Counter((frame.kind, frame.split) for frame in frames)
    assert set(counts) == {(kind, split) for kind in KINDS for split in SPLITS}
    assert min(counts[kind, "seen"] for kind in KINDS) >= 4
    assert min(counts[kind, "held_out"] for kind in KINDS) >= 3
    for frame in frames:
        *_, last = frame.surround("Where is the harbour?")
        assert last["role"] == "user", frame.id
        assert "Where is the harbour?" in str(frame.surround("Where is the harbour?")), frame.id
    texts = [str(frame.surround("?")) + frame.prefill for frame in frames]
    assert len(set(texts)) == len(texts), "no frame occurs twice"


def test_the_words_of_stress_are_in_no_frame():
    text = " ".join((TEMPLATES / "frames.yaml").read_text(encoding="utf-8").split())
    for path in (TEMPLATES / "stress").glob("*.jinja"):
        words = re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for sentence in re.split(r"[.:]\s", " ".join(words.split())):
            assert len(sentence) < 20 or sentence not in text, sentence


def test_a_prompt_is_data_in_a_frame(load):
    [frame] = load(FRAME).frames
    prompt = "{{ 7 * 7 }} {% raw %}</prompt>"
    assert frame.surround(prompt) == [
        {"role": "system", "content": "You play Rex."},
        {"role": "user", "content": f"Rex, {prompt}"},
    ]


def test_a_frame_takes_the_place_of_the_last_message_and_stands_before_the_system_message(load):
    [frame] = load(FRAME).frames
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "how?"},
    ]
    assert frame.surround(prompt) == [
        {"role": "system", "content": "You play Rex.\n\nBe brief."},
        *prompt[1:3],
        {"role": "user", "content": "Rex, how?"},
    ]


def test_a_frame_that_does_not_suit_a_prompt_is_named(load):
    [frame] = load(FRAME.replace("{{ prompt }}", "{{ prompt }}{{ 1 // (prompt | length - 4) }}")).frames
    with pytest.raises(InputError, match=r"the frame 'rex': it can't be rendered with the prompt 'how\?'"):
        frame.surround("how?")


def test_a_framed_row_keeps_its_other_fields(load):
    [frame] = load(FRAME + '    prefill: "  Of course. "\n').frames
    row = frame_row({"id": "1", "prompt": "how?", "kind": "harmful"}, frame)
    assert row["prompt"][-1] == {"role": "user", "content": "Rex, how?"}
    rest = {"id": "1", "kind": "harmful", "frame": "rex", "frame_kind": "role_play", "prefill": "Of course."}
    assert {name: value for name, value in row.items() if name != "prompt"} == rest
    assert frame_row({"id": "1", "prompt": "how?"}, None) == {"id": "1", "prompt": "how?"}


def test_the_seed_and_the_prompt_decide_the_frame():
    frames = load_frames("frames")

    def draw(seed, kind="harmful", share=0.5):
        return [frames.choose(seed, f"p{n}", kind, share) for n in range(2000)]

    chosen = draw(0)
    assert chosen == draw(0)
    assert chosen != draw(1)
    counts = Counter(frame and frame.id for frame in chosen)
    assert 900 < counts.pop(None) < 1100
    seen = {frame.id for frame in frames.of_split("seen")}
    assert set(counts) == seen, "all seen frames are drawn, and no other"
    assert min(counts.values()) > 15
    assert set(draw(0, share=0.0)) == {None}
    assert None not in draw(0, share=1.0)


def test_a_frame_is_drawn_by_its_weight(load):
    other = FRAME.partition("\n")[2].replace("rex", "genie").replace("Rex", "Genie")
    even = load(FRAME + other)
    frames = load(FRAME + other + "    weight: 3\n")
    counts = Counter(frames.choose(0, f"p{n}", "harmful", 1.0).id for n in range(2000))
    assert 1410 < counts["genie"] < 1590, "three in four"
    assert even.choose(0, "p", "harmful", 1.0) == load(FRAME + other + "    weight: 1\n").choose(0, "p", "harmful", 1.0)


def test_a_frame_for_harmful_prompts_is_for_no_other(load):
    frames = load(FRAME + "    for: harmful\n")
    assert frames.choose(0, "p", "harmful", 1.0)
    assert frames.choose(0, "p", None, 1.0), "a prompt without a kind may be harmful"
    assert frames.choose(0, "p", "benign", 1.0) is None


def test_a_split_without_frames_is_an_error(load):
    with pytest.raises(InputError, match="no frame that is held out"):
        load(FRAME).of_split("held_out")
    assert len(load(FRAME).of_split("all")) == 1


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        ("split: seen", "split: seen\n    prefil: x", 5, "unknown key 'prefil' in a frame.*Did you mean 'prefill'"),
        ("id: rex", "id: Rex!", 2, "the id 'Rex!'"),
        ("role_play", "roleplay", 3, "the kind 'roleplay'; expected one of: push, prefill"),
        ("split: seen", "split: test", 4, "the split 'test'; expected one of: seen, held_out"),
        ("    kind: role_play\n", "", 2, "a frame without `kind`"),
        ("Rex, {{ prompt }}", "Rex", 6, "leaves the prompt out"),
        ("{{ prompt }}", "{{ question }}", 7, "the variable 'question'; expected `prompt`"),
        ("{{ prompt }}", "{{ prompt", 7, "can't be rendered"),
        ("{{ prompt }}", "{{ prompt.__class__.__mro__[1] }}", 7, "can't be rendered"),
        ("role: user", "role: human", 7, "the role 'human'"),
        ("role: user", "role: assistant", 6, "has the roles system, assistant"),
        ('content: "You play Rex."', 'content: "{# nothing #}"', 6, "empty when it is rendered"),
        ("role_play", "push", 6, "of the kind push has no earlier answer"),
        ("role_play", "prefill", 6, "of the kind prefill has no `prefill`"),
        ("split: seen", 'split: seen\n    prefill: "{{ prompt }}"', 5, "Jinja in a prefill"),
        ("split: seen", "split: seen\n    for: none", 5, "the for 'none'"),
        ("split: seen", "split: seen\n    weight: 0", 5, "the weight '0'; expected a whole number from 1 to 100"),
        ("split: seen", "split: seen\n    weight: 1.5", 5, "the weight '1.5'"),
        ("split: seen", "split: seen\n    weight: 101", 5, "the weight '101'"),
        ("split: seen", "weight: 2", 4, "a weight of a frame that is held out, which is never drawn"),
        ("frames:", "frame:", 1, "unknown key 'frame' in a frames file"),
    ],
)
def test_what_the_format_does_not_know_is_refused_with_its_line(load, old, new, line, problem):
    assert old in FRAME
    with pytest.raises(InputError, match=problem) as caught:
        load(FRAME.replace(old, new, 1))
    assert caught.value.line == line


def test_two_frames_with_one_id_are_refused(load):
    with pytest.raises(InputError, match=r"two frames with id 'rex'.*the other is on line 2"):
        load(FRAME + FRAME.partition("\n")[2])


def test_an_alias_is_refused(load):
    with pytest.raises(InputError, match="a YAML alias"):
        load("frames:\n  - &a {id: x}\n  - *a\n")
