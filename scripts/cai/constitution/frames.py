"""Frames: what stands around a prompt. A system message, earlier turns, words before and after it, a prefilled answer.

    frames = load_frames("frames")                      # templates/frames.yaml, or a file of your own
    row = frame_row(row, frames.choose(0, row["id"], row.get("kind"), share=0.5))

A frame that is seen is for training and measuring, one that is held out for measuring only. Which frame a prompt gets
depends on the seed and the prompt's id alone, so that all responses to a prompt, whoever wrote them, have the same.
Leaves out what later steps do with a prefilled answer (data/prefills.py), and searched-for attacks.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import jinja2
import jinja2.meta
import yaml

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed
from cai.base.paths import TEMPLATES, find_file
from cai.constitution.templates import ENVIRONMENT
from cai.constitution.yaml_nodes import line_of, read_line, read_list, read_mapping, read_text, read_yaml
from cai.data import dialogue

# Each key of a frame, and what it is.
FRAME_KEYS = {
    "id": "The frame's name in every row and figure.",
    "kind": "What the frame does: push, prefill, role_play, jailbreak, safety or greeting.",
    "split": "seen: for training and measuring; held_out (the default): for measuring only.",
    "for": "Which prompts it is for: all (the default), or harmful ones alone.",
    "weight": "How often it is drawn against the other seen frames: a whole number, 1 by default.",
    "messages": "The conversation, in which `{{ prompt }}` stands for the prompt; it ends with the user.",
    "prefill": "The beginning of the answer, as plain text.",
}

KINDS = ("push", "prefill", "role_play", "jailbreak", "safety", "greeting")

SPLITS = ("seen", "held_out")

AUDIENCES = ("all", "harmful")

FRAME_SHARE = 0.6  # of the prompts that get a frame

_MAX_FRAMES = 500

_MAX_WEIGHT = 100

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")

_JINJA_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError)

_MARK = "Zx9MARKx9Z"  # stands for a prompt while a frame is tried out


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        audience: one of `AUDIENCES`.
        weight: how often it is drawn against the other seen frames, 1 to 100.
        prefill: the beginning of the answer, or "".
        line: where it begins in its file.
    """

    id: str
    kind: str
    split: str
    audience: str
    weight: int
    prefill: str
    line: int = field(compare=False)
    _turns: tuple[tuple[str, Any], ...] = field(compare=False, repr=False)

    def is_for(self, kind: str | None) -> bool:
        """Whether it is for prompts of a kind (`harmful`, ...); one without a kind may be harmful."""
        return self.audience == "all" or kind in ("harmful", None)

    def surround(self, prompt: str | Sequence[dict]) -> list[dict]:
        """The conversation that the model reads, without the prefill.

        The frame's turns take the place of the prompt's last message; its system message stands in front of the
        prompt's own. Raises InputError for a frame that can't be rendered with this prompt.
        """
        *earlier, last = dialogue.as_messages(prompt)
        try:
            turns = [
                {"role": role, "content": template.render(prompt=last["content"]).strip()}
                for role, template in self._turns
            ]
        except _JINJA_ERRORS as error:
            raise InputError(
                f"it can't be rendered with the prompt {shorten(last['content'])!r}: {shorten(error, 200)}",
                where=f"the frame {self.id!r}",
                remedy="Fix its Jinja",
            ) from error
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        return dialogue.add_system([*earlier, *turns], system)


@dataclass(frozen=True)
class Frames:
    """The frames of a file. `sha256` is the hash of its bytes."""

    path: str
    sha256: str
    frames: tuple[Frame, ...]

    def of_split(self, split: str) -> tuple[Frame, ...]:
        """The frames of a split, or all of them for "all". Raises InputError if there is none."""
        frames = tuple(frame for frame in self.frames if split in ("all", frame.split))
        if not frames:
            raise InputError("no frame that is " + split.replace("_", " "), where=self.path, remedy="Add some")
        return frames

    def choose(self, seed: int, prompt_id: str, kind: str | None, share: float) -> Frame | None:
        """The seen frame of a prompt, by hashing and weight; None where the prompt stays plain.

        Args:
            share: the share of prompts that get a frame, 0 to 1.
        """
        if hashed_seed("framed", seed, prompt_id) >= share * 2**63:
            return None
        seen = [frame for frame in self.of_split("seen") if frame.is_for(kind)]
        frames = [frame for frame in seen for _ in range(frame.weight)]
        return frames[hashed_seed("frame", seed, prompt_id) % len(frames)] if frames else None


