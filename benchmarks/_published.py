"""Networks at their published sizes on the meta device, where a tensor has a shape and no values, and FLOPs counted there by torch.

Nothing is computed, so a network of 12 billion weights takes no memory and a count takes a second.
"""
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import comfy.ldm.flux.model
import comfy.ops
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pack.core.reference.entry import Entry, Key
from pack.core.reference.fastfit_unet import FastFitUNet
from pack.core.reference.handle import Facts
from pack.core.reference.join import Buffers, Segment
from pack.core.reference.lend import Resident
from pack.core.reference.seams import SEAMS

META, TEXT, GUIDANCE = torch.device("meta"), 512, 3.5      # the host's guidance where a prompt names none
PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)     # what attention is made of on this device; no layer of these networks is a batched product
FLUX_DEV = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [],
}
KLEIN = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0, "axes_dim": [32, 32, 32, 32], "theta": 2000,
    "patch_size": 1, "qkv_bias": False, "guidance_embed": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0,
}
KLEIN_4B = {**KLEIN, "context_in_dim": 7680, "hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 20}
KLEIN_9B = {**KLEIN, "context_in_dim": 12288, "hidden_size": 4096, "num_heads": 32, "depth": 8, "depth_single_blocks": 24}
FASTFIT = {
    "image_size": 32, "in_channels": 9, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
    "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "num_heads": 8,
    "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "context_dim": 768, "num_class_embeds": 5,
}


class Flops(NamedTuple):
    linear: int         # and convolutions
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def flops(call: Callable[[], object]) -> Flops:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if operation in PRODUCTS)
    return Flops(sum(counts.values()) - attention, attention)


def flux(config: dict):
    """A FLUX of these sizes, bf16."""
    return comfy.ldm.flux.model.Flux(**config, device=META, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)


def unet(config: dict):
    return FastFitUNet(**config, device=META, dtype=torch.float16, operations=comfy.ops.disable_weight_init)


def evaluated(net, height: int, width: int, options: dict | None = None, **more) -> Tensor:
    """One evaluation of a FLUX on one row; height and width of the latent."""
    def some(*shape: int) -> Tensor:
        return torch.empty(shape, device=META, dtype=torch.bfloat16)

    params = net.params
    pooled = some(1, params.vec_in_dim) if params.vec_in_dim else None
    guidance = torch.empty(1, device=META) if params.guidance_embed else None
    return net(some(1, params.in_channels, height, width), torch.empty(1, device=META), some(1, TEXT, params.context_in_dim), y=pooled,
               guidance=guidance, transformer_options=options or {}, **more)


def encoded(recipe, net, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Entry, Flops]:
    """The entry that a recipe makes of itself, and what that costs. shape: of the sampled latent."""
    model = SimpleNamespace(diffusion_model=net, process_latent_in=lambda latent: latent)
    facts = Facts(model, "", True, shape, None, GUIDANCE, None, dtype, META, {})
    blocks, ids = {}, []
    cost = flops(lambda: ids.append(recipe.fill(facts, lambda name, k, v: blocks.update({name: (k, v)}))))
    return Entry(recipe.family, blocks, Key({}), recipe.source, recipe.rope, ids[0], recipe.exactness), cost


def injected(net, seam: str, entries: list[Entry]) -> dict:
    """Options of a call with these entries in its attention."""
    return SEAMS[seam]({}, net, [Segment([Resident(entry, META)]) for entry in entries], Buffers())
