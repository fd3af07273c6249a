"""The training benchmark's own parts, on the CPU in miniature."""

import bench_train
import pytest
from helpers import runs

from mambapeft_vision.sweep.worker_cache import Kept


def test_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "TRAIN_IMAGES", 12)
    monkeypatch.setattr(bench_train, "CLASSES", 3)
    monkeypatch.setattr(bench_train, "EPOCHS", {4: 3})
    task = bench_train.make_task(tmp_path / "task", test_images=5)
    small = [*runs.SMALL_BACKBONE, "trainer.device=cpu"]
    row = bench_train.measure(task, tmp_path / "runs", "lora_p_x", 4, "fp32", Kept(), small)
    assert row["method"] == "lora_p_x" and row["batch"] == 4 and row["trainable"] > 0
    assert row["train_images_per_s"] > 0 and row["peak_gib"] > 0
    assert bench_train.table([row]).count("\n") == 2
    bench_train.plot([row, {**row, "batch": 8}], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


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
    assert bench_train._short(name) == short
