"""The table of counts and the generated documentation follow from the presets."""

import runpy
from pathlib import Path

import pytest
from helpers.method_cases import PRESETS

from mambapeft_vision import cli
from mambapeft_vision.commands import count
from mambapeft_vision.results.paper import PAPER, PUBLISHED, VIM_S, VIT_S, paper_row

ROOT = Path(__file__).resolve().parents[2]


def test_methods_document_is_up_to_date():
    script = str(ROOT / "scripts" / "make_methods_doc.py")
    assert runpy.run_path(script)["main"](["--check"]) == 0, f"run: python {script}"


def test_counts_command(capsys):
    assert cli.main(["count", "--backbone", "vit_s"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    assert "|    589,824 |       628 |" in lines["lora_qv"]
    assert {"full", "scratch", "linear_probe", "fact_tk"} <= set(lines)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.backbone == "vim_s"])
def test_every_difference_from_the_table_has_a_reason(name):
    """On the headers' counts, which the behaviour matrix compares with built models."""
    reason = count.why(name, PRESETS[name].count, paper_row(name), head=38_500)
    assert "unexplained" not in reason
    expected = {
        "parallel_adapter": "rank 24",
        "full": "100 classes",
        "affix": "117,000K",
        "lora_p_x": "8.5K",
        "bias": "",
    }
    assert expected.get(name, "") in reason
    assert name not in ("bias", "hybrid", "norm") or not reason


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("additional_scan", 1_327_104),
        ("affix", 462_578_688),
        ("conv1d", 294_912),
        ("lora_in_proj", 5_898_240),
        ("lora_out_proj", 5_308_416),
        ("lora_p_x", 3_538_944),
        ("parallel_adapter", 1_769_472),
    ],
)
def test_vim_b_has_its_own_sizes(name, published):
    """Counted by hand from the published configurations."""
    assert name in {preset.name for preset in count.presets_for("vim_b", PRESETS)}
    assert count.count(PRESETS[name], "vim_b") == published


def test_formats():
    line = count.Count("a_b", 1000, 9, "why")
    assert count.render([line], "csv").splitlines()[1] == '"a_b",1000,9,8.0,"why"'
    assert r"a\_b & 1,000 & 9 & 8.0 & why \\" in count.render([line], "latex").splitlines()
    assert count.render([line], "md").splitlines()[2].split("|")[1:3] == [" a_b    ", "      1,000 "]


def test_the_papers_rows_name_presets_that_exist():
    named = [(backbone, preset) for backbone, rows in PUBLISHED.items() for row in rows for preset in row.presets]
    assert len(named) == len(set(named))
    assert {preset for _, preset in named} <= set(PRESETS)


@pytest.mark.parametrize("row", [r for r in PAPER if r.natural], ids=lambda r: r.label)
def test_averages_are_over_the_tasks(row):
    """7 natural, 4 specialized, 8 structured tasks: a check on how the numbers were copied."""
    mean = (7 * row.natural + 4 * row.specialized + 8 * row.structured) / 19
    assert abs(mean - row.average) < 0.02 or "do not average" in row.note


def test_header_and_paper_agree():
    registered = {"vim_s": VIM_S, "vit_s": VIT_S}
    for name, preset in PRESETS.items():
        row = paper_row(name, registered.get(preset.backbone, preset.backbone))
        if row is not None:
            assert f"Avg {row.average:.2f}" in preset.paper, name
