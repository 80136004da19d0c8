"""What nunchaku calls the layers of a block, and what the host calls them.

FLUX.1 (nunchaku.models.transformers: transformer_flux, transformer_flux_v2), each with the name of the older and of the newer
class; Z-Image (transformer_zimage), whose feed_forward.net.0.proj is w3 above w1. All else has diffusers' names, which the host
translates itself.
"""
from collections.abc import Iterable
from typing import NamedTuple

import comfy.utils
from torch import Tensor


class Linear(NamedTuple):
    """A layer of the host from layers of the file. axis: 0 above each other, 1 beside each other. gelu: the last of them stands behind one."""

    host: str
    parts: tuple[tuple[str, ...], ...]      # for each its spellings
    axis: int = 0
    gelu: bool = False


class Modulated(NamedTuple):
    host: str
    parts: tuple[str, ...]
    splits: int


FLUX_DOUBLE = (
    Linear("img_attn.qkv", (("qkv_proj", "attn.to_qkv"),)), Linear("txt_attn.qkv", (("qkv_proj_context", "attn.add_qkv_proj"),)),
    Linear("img_attn.proj", (("out_proj", "attn.to_out.0"),)), Linear("txt_attn.proj", (("out_proj_context", "attn.to_add_out"),)),
    Linear("img_mlp.0", (("mlp_fc1", "ff.net.0.proj"),)), Linear("img_mlp.2", (("mlp_fc2", "ff.net.2"),), gelu=True),
    Linear("txt_mlp.0", (("mlp_context_fc1", "ff_context.net.0.proj"),)), Linear("txt_mlp.2", (("mlp_context_fc2", "ff_context.net.2"),), gelu=True),
    Modulated("img_mod.lin", ("norm1.linear",), 6), Modulated("txt_mod.lin", ("norm1_context.linear",), 6),
)
FLUX_SINGLE = (
    Linear("linear1", (("qkv_proj", "attn.to_qkv"), ("mlp_fc1",))), Linear("linear2", (("out_proj", "attn.to_out"), ("mlp_fc2",)), axis=1, gelu=True),
    Modulated("modulation.lin", ("norm.linear",), 3),
)
FLUX_NORMS = {
    "double_blocks": {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm",
                      "norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"},
    "single_blocks": {"norm_q": "norm.query_norm", "norm_k": "norm.key_norm"},
}
Z_IMAGE_BLOCK = (
    Linear("attention.qkv", (("attention.to_qkv",),)), Linear("attention.out", (("attention.to_out.0",),)),
    Linear("feed_forward.w2", (("feed_forward.net.2",),)),
)
W3_W1 = "feed_forward.net.0.proj"
Z_IMAGE_STACKS = ("layers", "noise_refiner", "context_refiner")


def blocks(keys: Iterable[str], stack: str) -> list[str]:
    """The blocks of a stack that the file has, as "stack.3"."""
    numbers = {key.split(".")[1] for key in keys if key.startswith(stack + ".")}
    return [f"{stack}.{number}" for number in sorted((number for number in numbers if number.isascii() and number.isdigit() and len(number) < 5), key=int)]


def move(left: dict, old: str, new: str) -> None:
    if old in left:
        left[new] = left.pop(old)


def flux_rest(left: dict, double: int, single: int) -> None:
    """Gives the tensors of FLUX that are not quantized the host's names."""
    for stack, host, count in (("transformer_blocks", "double_blocks", double), ("single_transformer_blocks", "single_blocks", single)):
        for index in range(count):
            for norm, name in FLUX_NORMS[host].items():
                for spelling in (norm, f"attn.{norm}"):
                    move(left, f"{stack}.{index}.{spelling}.weight", f"{host}.{index}.{name}.weight")
    for old, new in comfy.utils.flux_to_diffusers({}).items():      # without blocks
        if old not in left or not isinstance(left[old], Tensor):
            continue
        if isinstance(new, str):
            move(left, old, new)
        elif left[old].ndim and left[old].shape[0] % 2 == 0:
            left[new[0]] = new[2](left.pop(old))        # scale and shift change places


def z_image_rest(left: dict, counts: dict[str, int]) -> None:
    """Gives the tensors of Z-Image that are not quantized the host's names."""
    for stack, count in counts.items():
        for index in range(count):
            block = f"{stack}.{index}."
            for old, new in (("attention.norm_q", "attention.q_norm"), ("attention.norm_k", "attention.k_norm"), ("attention.to_out.0", "attention.out"),
                             ("feed_forward.net.2", "feed_forward.w2")):
                move(left, f"{block}{old}.weight", f"{block}{new}.weight")
    for old, new in comfy.utils.z_image_to_diffusers({"n_refiner_layers": 0}).items():
        if isinstance(new, str):
            move(left, old, new)
