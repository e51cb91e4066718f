"""Prompt templates: one Jinja file each, a block by role, rendered to chat messages.

    load_template("critique").render(principle=p, prompt="…", response="…")

Text from records goes in as data: Jinja in it stays literal, and our own delimiters in it
(`<response>` and the like) are neutralised, so that it can't close a delimiter of the template. Leaves out
control tokens of chat templates: those differ by tokenizer, and the engine handles them.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.sandbox

from cai.base.errors import InputError, shorten
from cai.base.paths import TEMPLATES, find_file
from cai.data.dialogue import prompt_text

_ROLES = ("system", "user", "prefill")

_TAG = re.compile(
    r"<(?=\s*+/?\s*+(?:prompt|response|response_a|response_b|critique|reasoning|principle)\b)", re.IGNORECASE
)

ENVIRONMENT = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@dataclass(frozen=True)
class Template:
    name: str
    sha256: str
    _template: Any

    def render(self, **variables) -> list[dict[str, str]]:
        """Chat messages, one for each block of the template; a `prefill` block becomes an assistant
        message at the end, which the engine continues.

        Args:
            variables: strings are neutralised; `prompt` may be a list of messages; a Principle is
                trusted (it comes from the constitution, not from a record).
        """
        texts = {role: self.render_block(role, **variables) for role in _ROLES}
        return [
            {"role": "assistant" if role == "prefill" else role, "content": text}
            for role, text in texts.items()
            if text is not None
        ]

    def render_block(self, name: str, **variables) -> str | None:
        """The text of one block, with the variables of `render`; None if the template does not have it."""
        if name not in self._template.blocks:
            return None
        if "prompt" in variables:
            variables["prompt"] = prompt_text(variables["prompt"])
        values = {k: neutralise(v) if isinstance(v, str) else v for k, v in variables.items()}
        try:
            context = self._template.new_context(values)
            return "".join(self._template.blocks[name](context)).strip()
        except jinja2.exceptions.UndefinedError as error:
            raise InputError(str(error), where=self.name, expected=f"only: {', '.join(sorted(values))}") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"the template can't be rendered: {shorten(error, 200)}", where=self.name, remedy="Fix the template"
            ) from error


def load_template(name_or_path: str, block: str = "user") -> Template:
    """A template file, or the name of one in templates/.

    block: the block that it must have.
    Raises InputError with file and line.
    """
    path = find_file(name_or_path, TEMPLATES, ".jinja")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=path, remedy="Save it as UTF-8") from None
    try:
        template = ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(shorten(error.message), where=path, line=error.lineno, remedy="Fix the template") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise InputError(shorten(error), where=path, remedy="Fix the template") from None
    if block not in template.blocks:
        raise InputError(f"no `{{% block {block} %}}`", where=path, expected="blocks out of: " + ", ".join(_ROLES))
    return Template(str(path), hashlib.sha256(source.encode()).hexdigest(), template)


def neutralise(text: str) -> str:
    """`text` with the opening bracket of our delimiters turned into one that only looks like it."""
    return _TAG.sub("‹", text)
