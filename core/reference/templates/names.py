"""The names of an image template's weights (`Flux2DiTVariantModel`), and the host's for the same ones.

Query, key and value are one matrix on both sides, so nothing but names changes. What belongs to a layer beside its
weight, such as the scale of an fp8 one, goes with it.
"""
import re
from collections.abc import Mapping

import torch
from torch import Tensor

DOUBLE = {f"{side}_{theirs}": f"{side}_{ours}" for side in ("img", "txt") for theirs, ours in {
    "to_qkv": "attn.qkv", "to_out": "attn.proj", "norm_q": "attn.norm.query_norm", "norm_k": "attn.norm.key_norm",
    "ff.linear_in": "mlp.0", "ff.linear_out": "mlp.2"}.items()}
SINGLE = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2", "norm_q": "norm.query_norm", "norm_k": "norm.key_norm"}
ONCE = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin", "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin", "img_embedder": "img_in", "txt_embedder": "txt_in",
}
WIDTHS = {     # rows and columns of a matrix in widths of the model; the others are told by `size`
    **{f"{side}_{name}": shape for side in ("img", "txt") for name, shape in {
        "to_qkv": (3, 1), "to_out": (1, 1), "ff.linear_in": (6, 1), "ff.linear_out": (1, 3)}.items()},
    "to_qkv_mlp_proj": (9, 1), "to_out": (1, 4), "time_guidance_embed.timestep_embedder.linear_2": (1, 1),
    "double_stream_modulation_img.linear": (6, 1), "double_stream_modulation_txt.linear": (6, 1), "single_stream_modulation.linear": (3, 1),
}
TIME, HEAD = 256, 128       # channels of the time's code, and of a head
UNUSED = ("norm_out", "proj_out")       # behind the last block; the host wants them, so it gets zeros
CHANNELS = 128      # of a FLUX.2 token
KEY = re.compile(r"(?:(single_)?transformer_blocks\.(\d+)\.)?(.+)\.([a-z_]+)")


def split(key: str) -> tuple[str, str, str] | None:
    """Block ("double_0", or none), module as the file has it, and the host's name of the whole key, empty where it has no use for it."""
    match = KEY.fullmatch(key)
    if match is None:
        return None
    single, index, module, tail = match.groups()
    if index is None:
        if module.split(".")[0] in UNUSED:
            return "", module, ""
        return ("", module, f"{ONCE[module]}.{tail}") if module in ONCE else None
    names, kind = (SINGLE, "single") if single else (DOUBLE, "double")
    if module not in names:
        return None
    return f"{kind}_{index}", f"{single or ''}transformer_blocks.{index}.{module}", f"{kind}_blocks.{index}.{names[module]}.{tail}"


def size(module: str, width: int, text: int) -> tuple[int, ...]:
    """Shape of a module's weight; text: channels of a text token."""
    name = re.sub(r"^(single_)?transformer_blocks\.\d+\.", "", module)
    if name in WIDTHS:
        return WIDTHS[name][0] * width, WIDTHS[name][1] * width
    if "norm_" in name:
        return (HEAD,)
    return width, {"img_embedder": CHANNELS, "txt_embedder": text}.get(name, TIME)


def renamed(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The weights by the host's names, with zeros for what stands behind the last block."""
    found = {ours: tensor for key, tensor in tensors.items() if (ours := split(key)[2])}
    plain = tensors["img_embedder.weight"].dtype
    return {**found, "final_layer.linear.weight": torch.zeros(CHANNELS, width, dtype=plain),
            "final_layer.adaLN_modulation.1.weight": torch.zeros(2 * width, width, dtype=plain)}
