"""The events of a command, checked against the fields that references/data-formats.md lists."""

import json
from datetime import datetime

import pytest

NUMBER = (int, float)
OPTIONAL = {"step": str, "number": int, "steps": int}
# event: ({field that is always there: type}, {field that may be: type})
FIELDS = {
    "started": ({"line": str}, {"pid": int, "output": str}),
    "progress": ({}, {"text": str}),
    "warning": ({"text": str}, {}),
    "figures": ({"figures": dict}, {}),
    "ended": ({"exit_code": int, "seconds": NUMBER}, {}),
    "failed": ({"exit_code": int, "seconds": NUMBER}, {"text": str}),
}
COUNTED = {
    "label": str,
    "unit": str,
    "done": NUMBER,
    "total": NUMBER,
    "rate": NUMBER,
    "eta_seconds": (*NUMBER, type(None)),
}


def read_events(path):
    """The events of a file, each of which must have the fields of its kind and no others."""
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    for row in rows:
        always, sometimes = FIELDS[row["event"]]
        if row["event"] == "progress" and "text" not in row:
            always = COUNTED
        fields = {"time": str, "event": str, "command": str} | always
        assert fields.keys() <= row.keys(), row
        for name, value in row.items():
            assert isinstance(value, (fields | sometimes | OPTIONAL)[name]), row
        assert datetime.fromisoformat(row["time"]).utcoffset().total_seconds() == 0
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    return rows
