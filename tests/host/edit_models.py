"""Tiny edit models with reference latents, Reference Latent Cache on them, and the references that it is held against."""
from functools import cache

import torch
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod
from harness import model, sample

from pack.core.reference.bank import Bank
from pack.core.reference.injector import attach_references
from pack.core.reference.latents import Settings, attach_reference_latents
from testbed import tiny
from testbed.kind import Kind
from testbed.zoo import NEXTDIT, ZOO

OMNI = NEXTDIT | {
    "z_image_modulation": True, "dim": 256, "axes_dims": [32, 48, 48], "pad_tokens_multiple": 8, "siglip_feat_dim": 16, "n_refiner_layers": 1, "n_layers": 3}
KINDS = {
    "flux": tiny.KINDS["flux"], "flux_longcat": ZOO["flux_longcat"], "flux2": tiny.KINDS["flux2"], "qwen_image": ZOO["qwen_image"],
    "qwen_2511": Kind(**{**vars(ZOO["qwen_image"]), "config": ZOO["qwen_image"].config | {"default_ref_method": "index_timestep_zero"}}),
    "krea2_edit": Kind(**{**vars(ZOO["krea2"]), "config": ZOO["krea2"].config | {"kvheads": 1, "default_ref_method": "index_timestep_zero"}}),
    "omni": Kind(host="ZImage", config=OMNI, channels=16, text=16),
    "omni_plain": Kind(host="ZImage", config=OMNI | {"siglip_feat_dim": None}, channels=16, text=16),
}
FREEZE = list(KINDS)


@cache
def patcher(name: str):
    tiny.KINDS.setdefault(name, KINDS[name])
    return model(name)


def references(name: str, *seeds: int, size=(8, 6)) -> list:
    kind = KINDS[name]
    shape = (1, kind.channels, *((1,) if kind.frames else ()), *size)
    return [0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def conditioning(name: str, seed: int, *refs, method: str | None = None, **more) -> list:
    """As the host's nodes make it."""
    patcher(name)
    out = tiny.conditioning(name, seed, **more)
    for latent in refs:
        out = ReferenceLatent.execute(out, {"samples": latent}).result[0]
    return out if method is None else FluxKontextMultiReferenceLatentMethod.execute(out, method).result[0]


def both(name: str, *refs, **more) -> dict:
    refs = refs or references(name, 31)
    return {"positive": conditioning(name, 11, *refs, **more), "negative": conditioning(name, 12, *refs, **more)}


def cached(patched, records=None, **settings):
    return attach_reference_latents(patched, Settings(**settings), (records if records is not None else []).append)


def exact(patched, bank=None, records=None):
    """In mode exact, with a bank of the test's own."""
    return cached(attach_references(patched, bank=Bank() if bank is None else bank), records, mode="exact")


def near(a, b, most=1e-5):
    return (a - b).abs().max() <= most


def network_of(name: str):
    return patcher(name).model.diffusion_model


class Masked:
    """An attn1_patch that lets references see references alone; all else is the host's own forward with them in the sequence."""

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **others):
        refs = sum(extra_options.get("reference_image_num_tokens", ()))
        tokens = q.shape[2]
        allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        allowed[..., tokens - refs:, :tokens - refs] = False
        return {"attn_mask": allowed}


def joint(patched=None):
    """The reference: a FLUX.2 whose attention is masked. Its conditioning must choose 'index_timestep_zero'."""
    clone = (patched or patcher("flux2")).clone()
    clone.set_model_attn1_patch(Masked())
    return clone


def compared(refs=(31,), sizes=None, patched=None, cfg=3.0, **sampling):
    """The largest difference of a run from the reference, and how far the reference is from the host's plain run."""
    refs = [latent for seed, size in zip(refs, sizes or [(8, 6)] * len(refs), strict=True) for latent in references("flux2", seed, size=size)]
    patched = patched or patcher("flux2")
    zero = both("flux2", *refs, method="index_timestep_zero")
    wanted = sample(joint(patched), "flux2", cfg=cfg, **{**zero, **sampling})
    unmasked = sample(patched, "flux2", cfg=cfg, **{**zero, **sampling})
    got = sample(exact(patched), "flux2", cfg=cfg, **{**both("flux2", *refs), **sampling})
    return (got - wanted).abs().max().item(), (unmasked - wanted).abs().max().item()


def stacks(name: str) -> list:
    net = network_of(name)
    return list(next(getattr(net, attribute) for attribute in ("single_blocks", "transformer_blocks", "blocks", "layers") if hasattr(net, attribute)))


def rows_of(name: str, patched, **sampling) -> list[int]:
    """Tokens of image and references that the last block's linear layers see, call by call."""
    texts, lengths, block = {"flux2": 512, "flux": 7, "flux_longcat": 7, "krea2_edit": 7}, [], stacks(name)[-1]
    layer = {"qwen_image": "attn.to_q", "qwen_2511": "attn.to_q", "krea2_edit": "attn.wq", "omni": "feed_forward.w1", "omni_plain": "feed_forward.w1"}.get(name)
    layer = block.get_submodule(layer or "linear1")
    handle = layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    try:
        sample(patched, name, **{**both(name), **sampling})
    finally:
        handle.remove()
    return [length - texts.get(name, 0) if length > texts.get(name, 0) else length for length in lengths]


def told(frozen, full) -> float:
    return ((frozen - full).double().norm() / full.double().norm()).item()
