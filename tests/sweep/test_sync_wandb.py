"""Finished runs go to W&B later, once; read back from the files that its offline mode writes."""

import os
import subprocess
import sys

import pytest
import runs


@pytest.mark.slow
def test_a_finished_run_is_uploaded_once_with_history_and_summary(tmp_path):
    task = runs.lay_out_task(tmp_path / "task")
    record = runs.run(runs.overrides(task, tmp_path / "outputs", "trainer.max_epochs=2"))
    folder = runs.only_run_folder(tmp_path / "outputs")
    script = str(runs.ROOT / "scripts" / "sync_results_wandb.py")
    command = [sys.executable, script, str(tmp_path / "outputs"), "--offline", "--tags", "later"]
    environment = {**os.environ, "WANDB_MODE": "offline"}

    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 runs uploaded, 0 left alone" in done.stdout, done.stderr
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert (folder / "wandb_id.txt").read_text() in file.name
    row = runs.read_metrics(folder)[-1]
    for expected in ("train/loss", row["loss"][:8], "later", "custom/tiny", "lora_p_x", str(record.accuracy)):
        assert expected.encode() in content, expected

    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "0 runs uploaded, 1 left alone" in again.stdout
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
