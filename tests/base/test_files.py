"""Files that replace another one whole, and names that are safe as file names."""

import os

import pytest

from cai.base.files import file_name, replace_file, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_text(path, "old – ü")
    with pytest.raises(RuntimeError), replace_file(path) as file:
        file.write(b"new")
        assert path.read_text(encoding="utf-8") == "old – ü"
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old – ü" and os.listdir(path.parent) == ["x.json"]
    with replace_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["x.json"]


def test_the_content_is_on_the_disk_before_the_file_takes_its_place(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace"))
    write_text(tmp_path / "x", "text")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("harmless v2", "harmless-v2"),
        ("../../etc/passwd", "etc-passwd"),
        ("Größe_1.5", "Größe_1.5"),
        ("///", "unnamed"),
        ("x" * 300, "x" * 100),
    ],
)
def test_a_file_name_leads_to_no_other_folder(name, expected):
    assert file_name(name) == expected
