"""The training benchmark's own parts, on the CPU in miniature."""

import pytest
from helpers import runs
from PIL import Image

from mambapeft_vision.benchmarks import training as bench_train
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.tables import find_records
from mambapeft_vision.sweep.worker_cache import Kept


def test_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "TRAIN_IMAGES", 12)
    monkeypatch.setattr(bench_train, "CLASSES", 3)
    monkeypatch.setattr(bench_train, "EPOCHS", {4: 3})
    task = bench_train.make_task(tmp_path / "task", test_images=5)
    small = [*runs.SMALL_BACKBONE, "trainer.device=cpu"]
    row = bench_train.measure(task, tmp_path / "runs", "vim_pico", "lora_p_x", 4, "fp32", Kept(), small)
    assert row["method"] == "lora_p_x" and row["batch"] == 4 and row["trainable"] > 0
    (record,) = find_records([tmp_path / "runs"])
    rates = sorted(
        epoch["images_per_second"] for epoch in read_metrics(next((tmp_path / "runs").rglob("metrics.csv")).parent)[2:]
    )
    assert rates[0] - 1 <= row["train_images_per_s"] <= rates[-1] + 1
    assert row["peak_gib"] == round(record.peak_memory_bytes / 2**30, 2) and row["trainable"] == record.trainable
    header, rule, cells = (line.strip("| ").split("|") for line in bench_train.table([row]).splitlines())
    assert [name.strip() for name in header] == list(row) and len(rule) == len(cells) == len(row)
    assert cells[1].strip() == "lora_p_x" and cells[6].strip() == f"{row['trainable']:,}"
    bench_train.plot([row, {**row, "batch": 8}], tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 500


def test_presets_that_do_not_fit_are_left_out(capsys):
    found = bench_train.presets("vim_pico")
    assert {"lora_p_x", "full", "hybrid"} <= set(found) and "lora_qv" not in found
    assert "lora_qv is left out: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matrix products (cuBLAS)"),
        ("void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float>(int)", "fused_dropout_kernel_vec"),
        ("scan_backward", "scan_backward"),
    ],
)
def test_kernel_names_are_readable(name, short):
    assert bench_train.short_name(name) == short
