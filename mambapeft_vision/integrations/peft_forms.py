"""How methods of ours are called in Hugging Face peft, and how their tensors lie there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PEFT_TENSOR_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Form:
    """How a method of ours is called in peft.

    config: the class of its config there.
    arguments: of that config, from our method.
    ours: the arguments of our method, from that config.
    names: our tensor → its name in peft, and how it lies there.
    """

    config: str
    arguments: Callable[[Any], dict[str, Any]]
    ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]


def same(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def column(tensor: Tensor) -> Tensor:
    return tensor[:, None]


#: Our class → its form. Tensors are named as peft's modules have them; "*" stands for the adapter's name there.
FORMS: dict[str, Form] = {
    "VeRA": Form(
        "VeraConfig",
        lambda m: {"r": m.rank, "d_initial": m.d_initial},
        lambda c: {"rank": c["r"], "d_initial": c.get("d_initial", 0.1)},
        {"d": ("vera_lambda_d.*", same), "b": ("vera_lambda_b.*", same)},
    ),
    "LoHa": Form(
        "LoHaConfig",
        lambda m: {"r": m.rank, "alpha": m.scale * m.rank},
        lambda c: {"rank": c["r"], "scale": c["alpha"] / c["r"]},
        {
            "up_1": ("hada_w1_a.*", same),
            "down_1": ("hada_w1_b.*", same),
            "up_2": ("hada_w2_a.*", same),
            "down_2": ("hada_w2_b.*", same),
        },
    ),
    "LoKr": Form(
        "LoKrConfig",
        lambda m: {"r": m.rank, "alpha": m.scale * m.rank},
        lambda c: {"rank": c["r"], "scale": c["alpha"] / c["r"]},
        {
            "first": ("lokr_w1.*", same),
            "second": ("lokr_w2.*", same),
            "up": ("lokr_w2_a.*", same),
            "down": ("lokr_w2_b.*", same),
        },
    ),
    "MiSS": Form(
        "MissConfig", lambda m: {"r": m.rank}, lambda c: {"rank": c["r"]}, {"block": ("miss_block.*", transposed)}
    ),
    "HiRA": Form(
        "HiraConfig",
        lambda m: {"r": m.rank},
        lambda c: {"rank": c["r"]},
        {"down": ("hira_A.*", same), "up": ("hira_B.*", same)},
    ),
    "HRA": Form("HRAConfig", lambda m: {"r": m.rank}, lambda c: {"rank": c["r"]}, {"u": ("hra_u.*", transposed)}),
    "OFT": Form(
        "OFTConfig",
        lambda m: {
            "r": 0,
            "oft_block_size": m.block_size,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": m.neumann_terms,
        },
        lambda c: {"block_size": c["oft_block_size"], "neumann_terms": c.get("num_cayley_neumann_terms", 5)},
        {"skew": ("oft_R.*.weight", same)},
    ),
    "BOFT": Form(
        "BOFTConfig",
        lambda m: {"boft_block_size": m.block_size, "boft_n_butterfly_factor": m.factors},
        lambda c: {"block_size": c["boft_block_size"], "factors": c["boft_n_butterfly_factor"]},
        {"blocks": ("boft_R.*", same), "scale": ("boft_s.*", column)},
    ),
    "IA3": Form("IA3Config", lambda m: {}, lambda c: {}, {"scale": ("ia3_l.*", column)}),
}
