"""Tables against numbers computed by hand."""

import csv
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
from helpers import crashes
from helpers.fake_records import CONFIGS, fake_record

import mambapeft_vision.backbones  # noqa: F401 (registers the backbones)
from mambapeft_vision.data.tasks import TASKS
from mambapeft_vision.results.paper import PUBLISHED, VIT_S
from mambapeft_vision.results.tables import (
    AVERAGE,
    GROUPS,
    Incomplete,
    Score,
    collect,
    comparison_table,
    find_records,
    read_standard,
    summary_table,
    tables_of,
    task_table,
    to_csv,
    to_latex,
    to_markdown,
)
from mambapeft_vision.utils.errors import UserError

SCRIPT = "scripts/collect_results.py"
ALL = [task.name for task in TASKS.values()]
SPECIALIZED, STRUCTURED = GROUPS["Specialized"], GROUPS["Structured"]


@pytest.fixture(scope="module")
def standard():
    return read_standard(CONFIGS)


def accuracy(task: str, seed: int) -> float:
    """Natural 80 %, specialized 60 %, structured 40 %; 1 point more in seed 1, 3 more in seed 2."""
    base = 0.6 if task in SPECIALIZED else 0.4 if task in STRUCTURED else 0.8
    return base + {0: 0.0, 1: 0.01, 2: 0.03}[seed]


def full_set(preset: str, seeds=(0, 1, 2), **changes):
    return [fake_record(task, preset, seed, accuracy(task, seed), **changes) for task in ALL for seed in seeds]


def cells(table, label: str) -> dict[str, str]:
    (row,) = (row for row in table.rows if row[0] == label)
    return dict(zip(table.header, row))


def test_means_and_deviations_by_hand(standard):
    (collection,) = collect(full_set("lora_p_x"), standard)
    (row,) = collection.rows
    # 7 tasks at 80, 4 at 60, 8 at 40: 1120 / 19 = 58.947; seeds add 0, 1, 3: mean 4/3, deviation sqrt(7/3) = 1.5275
    average = row.average([collection.tasks])
    assert average.mean == pytest.approx(1120 / 19 + 4 / 3)
    assert average.std == pytest.approx((7 / 3) ** 0.5)
    assert average.seeds == (0, 1, 2)
    of_groups = row.average(list(GROUPS.values()))
    assert of_groups.mean == pytest.approx(60 + 4 / 3) and of_groups.std == pytest.approx((7 / 3) ** 0.5)
    assert cells(summary_table(collection), "lora_p_x") == {
        "Method": "lora_p_x",
        "Trained": "1,769,472",
        "Head": "770 to 152,845",
        "Natural": "81.33 ± 1.53",
        "Specialized": "61.33 ± 1.53",
        "Structured": "41.33 ± 1.53",
        "Avg": "60.28 ± 1.53",
        "Groups": "61.33 ± 1.53",
        "PPT": "0.562",
    }


def test_accuracy_against_parameters(standard):
    """A method of no parameters keeps its accuracy; 90 million parameters divide it by e."""
    (collection,) = collect(full_set("a", seeds=[0]), standard)
    (row,) = collection.rows
    for trainable, factor in ((0, 1.0), (90_000_000, 1 / 2.718281828)):
        records = {key: replace(record, trainable=trainable) for key, record in row.records.items()}
        changed = replace(row, records=records)
        assert changed.ppt(Score(80.0, None, (0,))) == pytest.approx(0.8 * factor)
    assert row.ppt(Incomplete(3, 19)) is None
    published = replace(row, records={key: replace(r, trainable=1_769_472) for key, r in row.records.items()})
    assert f"{published.ppt(Score(71.52, None, (0,))):.3f}" == "0.666"  # LoRA_p(X) as published


def test_deviation_is_that_of_the_averages_not_the_average_of_deviations(standard):
    """One task up, another down by as much: the average over the two does not move between seeds."""
    runs = [("custom/a", 0, 0.5), ("custom/b", 0, 0.7), ("custom/a", 1, 0.6), ("custom/b", 1, 0.6)]
    (collection,) = collect([fake_record(task, "a", seed, value) for task, seed, value in runs], standard)
    average = collection.rows[0].average([collection.tasks])
    assert average.mean == pytest.approx(60) and average.std == pytest.approx(0, abs=1e-9)
    assert collection.rows[0].score("custom/a").std == pytest.approx(50**0.5)


