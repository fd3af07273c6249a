"""One run on several devices: two processes on the CPU (and two GPUs, where they are)."""

import pytest
import torch
from helpers import crashes, runs
from helpers.stand_ins import with_gpus

from mambapeft_vision.engine.distributed import device_of_rank
from mambapeft_vision.results.record import read_record
from mambapeft_vision.utils.errors import UserError

# Nothing random in a step; batches of 13 leave one image for the last, so that one rank has none of it.
COMMON = ["method.lora_p_x.dropout=0", "+backbone.drop_path_rate=0", "dataset.batch_size=13", "trainer.max_epochs=2"]


def losses(folder):
    return [float(row["loss"]) for row in runs.read_metrics(folder)]


def train_in_forks(command):
    """The other rank is forked, as this process is; the next test starts one anew."""
    crashes.fork_ranks()
    runs.run(command)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_two_ranks_train_as_one(task, tmp_path):
    folders = {}
    for devices in (1, 2):
        command = runs.overrides(task, tmp_path / str(devices), *COMMON, f"trainer.devices={devices}")
        assert crashes.run_to_end(train_in_forks, command) == 0
        folders[devices] = runs.only_run_folder(tmp_path / str(devices))
        assert read_record(folders[devices]).config["trainer"]["devices"] == devices
    assert losses(folders[2]) == pytest.approx(losses(folders[1]), rel=1e-5)
    rows = [[row["accuracy"] for row in runs.read_metrics(folder)] for folder in folders.values()]
    assert rows[0] == rows[1]
    one, two = (runs.read_adapter_tensors(folder) for folder in folders.values())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    assert (folders[2] / "rank1.log").is_file()


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run(task, tmp_path):
    """Rank 1 imports the script as another module, and there its setup is broken."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(runs.ROOT)!r}, {str(runs.ROOT / 'tests')!r}]\n"
        "import mambapeft_vision.sweep.preload\n"  # imports in half the time
        "from helpers import runs\n"
        "from mambapeft_vision.run import fit\n"
        "if __name__ == '__main__':\n"
        "    runs.run(sys.argv[1:])\n"
        "else:\n"
        "    fit.assemble = None\n"
    )
    command = runs.overrides(task, tmp_path / "out", *COMMON, "trainer.devices=2")
    code, _, err = crashes.command(tmp_path, str(script), *command)
    assert code == 1 and "error: rank 1 ended with 1" in err


def test_each_rank_takes_its_own_gpu(monkeypatch):
    with_gpus(monkeypatch, 2)
    for name in ("auto", "cuda", "cuda:0"):
        assert [device_of_rank(name, 2, rank).index for rank in (0, 1)] == [0, 1]
    assert device_of_rank("cuda:1", 1) == torch.device("cuda", 1)
    assert device_of_rank("cpu", 99, 7) == torch.device("cpu")
    for name, count, told in (
        ("cuda", 99, r"trainer\.devices=99, but PyTorch sees 2 GPUs"),
        ("cuda:1", 2, r"takes the first 2 GPUs; leave trainer\.device=cuda:1 out"),
    ):
        with pytest.raises(UserError, match=told):
            device_of_rank(name, count)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: needs two CUDA GPUs, which are not here")
@pytest.mark.parametrize("recorded", [True, False])
def test_two_gpus_train_as_one(task, tmp_path, recorded):
    found = []
    for devices in (1, 2):
        more = [*COMMON, "trainer.device=cuda", f"trainer.devices={devices}", "trainer.precision=fp32"]
        more += [f"trainer.cuda_graph={recorded}", "trainer.max_epochs=4"]
        runs.run(runs.overrides(task, tmp_path / str(devices), *more))
        found.append(losses(runs.only_run_folder(tmp_path / str(devices))))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
