"""Lists the presets (method=NAME), or describes those that are named.

mambapeft methods
mambapeft methods lora_p_x hybrid
"""

from collections.abc import Sequence

from mambapeft_vision.adapter.presets import Preset, read_presets
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.typed import nearest


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft methods", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets to describe (default: list all)")
    names = parser.parse_args(arguments).names
    presets = read_presets(configs_folder() / "method")
    for name in names:
        if name not in presets:
            raise UserError(f"{name} is no method; {nearest(name, presets)}")
    if names:
        print("\n\n".join(described(presets[name]) for name in names))
        return
    width = max(map(len, presets))
    for preset in presets.values():
        print(f"{preset.name:<{width}}  {preset.count:>12,}  {preset.what}")


def described(preset: Preset) -> str:
    """What a preset is, in a few lines."""
    return "\n".join(
        [
            f"{preset.name}: {preset.what}",
            f"  {preset.formula}",
            f"  {preset.count:,} parameters on {preset.backbone}, without the head",
            f"  paper: {preset.paper}",
            f"  {preset.run}",
        ]
    )
