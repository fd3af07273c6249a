"""What importing the data package drags in."""

import subprocess
import sys

PROGRAM = """
import sys

import mambapeft_vision.data.prepare.vtab1k

def imported(*packages):
    return {name.split(".")[0] for name in sys.modules} & set(packages)

assert not (found := imported("triton", "wandb", "lightning", "sklearn", "huggingface_hub", "timm")), found

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "wandb", "mambapeft_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
# Where transformers is installed, as for tests against peft, Lightning's torchmetrics imports huggingface_hub with it.
import importlib.util
hub = () if importlib.util.find_spec("transformers") else ("huggingface_hub",)
mambapeft_vision.data.DemoDataModule
assert not (found := imported("triton", "wandb", "sklearn", "timm", *hub)), found
"""


def test_the_data_package_is_light_and_needs_neither_triton_nor_wandb():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import mambapeft_vision.data

    assert not hasattr(mambapeft_vision.data, "TaskDatamodule")