def test_one_seed_has_no_deviation(standard):
    (collection,) = collect(full_set("a", seeds=[0]), standard)
    assert collection.rows[0].average([collection.tasks]) == Score(pytest.approx(1120 / 19), None, (0,))
    assert "±" not in to_markdown(summary_table(collection))


def test_what_is_missing_is_shown_and_never_averaged_over(standard):
    records = [r for r in full_set("lora_p_x") if r.task not in ("vtab/cifar", "vtab/kitti")]
    (collection,) = collect(records, standard)
    row = collection.rows[0]
    assert row.average([collection.tasks]) == Incomplete(17, 19)
    shown = cells(summary_table(collection), "lora_p_x")
    assert [shown[name] for name in ("Natural", "Structured", "Avg", "Groups")] == ["6/7", "7/8", "17/19", "17/19"]
    assert shown["Specialized"] == "61.33 ± 1.53"
    by_task = cells(task_table(collection), "lora_p_x")
    assert by_task["cifar"] == "–" and by_task["svhn"] == "81.33 ± 1.53" and by_task["Avg"] == "17/19"
    compared = next(row for row in comparison_table(collection).rows if row[0] == "lora_p_x")
    assert compared[-3:] == ["17/19", "71.52", "–"]


def test_unequal_seeds_are_marked(standard):
    records = [r for r in full_set("lora_p_x") if r.task != "vtab/cifar" or r.seed == 0]
    (collection,) = collect(records, standard)
    shown = cells(summary_table(collection), "lora_p_x")
    # natural: six tasks at 81.3333, cifar at 80
    assert shown["Natural"] == f"{(6 * (80 + 4 / 3) + 80) / 7:.2f}†" == "81.14†"
    assert shown["Avg"].endswith("†") and shown["Specialized"] == "61.33 ± 1.53"
    assert cells(task_table(collection), "lora_p_x")["cifar"] == "80.00 (n=1)"
    assert any("unequal seeds" in note for note in summary_table(collection).notes)


def test_the_published_numbers_stand_beside_ours(standard):
    (collection,) = collect(full_set("hybrid", seeds=[0]), standard)
    table = comparison_table(collection)
    (row,) = (row for row in table.rows if row[0] == "hybrid")
    assert row[:3] == ["hybrid", "117,236", "117,236"]
    assert row[3:6] == ["80.00", "77.00", "+3.00"]
    assert row[-3:] == ["58.95", "72.05", "-13.10"]
    (unrun,) = (row for row in table.rows if row[0] == "Memba")
    assert unrun[1] == unrun[3] == unrun[5] == "–" and unrun[-2] == "72.40"


def test_every_backbone_has_its_own_published_rows(standard):
    """Results of ViT-S, under the name that runs are recorded with, stand beside ViT-S's rows and no others."""
    vit = {"backbone": {"name": VIT_S}, "backbone_sha256": "c" * 64}
    records = full_set("lora_qv", seeds=[0], **vit) + full_set("full", seeds=[0], **vit) + full_set("full", seeds=[0])
    of_vim, of_vit = sorted(collect(records, standard), key=lambda c: c.backbone == VIT_S)
    assert [row.label for row in of_vit.published_rows][:2] == ["Scratch", "Full"]
    assert {of_vim.published(row).average for row in of_vim.rows} == {47.08}
    assert {row.preset: of_vit.published(row).average for row in of_vit.rows} == {"full": 53.47, "lora_qv": 68.68}
    table = comparison_table(of_vit)
    assert cells(table, "lora_qv")["Trained (K)"] and [row[0] for row in table.rows if row[1] == "–"] == [
        "Scratch", "Linear probing", "FacT-TK", "AdaptFormer", "SPT-LoRA", "Adapter+",
    ]  # fmt: skip
    (row,) = (row for row in table.rows if row[0] == "lora_qv")
    assert row[-3:] == ["58.95", "68.68", "-9.73"]
    lines = csv.DictReader(io.StringIO(to_csv([of_vim, of_vit])))
    by_line = {(line["backbone"], line["preset"]): line for line in lines if line["column"] == AVERAGE}
    assert by_line[VIT_S, "full"]["published"] == "53.47"
    assert by_line["vim_small_patch16_224", "full"]["published"] == "47.08"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_belong_to_backbones_that_exist(name):
    assert timm.is_model(name)


