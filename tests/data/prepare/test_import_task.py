"""What importing the data package drags in."""

import subprocess
import sys

PROGRAM = """
import sys

from mambapeft_vision.utils.startup import FewMetrics

# As the commands do: Lightning imports torchmetrics, which imports huggingface_hub where transformers is installed.
sys.modules["torchmetrics"] = FewMetrics("torchmetrics")
import mambapeft_vision.data.prepare.vtab1k

def imported(*packages):
    return {name.split(".")[0] for name in sys.modules} & set(packages)

assert not (found := imported("triton", "wandb", "lightning", "sklearn", "huggingface_hub", "timm")), found

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "wandb", "mambapeft_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
mambapeft_vision.data.DemoDataModule
assert not (found := imported("triton", "wandb", "sklearn", "huggingface_hub", "timm")), found
"""


def test_the_data_package_is_light_and_needs_neither_triton_nor_wandb():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import mambapeft_vision.data

    assert not hasattr(mambapeft_vision.data, "TaskDatamodule")
