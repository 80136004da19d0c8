"""FastFit by three ways: its references through the network on every step, the cached path of the public code, and ours.

The public path keeps the references' keys and values and hands all keys and values, the person's too, to attention twice.
That changes nothing, as a softmax over a list and the same list again gives each half of the weight to either, and it
doubles the FLOPs of attention. All ways run the host's own UNet.
"""
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from benchmarks import _turns
from benchmarks._published import FASTFIT, META, encoded, flops, injected, unet
from pack.core.reference.bank import Bank
from pack.core.reference.fastfit import CLASSES, FastFitReference
from pack.core.reference.fastfit_checkpoint import build, renamed, unet_config
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.unet_blocks import attention_blocks
from testbed import tiny_fastfit

PERSON, CFG = (128, 96), 2.5        # latent pixels of 768 x 1024; of the published pipeline
LEVELS = ((5, 320), (5, 640), (5, 1280), (1, 1280))     # self-attention layers and channels at every resolution of SD 1.5
OUTFITS = ((1, (64, 48)), (3, (64, 48)), (3, (128, 96)))    # references and the size of their latents
TINY_SHARE = 4      # latents of the tiny model are smaller by so much


def formula(height: int, width: int) -> int:
    """Bytes of one reference in fp16: 2 x 2 sum over l of n_l T_l C_l."""
    return 2 * 2 * sum(layers * (height >> level) * (width >> level) * channels for level, (layers, channels) in enumerate(LEVELS))


def outfit(count: int, size: tuple[int, int], seed: int = 5) -> list[FastFitReference]:
    generator = torch.Generator().manual_seed(seed)
    return [FastFitReference(torch.randn(1, 4, *size, generator=generator), label) for label in CLASSES[:count]]


def evaluated(net, options: dict) -> Tensor:
    """One evaluation on one row."""
    return net(torch.empty(1, net.in_channels, *PERSON, device=META, dtype=torch.float16), torch.zeros(1, device=META), transformer_options=options)


def at_sd15(count: int, size: tuple[int, int]) -> dict:
    """fp16, one row: the other side of guidance costs as much again, by every way."""
    net, garments = unet(FASTFIT), outfit(count, size)
    made = [encoded(garment, net, PERSON, torch.float16) for garment in garments]
    entries = [entry for entry, _ in made]
    public = Scheme(net, garments, doubled=True)
    evaluated(net, public.options())        # the first one keeps what the later ones take
    ways = {"without": public.options(), "recomputed": Scheme(net, garments).options(), "with": injected(net, "unet", entries), "plain": {}}
    counts = {name: flops(lambda options=options: evaluated(net, options)) for name, options in ways.items()}
    prefill = sum(cost.total for _, cost in made)
    return {
        **{f"flops_{name}": count.total for name, count in counts.items()},
        "attention_flops_without": counts["without"].attention, "attention_flops_with": counts["with"].attention,
        "flops_prefill": prefill, "prefill_steps": round(prefill / counts["with"].total, 4),
        "entry_bytes": sum(entry.bytes for entry in entries), "formula_bytes": count * formula(*size), "exactness": entries[0].exactness,
    }


