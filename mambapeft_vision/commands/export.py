"""A trained model for other tools: mambapeft export run=outputs/… to=onnx out=model.onnx

onnx          an ONNX file for any batch, checked in onnxruntime (pip install 'mambapeft-vision[export]')
torch-export  a program of torch.export for any batch
timm          a folder that timm.create_model("local-dir:…", pretrained=True) loads, merged
official      a checkpoint with the keys of the official code, merged (.pth or .safetensors)
peft          an adapter for Hugging Face peft (pip install 'mambapeft-vision[peft]')
lora          the adapter of weights as a LoRA, by truncated singular value decomposition

Programs, timm folders and adapters for peft are compared with the model: other logits are an error.
"""

from collections.abc import Sequence

from mambapeft_vision.run.arguments import ArgumentParser, positive

FORMATS = ("onnx", "torch-export", "timm", "official", "peft", "lora")


def parser() -> ArgumentParser:
    top = ArgumentParser("mambapeft export", __doc__)
    top.add_argument("--run", required=True, help="folder of a run or adapter")
    top.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    top.add_argument("--out", required=True, help="file or new folder to write")
    top.add_argument("--weights", help="official, random or a file with the backbone's weights; default: the run's")
    top.add_argument("--methods", help="a folder with method files of your own, if the run used one")
    top.add_argument("--int8", action="store_true", help="onnx: also write int8 weights, and say what they cost")
    top.add_argument("--energy", type=float, default=0.99, help="lora: part of every change to keep (default 0.99)")
    top.add_argument("--rank", type=positive, help="lora: the rank, instead of --energy")
    return top


def main(arguments: Sequence[str]) -> None:
    options = vars(parser().parse_options(arguments))
    to = options.pop("to")
    from mambapeft_vision.integrations.export import Request, export  # PyTorch's import, for which --help need not wait

    for line in export(Request(**options), to):
        print(line)
