"""The errors a user can cause or fix, each with the exit code its command ends with.

Leaves out bugs of ours: those stay ordinary exceptions with a traceback.
"""

# The end of a remedy for a bad row, which is not repeated where the row has been left out.
LEAVE_OUT = "or leave it out with --skip-invalid"


class CaiError(Exception):
    """Failed while running: what is done is kept, the same command continues (exit code 1)."""

    exit_code = 1


class InputError(CaiError):
    """Bad usage or bad input: nothing was written (exit code 2).

    Args:
        problem: what is wrong, with the value found.
        where: the file (or option) it was found in.
        line: 1-based line number in `where`, if it has lines.
        expected: what would have been right.
        remedy: what to do now.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        line: int | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ):
        self.where, self.line = where, line
        position = "" if where is None else f"{where}: " if line is None else f"{where}:{line}: "
        text = position + problem
        if expected:
            text += f"; expected {expected}"
        if remedy:
            text += f". {remedy}"
        super().__init__(text if text.endswith((".", "?", "!")) else text + ".")


def shorten(value: object, width: int = 80) -> str:
    """`value` on one line of at most `width` characters, for an error message."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"
