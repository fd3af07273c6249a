"""Write a trained model for other tools: mambapeft export run=outputs/… to=onnx out=model.onnx

onnx          a file that onnxruntime runs, for any batch size (needs pip install 'mambapeft-vision[export]')
torch-export  a program that torch.export.load reads, for any batch size
timm          a folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads
official      a checkpoint (.pth or .safetensors) with the keys of the official code
peft          an adapter that Hugging Face peft loads (needs pip install 'mambapeft-vision[peft]')
lora          an adapter of ours: the LoRA that comes nearest to this adapter's changes of weights

timm and official hold the backbone with all methods merged into its weights.
onnx, torch-export, timm and peft are compared with the model. If their logits differ, nothing is written.
"""

from collections.abc import Sequence

from mambapeft_vision.run.arguments import ArgumentParser, positive
from mambapeft_vision.run.own_code import OwnCode, add_own_code_options
from mambapeft_vision.utils.console import say

FORMATS = ("onnx", "torch-export", "timm", "official", "peft", "lora")


def parser() -> ArgumentParser:
    top = ArgumentParser("mambapeft export", __doc__)
    top.add_argument("--run", required=True, help="folder of a run or adapter")
    top.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    top.add_argument("--out", required=True, help="file or new folder to write")
    top.add_argument("--weights", help="official, random or a file with the backbone's weights; default: the run's")
    add_own_code_options(top)
    top.add_argument("--int8", action="store_true", help="onnx: also write a file with int8 weights, and test both")
    top.add_argument(
        "--energy", type=float, default=0.99, help="lora: share of each change's squared norm to keep (default 0.99)"
    )
    top.add_argument("--rank", type=positive, help="lora: the rank, instead of --energy")
    return top


def main(arguments: Sequence[str]) -> None:
    options = vars(parser().parse_options(arguments))
    to, own = options.pop("to"), OwnCode(options.pop("methods"), options.pop("backbones"))
    from mambapeft_vision.integrations.export import Request, export  # PyTorch's import, for which --help need not wait

    for line in export(Request(**options, own=own), to):
        say(line)