def frame_row(row: Mapping[str, Any], frame: Frame | None) -> dict[str, Any]:
    """The row in the frame: `prompt` as messages, `frame`, `frame_kind`, and `prefill` if it has one."""
    if frame is None:
        return dict(row)
    prefill = {"prefill": frame.prefill} if frame.prefill else {}
    return {**row, "prompt": frame.surround(row["prompt"]), "frame": frame.id, "frame_kind": frame.kind, **prefill}


@dataclass(frozen=True)
class Framing:
    """How the prompts of a command are framed; without `frames` they stay as they are."""

    frames: Frames | None
    share: float
    seed: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the frames of prompts, for manifests; {} without frames."""
        return {"frames": self.frames.sha256, "frame_share": self.share} if self.frames else {}

    def apply(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row in its frame. Raises InputError for one that has a frame already."""
        if self.frames is None:
            return row
        if row.get("frame") is not None or row.get("prefill") is not None:
            raise InputError(
                f"row {shorten(row['id'])!r} has a frame already",
                where="--frames",
                expected="plain prompts",
                remedy="Leave --frames out: rows keep the frame that they have",
            )
        return frame_row(row, self.frames.choose(self.seed, row["id"], row.get("kind"), self.share))


def frame_options(function: Callable) -> Callable:
    """Decorator: `--frames` and `--frame-share`, which `read_framing` reads."""
    share = click.option(
        "--frame-share",
        type=click.FloatRange(0, 1),
        default=FRAME_SHARE,
        show_default=True,
        help="With --frames: the share of prompts that get a frame; the others stay plain.",
    )
    frames = click.option(
        "--frames",
        metavar="NAME|FILE",
        help="Put prompts into frames: system messages, earlier turns, prefilled answers. A YAML file, or `frames` for "
        "the bundled one. Frames that are held out are for measuring only.",
    )
    return frames(share(function))


def read_framing(name_or_path: str | None, share: float, seed: int) -> Framing:
    """The framing that `frame_options` name. Raises InputError for a file without a frame that is seen."""
    if name_or_path is None:
        cli.refuse_options(["frame_share"], "without --frames every prompt stays plain")
        return Framing(None, share, seed)
    frames = load_frames(name_or_path)
    frames.of_split("seen")
    return Framing(frames, share, seed)


def load_frames(name_or_path: str) -> Frames:
    """Read and check a frames file, or the one of that name in templates/.

    Raises InputError (file, line, value, remedy) for anything that the format does not know.
    """
    path = find_file(name_or_path, TEMPLATES, ".yaml")
    tree, raw = read_yaml(path, f"at most {_MAX_FRAMES} frames")
    keys = read_mapping(tree, path, ("frames",), "frames file")
    if "frames" not in keys:
        raise InputError("no `frames`", where=path, line=1, remedy="Add a list of frames")
    nodes = read_list(keys["frames"], path, "frames")
    if len(nodes) > _MAX_FRAMES:
        raise InputError(f"{len(nodes)} frames", where=path, expected=f"at most {_MAX_FRAMES}")
    frames: dict[str, Frame] = {}
    for node in nodes:
        frame = _frame(node, path)
        if frame.id in frames:
            raise InputError(
                f"two frames with id {frame.id!r}",
                where=path,
                line=frame.line,
                remedy=f"Give each its own id; the other is on line {frames[frame.id].line}",
            )
        frames[frame.id] = frame
    return Frames(str(path), hashlib.sha256(raw).hexdigest(), tuple(frames.values()))


