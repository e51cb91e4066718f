"""Text of a run in the report's pages: escaped for HTML or Markdown, hidden characters made visible.

    environment(html=True).get_template("page.html.jinja").render(...)

Whatever a template prints is escaped, unless it is Markup. Leaves out prompts (constitution/templates.py).
"""

import json
import re
from functools import partial

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from cai.base.paths import TEMPLATES
from cai.stats import tables

MARK = "constitutional-ai report"  # in every file that report.py writes: a file with it may be replaced

# Control characters, and those that reorder or hide text; the same set as in templates/report/page.js.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


def visible(text: str) -> str:
    """The text with characters that hide or reorder others replaced by their number, U+202E for instance."""
    return _HIDDEN.sub(lambda match: f"U+{ord(match[0]):04X}", text)


def markdown(text: str) -> str:
    """The text on one line, with every mark of Markdown or HTML escaped."""
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))


def plain(value) -> str:
    """A figure of any kind, in its own unit: a number, a rate with its interval, or a text."""
    if value is None or (isinstance(value, dict) and "value" in value):
        return tables.show_number(value, ".3g")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def percent(measured: dict | None) -> str:
    """A rate without its interval, on one line (`97.2 %` with a space that does not break)."""
    return tables.show(measured).partition(" (")[0].replace(" ", "\u00a0")


def counts(numbers: dict[str, int]) -> str:
    """How often each name, such as `bare refusal 3, copy 1`; `none` if there are none."""
    return ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in numbers.items()) or "none"


def environment(*, html: bool) -> jinja2.Environment:
    """The Jinja environment of templates/report/. With `html`, text is escaped for HTML and a `data` dict printed
    as JSON that can't close its script block; else it is escaped for Markdown."""

    def finalize(value):
        if isinstance(value, Markup):
            return value
        if html and isinstance(value, dict):
            return htmlsafe_json_dumps(value, partial(json.dumps, ensure_ascii=False, separators=(",", ":")))
        if isinstance(value, str):
            return visible(value) if html else Markup(markdown(value))
        return value

    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / "report"),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=not html,
    )
    jinja.filters |= {
        "show": tables.show,
        "plain": plain,
        "counts": counts,
        "thousands": lambda number: f"{number:,}",
        "percent": percent,
        "interval": lambda measured: "".join(tables.show(measured).partition("(")[1:]),
    }
    return jinja