def test_another_recipe_is_named_and_not_compared(standard):
    changed = fake_record("vtab/cifar", "lora_p_x", 0, 0.5, trainer={"max_epochs": 3})
    (collection,) = collect([changed, *full_set("lora_p_x", [0])], standard)
    plain, changed = collection.rows
    assert collection.published(plain) is not None and collection.published(changed) is None
    assert collection.label(changed) == "lora_p_x (max_epochs=3)"


def test_runs_on_other_splits_are_apart(standard):
    splits = {"train_split": "train800", "test_split": "val200"}
    validated = [fake_record(task, "lora_p_x", 0, 0.5, dataset=splits, data_manifest="other lists") for task in ALL]
    found = collect([*full_set("lora_p_x", [0]), *validated], standard)
    assert sorted(bool(c.published_rows) for c in found) == [False, True]
    (other,) = (c for c in found if not c.published_rows)
    assert "percent on val200" in to_markdown(summary_table(other))
    assert "(official weights), on val200: summary" in to_markdown(summary_table(other))


def test_weights_of_this_project_are_not_called_official(standard):
    ours = [fake_record("mini/usps", "lora_p_x", 0, 0.5, backbone={"name": "vim_nano_patch8_64"})]
    (collection,) = collect(ours, standard)
    assert collection.title == "mini, vim_nano_patch8_64 (this project's weights)"


def test_settings_of_a_method_are_named(standard):
    method = {name: dict(spec) for name, spec in fake_record(ALL[0], "lora_p_x", 0, 0.5).config["method"].items()}
    method["lora_p_x"]["rank"] = 8
    changed = [fake_record(task, "lora_p_x", 0, 0.5, method=method) for task in ALL]
    (collection,) = collect([*full_set("lora_p_x", [0]), *changed], standard)
    assert {collection.label(row) for row in collection.rows} == {"lora_p_x", "lora_p_x (lora_p_x.rank=8)"}
    (alone,) = collect(changed, standard)
    assert [alone.label(row) for row in alone.rows] == ["lora_p_x"]  # what all rows share stands below the table
    assert "lora_p_x.rank=8" in to_markdown(summary_table(alone))
    assert not alone.published_rows


def test_every_preset_is_recognised_as_itself(standard):
    """Or as one with the same settings, as some presets for Vim-B have."""
    for name, preset in standard.presets.items():
        found, settings = standard.describe(fake_record("vtab/cifar", name, 0, 0.5).config)
        assert settings == {} and standard.presets[found].methods == preset.methods


def test_the_newer_of_the_same_run_twice_counts(standard):
    old = fake_record("vtab/cifar", "a", 0, 0.5, finished_at="2026-01-01T00:00:00+00:00")
    new = fake_record("vtab/cifar", "a", 0, 0.7, finished_at="2026-01-02T00:00:00+00:00")
    for order in ([old, new], [new, old]):
        (collection,) = collect(order, standard)
        assert collection.rows[0].score("vtab/cifar").mean == pytest.approx(70)


@pytest.mark.parametrize(
    "changes, named",
    [({"data_manifest": "other images"}, "vtab/cifar"), ({"backbone_sha256": "c" * 64}, "different weights")],
)
def test_mixed_images_or_weights_are_refused(standard, changes, named):
    records = [fake_record("vtab/cifar", "a", 0, 0.5), fake_record("vtab/cifar", "d", 0, 0.5, **changes)]
    with pytest.raises(UserError, match=f"{named}.*--allow-mixed"):
        collect(records, standard)
    (collection,) = collect(records, standard, allow_mixed=True)
    assert any(named in note for note in summary_table(collection).notes)