class Scheme:
    """References in the host's UNet, on every evaluation; `doubled`: on the first of a run, with all keys and values twice after that."""

    def __init__(self, net, garments: Sequence[FastFitReference], doubled: bool = False, scaled=lambda latent: latent):
        """scaled: from the VAE's latents to the network's."""
        self.net, self.garments, self.doubled, self.scaled = net, garments, doubled, scaled
        self.kept: list[dict] = []

    def options(self) -> dict:
        """Of a call of the network that goes this way."""
        return {"wrappers": {"diffusion_model": {"bench": [self.forward]}}, "cond_or_uncond": [0]}

    def attached(self, patcher):
        """A clone of the model that samples this way."""
        clone = patcher.clone()
        clone.add_wrapper_with_key("outer_sample", "bench", self.run)
        clone.add_wrapper_with_key("diffusion_model", "bench", self.forward)
        return clone

    def run(self, executor, *args, **kwargs):
        self.kept = []
        return executor(*args, **kwargs)

    def forward(self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        """x: one row for each of the call's conditions; a negative one sees zeros for every garment."""
        if not self.doubled or not self.kept:
            self.kept = [self.read(garment, transformer_options, x) for garment in self.garments]
        replaced = {place: partial(self.joined, place) for place in self.places(*x.shape[-2:])}
        options = {**transformer_options, "patches_replace": {"attn1": replaced}}
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def places(self, height: int, width: int) -> Iterator[tuple]:
        return (place for place, _, _ in attention_blocks(self.net, height, width))

    def read(self, garment: FastFitReference, options: dict, x: Tensor) -> dict:
        """Keys and values of a garment at every layer, in the rows of the call."""
        found, latent = {}, self.scaled(garment.latent)
        rows = torch.cat([torch.zeros_like(latent) if side else latent for side in options["cond_or_uncond"]]).to(x)

        def alone(place, q, k, v, extra_options):
            found[place] = (k, v)
            return self.attention(q, k, v, extra_options)

        taking = {place: partial(alone, place) for place in self.places(*latent.shape[-2:])}
        options = {"patches": self.net.as_reference(CLASSES.index(garment.label)), "patches_replace": {"attn1": taking}}
        self.net(rows, torch.zeros(len(rows), device=x.device), transformer_options=options)
        return found

    def joined(self, place: tuple, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        copies = 2 if self.doubled else 1
        keys, values = (torch.cat([*(kept[place][part] for kept in self.kept), own] * copies, 1) for part, own in ((0, k), (1, v)))
        return self.attention(q, keys, values, extra_options)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        return optimized_attention(q, k, v, extra_options["n_heads"], attn_precision=extra_options["attn_precision"], transformer_options=extra_options)


def tiny_model():
    tensors = tiny_fastfit.tensors()
    config = unet_config(tensors, "tiny")
    return build(renamed(tensors, config, "tiny"), config, dtype=torch.float32)


def on_a_tiny_model(count: int, size: tuple[int, int]) -> dict:
    """Seconds of a run with guidance, encoding included, by the three ways, and how far ours is from references that every step computes anew."""
    patcher, person = tiny_model(), tuple(side // TINY_SHARE for side in PERSON)
    garments, generator = outfit(count, tuple(side // TINY_SHARE for side in size)), torch.Generator().manual_seed(7)
    noise, shown, mask = (torch.randn(1, channels, *person, generator=generator) for channels in (4, 4, 1))
    conds = [[torch.zeros(1, 1, 768), {"concat_latent_image": shown, "concat_mask": (mask > 0).float()}]]
    handle = Handle(tuple(map(Reference, garments)))
    sides = with_references(conds, handle), with_references(conds, handle.other_side())
    ours = attach_references(patcher, Keeping(keep=False), bank=Bank())
    public, anew = (Scheme(patcher.model.diffusion_model, garments, doubled, patcher.model.process_latent_in).attached(patcher) for doubled in (True, False))
    timed = _turns.in_turn({
        "ours": lambda: _turns.sampled(ours, sides[0], noise, sides[1], CFG), "recomputed": lambda: _turns.sampled(anew, conds, noise, conds, CFG),
        "public": lambda: _turns.sampled(public, conds, noise, conds, CFG), "plain": lambda: _turns.sampled(patcher, conds, noise, conds, CFG)})
    return {**_turns.ratios(timed, "ours", {"": "recomputed", "_public": "public", "_plain": "plain"}),
            **_turns.errors(timed, "ours", "recomputed", "plain", {"_public": "public"})}


def rows():
    for count, size in OUTFITS:
        yield {"system": "FastFit", "references": count,
               "shape": f"SD 1.5, person 768 x 1024, references {size[1] * 8} x {size[0] * 8}; wall: 4 M UNet, all sides a quarter, with guidance",
               "against": "FLOPs: the cached path of the public code, which doubles keys and values; time: references computed on every step",
               **at_sd15(count, size), **on_a_tiny_model(count, size)}
