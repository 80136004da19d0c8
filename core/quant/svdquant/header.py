"""What the header of a nunchaku file says of itself.

    quantization_config   {"method": "svdquant", "rank": 32, "weight": {"dtype": "int4" or "fp4_e2m1_all", ...}, ...}
    model_class           "NunchakuFluxTransformer2dModel", "NunchakuZImageTransformer2DModel", ...
    config, comfy_config  of diffusers and of nunchaku's own nodes; neither is needed here

All of it is optional. Where it says something else than the tensors, the file is refused.
"""
from dataclasses import dataclass

from ..files import WeightFile, json_of

SAID = ("quantization_config", "model_class", "comfy_config")       # no longer true of a file that was turned into another format


@dataclass(frozen=True)
class Header:
    kind: str = ""              # "int4" or "nvfp4", "" where the header does not say
    rank: int = 0               # of the low-rank branch, 0 where it does not say
    model_class: str = ""


def header(file: WeightFile) -> Header:
    text = file.metadata.get("quantization_config")
    told = json_of(text, f"'{file.name}': quantization_config") if text is not None else {}
    weight, rank = told.get("weight"), told.get("rank")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    dtype = dtype if isinstance(dtype, str) else ""
    kind = "nvfp4" if dtype.startswith("fp4") else dtype if dtype == "int4" else ""
    return Header(kind, rank if type(rank) is int and rank > 0 else 0, file.metadata.get("model_class", ""))
