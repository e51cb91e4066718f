"""The table of a run's stages, whoever read the responses."""

from cai.data.outputs import write_jsonl
from cai.evaluate import stages
from cai.evaluate.rates import rates_of_rows, read_rates


def evaluation(path, classes):
    """The rates of one response per (kind, class), as evaluate.py writes them; read back."""
    rows = [{"id": str(n), "kind": kind, "class": class_} for n, (kind, class_) in enumerate(classes)]
    write_jsonl(path, [{"metric": name, **rate} for name, rate in rates_of_rows(rows).items()])
    return read_rates(path)


def test_rates_read_by_phrases_are_shown_by_kind(tmp_path):
    helps, declines = ("benign", "complied"), ("harmful", "declined")
    base = evaluation(tmp_path / "base.jsonl", [("harmful", "complied"), declines, helps])
    sft = evaluation(tmp_path / "sft.jsonl", [declines, declines, helps])
    lines = stages.stage_table({"base": base, "sft": sft}).splitlines()
    assert any(line.startswith("harmful prompts (n = 2)") for line in lines)
    [complied] = [line for line in lines if "harmful complied" in line]
    assert "50.0" in complied and "0.0" in complied
    [helped] = [line for line in lines if "benign complied" in line]
    assert helped.count("100.0 % (") == 2
    assert not any("borderline" in line for line in lines)  # there is no such prompt


def test_rates_of_classes_are_shown_under_their_names(tmp_path):
    rates = evaluation(tmp_path / "base.jsonl", [("harmful", "good"), ("borderline", "refused"), ("benign", "helpful")])
    table = stages.stage_table({"base": rates})
    assert "good refusal" in table and "over refusal" in table and "harmful declined" not in table