def test_families_and_backbones_are_apart(standard):
    small = {"name": "vim_pico_patch8_32", "weights": "random"}
    records = [
        fake_record("vtab/cifar", "a", 0, 0.5),
        fake_record("demo/digits", "a", 0, 0.5),
        fake_record("demo/digits", "a", 0, 0.5, backbone=small, backbone_sha256="c" * 64),
    ]
    found = collect(records, standard)
    assert sorted((c.family, c.backbone[:8]) for c in found) == [
        ("demo", "vim_pico"),
        ("demo", "vim_smal"),
        ("vtab", "vim_smal"),
    ]
    assert len(tables_of(found[0])) == 2  # nothing published to compare with


def test_csv_is_unrounded_and_leaves_gaps_empty(standard):
    lines = list(csv.DictReader(io.StringIO(to_csv(collect(full_set("lora_p_x")[3:], standard)))))
    by_column = {line["column"]: line for line in lines}
    assert len(lines) == 19 + 5
    assert float(by_column["Specialized"]["mean"]) == pytest.approx(60 + 4 / 3)
    assert float(by_column["Specialized"]["difference"]) == pytest.approx(60 + 4 / 3 - 83.89)
    assert by_column[AVERAGE]["mean"] == "" and by_column[AVERAGE]["tasks_done"] == "18"
    assert by_column["vtab/dtd"]["published"] == ""


def test_markdown_and_latex_are_tables(standard):
    (collection,) = collect(full_set("lora_p_x"), standard)
    for table in tables_of(collection):
        lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {len(table.header) + 1}
        text = to_latex(table)
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") for line in body} == {len(table.header) - 1}
        assert not re.search(r"(?<!\\)[_%]", "\n".join(body)) and "±" not in "\n".join(body)


# The command


def lay_out(folder: Path, records) -> Path:
    for number, record in enumerate(records):
        (folder / f"run{number}").mkdir(parents=True)
        (folder / f"run{number}" / "result.json").write_text(json.dumps(asdict(record)))
    return folder


def test_records_are_found_and_replaced_runs_are_not(tmp_path):
    lay_out(tmp_path, [fake_record("vtab/cifar", "a", seed, 0.5) for seed in (0, 1)])
    (tmp_path / "run1").rename(tmp_path / "run1.replaced-1")
    assert [record.seed for record in find_records([tmp_path])] == [0]
    with pytest.raises(UserError, match="does not exist"):
        find_records([tmp_path / "nowhere"])


def test_the_command_writes_a_file_and_refuses_mixtures(tmp_path):
    records = [fake_record("vtab/cifar", "a", seed, 0.5, data_manifest=f"images {seed}") for seed in (0, 1)]
    lay_out(tmp_path / "runs", records)
    code, _, err = crashes.command(tmp_path, SCRIPT, "runs")
    assert code == 2 and err.startswith("error: vtab/cifar was run on different images")
    out = tmp_path / "table.md"
    assert crashes.command(tmp_path, SCRIPT, "runs", "--allow-mixed", "--out", "table.md")[0] == 0
    assert "50.00 ± 0.00" in out.read_text() and "Mixed, as allowed" in out.read_text()


def test_everything_is_written_into_a_folder(tmp_path):
    runs = lay_out(tmp_path / "runs", full_set("a") + full_set("a", dataset={"test_split": "val200"}))
    code, out, err = crashes.command(tmp_path, SCRIPT, "runs", "--all", "all")
    assert code == 0 and "114 runs" in out, err
    collections = collect(find_records([runs]), read_standard(CONFIGS))
    tables = [table for collection in collections for table in tables_of(collection)]
    assert (tmp_path / "all" / "tables.md").read_text() == "\n".join(map(to_markdown, tables))
    assert (tmp_path / "all" / "tables.tex").read_text() == "\n".join(map(to_latex, tables))
    assert (tmp_path / "all" / "tables.csv").read_text() == to_csv(collections)
    assert (tmp_path / "all" / "report.html").read_text().count("<img") == 4
    pictures = {file.name for file in (tmp_path / "all").glob("*.png")}
    names = [f"{kind}-vtab-vim_small_patch16_224" for kind in ("accuracy", "tasks")]
    assert pictures == {f"{name}{end}.png" for name in names for end in ("", ".2")}
