"""The names and tensor layouts of our methods in Hugging Face peft."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

PEFT_TENSOR_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Form:
    """One of our methods as peft has it.

    config: the class of its config there.
    sizes: our argument → the config's.
    tensors: our tensor → its name in a module of peft's; "*" stands for the adapter's name there.
    transposed: tensors of ours whose last two axes are swapped there.
    vectors: tensors of ours that have further axes of size 1 there.
    has_alpha: whether our scale is alpha / r there.
    constants: further keys of the config that it needs to mean the same.
    shared: our buffer → the name in peft of a tensor that all modules share.
    """

    config: str
    sizes: Mapping[str, str]
    tensors: Mapping[str, str]
    transposed: Collection[str] = ()
    vectors: Collection[str] = ()
    has_alpha: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def to_config(self, method: Any) -> dict[str, Any]:
        """The arguments of peft's config, from our method."""
        alpha = {"alpha": method.scale * method.rank} if self.has_alpha else {}
        return {**{theirs: getattr(method, ours) for ours, theirs in self.sizes.items()}, **alpha, **self.constants}

    def from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of our method, from peft's config. Raises KeyError, TypeError, … for one that is not peft's."""
        scale = {"scale": config["alpha"] / config["r"]} if self.has_alpha else {}
        return {**{ours: config[theirs] for ours, theirs in self.sizes.items()}, **scale}


_RANK = {"rank": "r"}

#: Our class → its form.
FORMS: dict[str, Form] = {
    "VeRA": Form(
        "VeraConfig",
        {**_RANK, "d_initial": "d_initial"},
        {"d": "vera_lambda_d.*", "b": "vera_lambda_b.*"},
        shared={"random_down": "vera_A", "random_up": "vera_B"},
    ),
    "LoHa": Form(
        "LoHaConfig",
        _RANK,
        {"up_1": "hada_w1_a.*", "down_1": "hada_w1_b.*", "up_2": "hada_w2_a.*", "down_2": "hada_w2_b.*"},
        has_alpha=True,
    ),
    "LoKr": Form(
        "LoKrConfig",
        _RANK,
        {"first": "lokr_w1.*", "second": "lokr_w2.*", "up": "lokr_w2_a.*", "down": "lokr_w2_b.*"},
        has_alpha=True,
    ),
    "MiSS": Form("MissConfig", _RANK, {"block": "miss_block.*"}, transposed=("block",)),
    "HiRA": Form("HiraConfig", _RANK, {"down": "hira_A.*", "up": "hira_B.*"}),
    "HRA": Form("HRAConfig", _RANK, {"u": "hra_u.*"}, transposed=("u",)),
    "OFT": Form(
        "OFTConfig",
        {"block_size": "oft_block_size", "neumann_terms": "num_cayley_neumann_terms"},
        {"skew": "oft_R.*.weight"},
        constants={"r": 0, "use_cayley_neumann": True},
    ),
    "BOFT": Form(
        "BOFTConfig",
        {"block_size": "boft_block_size", "factors": "boft_n_butterfly_factor"},
        {"blocks": "boft_R.*", "scale": "boft_s.*"},
        vectors=("scale",),
    ),
    "IA3": Form("IA3Config", {}, {"scale": "ia3_l.*"}, vectors=("scale",)),
}