def _frame(node: yaml.Node, path: Path) -> Frame:
    keys = read_mapping(node, path, FRAME_KEYS, "frame")
    for name in ("id", "kind", "messages"):
        if name not in keys:
            raise InputError(
                f"a frame without `{name}`", where=path, line=line_of(node), expected=f"keys out of: {', '.join(keys)}"
            )
    frame = Frame(
        id=read_line(keys["id"], path, "id"),
        kind=_word(keys["kind"], path, "kind", KINDS),
        split=_word(keys["split"], path, "split", SPLITS) if "split" in keys else "held_out",
        audience=_word(keys["for"], path, "for", AUDIENCES) if "for" in keys else "all",
        weight=_weight(keys["weight"], path) if "weight" in keys else 1,
        prefill=read_text(keys["prefill"], path, "prefill").strip() if "prefill" in keys else "",
        line=line_of(node),
        _turns=tuple(_turn(item, path) for item in read_list(keys["messages"], path, "messages")),
    )
    if not _ID.fullmatch(frame.id):
        raise InputError(
            f"the id {shorten(frame.id)!r}",
            where=path,
            line=line_of(keys["id"]),
            expected="1 to 40 of a-z, 0-9, _ and -, a letter or digit first",
        )
    if "{{" in frame.prefill or "{%" in frame.prefill:
        raise InputError(
            "Jinja in a prefill", where=path, line=line_of(keys["prefill"]), expected="plain text, the same for all"
        )
    if "weight" in keys and frame.split != "seen":
        raise InputError(
            "a weight of a frame that is held out, which is never drawn",
            where=path,
            line=line_of(keys["weight"]),
            remedy="Remove it, or add `split: seen`",
        )
    _check_turns(frame, line_of(keys["messages"]), path)
    return frame


def _word(node: yaml.Node, path: Path, name: str, words: Sequence[str]) -> str:
    word = read_line(node, path, name)
    if word not in words:
        raise InputError(
            f"the {name} {shorten(word)!r}", where=path, line=line_of(node), expected=f"one of: {', '.join(words)}"
        )
    return word


def _weight(node: yaml.Node, path: Path) -> int:
    text = read_line(node, path, "weight")
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= _MAX_WEIGHT:
        raise InputError(
            f"the weight {shorten(text)!r}",
            where=path,
            line=line_of(node),
            expected=f"a whole number from 1 to {_MAX_WEIGHT}",
        )
    return int(text)


def _turn(node: yaml.Node, path: Path) -> tuple[str, Any]:
    """(role, template) of one message; InputError for a template that can't be rendered from a prompt alone."""
    keys = read_mapping(node, path, ("role", "content"), "message")
    for name in ("role", "content"):
        if name not in keys:
            raise InputError(f"a message without `{name}`", where=path, line=line_of(node), expected="role and content")
    role = _word(keys["role"], path, "role", ("system", "user", "assistant"))
    source, line = read_text(keys["content"], path, "content"), line_of(keys["content"])
    try:
        unknown = jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(source)) - {"prompt"}
        if unknown:
            raise InputError(f"the variable {min(unknown)!r}", where=path, line=line, expected="`prompt`, and no other")
        template = ENVIRONMENT.from_string(source)
        is_empty = not template.render(prompt=_MARK).strip()
    except _JINJA_ERRORS as error:
        raise InputError(
            f"the message can't be rendered: {shorten(error, 200)}", where=path, line=line, remedy="Fix its Jinja"
        ) from None
    if is_empty:
        raise InputError("a message that is empty when it is rendered", where=path, line=line, remedy="Remove it")
    return role, template


def _check_turns(frame: Frame, line: int, path: Path) -> None:
    """Raise InputError unless the frame's turns are a conversation with the prompt in it, and do what its kind says."""

    def error(problem: str, expected: str) -> InputError:
        return InputError(f"the frame {frame.id!r} {problem}", where=path, line=line, expected=expected)

    roles = [role for role, _ in frame._turns]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[number % 2] for number in range(len(turns))] or not len(turns) % 2:
        raise error(
            f"has the roles {', '.join(roles)}",
            "a system message or none, then user and assistant in turn, the user last",
        )
    questions = [message["content"] for message in frame.surround(_MARK) if message["role"] == "user"]
    if not any(_MARK in content for content in questions):
        raise error("leaves the prompt out", "`{{ prompt }}` in a message of the user")
    if frame.kind == "push" and "assistant" not in roles:
        raise error("of the kind push has no earlier answer", "an assistant's turn before the user's last")
    if frame.kind == "prefill" and not frame.prefill:
        raise error("of the kind prefill has no `prefill`", "the beginning of the answer")
