"""Diffusion Templates of a picture by two ways: the template's network, which is as large as the model, run beside every step, and ours.

The public pipeline runs it once as well; what a row is compared with is the work that a step would be without a cache.
"""
from types import SimpleNamespace

import torch
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor

from benchmarks import _turns
from benchmarks._klein import SIDE, TINY_SIDE, latents, tiny_model
from benchmarks._published import KLEIN_4B, META, TEXT, evaluated, flops, flux, injected
from pack.core.reference.bank import Bank
from pack.core.reference.entry import Key
from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.templates import template_of
from pack.core.reference.templates.base import entry_of
from pack.core.reference.templates.image import Capture
from pack.core.reference.templates.merge import referred
from pack.core.reference.templates.names import DOUBLE, ONCE, SINGLE
from testbed import tiny

BYTES, PLACE = 307_200, 10.0    # of a token: 25 blocks x 3072 channels x K and V x 2; of the first picture on the axis of references


def in_memory(network):
    """What a file of this network's weights, under the names that templates have, is read to."""
    names = {}
    for theirs, ours in DOUBLE.items():
        names |= {f"double_blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}" for i in range(len(network.double_blocks))}
    for theirs, ours in SINGLE.items():
        names |= {f"single_blocks.{i}.{ours}": f"single_transformer_blocks.{i}.{theirs}" for i in range(len(network.single_blocks))}
    names |= {ours: theirs for theirs, ours in ONCE.items()}
    tensors = {f"{names[module]}.{tail}": tensor.detach() for key, tensor in network.state_dict().items()
               for module, _, tail in [key.rpartition(".")] if module in names}
    return template_of(SimpleNamespace(name="random", digest="random", types=("F32",), shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
                                       tensors=lambda: tensors))


class Beside:
    """The template's network before every evaluation of the model, whose attention gets its tokens behind the rotation."""

    def __init__(self, net, latent: Tensor):
        """latent: as the network takes it."""
        self.net, self.latent, self.pairs = net, latent, {}

    def attached(self, patcher):
        clone = patcher.clone()
        clone.add_wrapper_with_key("diffusion_model", "bench", self.forward)
        clone.model_options["transformer_options"]["optimized_attention_override"] = self.attention
        return clone

    def options(self) -> dict:
        return {"wrappers": {"diffusion_model": {"bench": [self.forward]}}, "optimized_attention_override": self.attention}

    def forward(self, executor, x, timestep, context, *args, **kwargs):
        """x: one row."""
        options = {"patches": {"attn1_patch": [self.take]}, "rope_options": {"shift_t": PLACE}}
        self.net(self.latent.to(x), torch.zeros(1, device=x.device), context, transformer_options=options)
        return executor(x, timestep, context, *args, **kwargs)

    def take(self, q: Tensor, k: Tensor, v: Tensor, pe=None, extra_options=None, **others) -> dict:
        self.pairs[extra_options["block_type"], extra_options["block_index"]] = apply_rope1(k, pe), v
        return {}

    def attention(self, function, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, transformer_options=None, **kwargs) -> Tensor:
        pair = self.pairs[transformer_options["block_type"], transformer_options["block_index"]]
        keys, values = (torch.cat([own, more], 2) for own, more in zip((k, v), pair, strict=True))
        return function(q, keys, values, heads, *args, transformer_options=transformer_options, **kwargs)


def at_klein() -> dict:
    """bf16, 1024 x 1024, 512 text tokens, a template's picture of 1024 x 1024."""
    net, blocks = flux(KLEIN_4B), {}
    taking = {"patches": {"attn1_patch": [Capture(lambda name, k, v: blocks.update({name: (k, v)}))]}}
    prefill = flops(lambda: evaluated(net, SIDE, SIDE, taking))
    entry = entry_of(blocks, Key({}), "random", "post")
    beside = Beside(net, torch.empty(1, 128, SIDE, SIDE, device=META))
    count = {"without": flops(lambda: evaluated(net, SIDE, SIDE, beside.options())),
             "with": flops(lambda: evaluated(net, SIDE, SIDE, injected(net, "flux", [entry]))), "plain": flops(lambda: evaluated(net, SIDE, SIDE))}
    return {
        **{f"flops_{name}": number.total for name, number in count.items()}, "flops_prefill": prefill.total,
        "linear_flops_of_tokens": count["with"].linear - count["plain"].linear,
        "prefill_steps": round(prefill.total / count["with"].total, 4), "entry_bytes": entry.bytes, "formula_bytes": BYTES * (TEXT + SIDE ** 2),
        "exactness": entry.exactness,
    }


def on_a_tiny_model() -> dict:
    """Seconds of a run by the two ways, encoding included, and how far they are apart."""
    patcher, other, (latent,) = tiny_model(), tiny_model(seed=1), latents(1, TINY_SIDE)
    conds, noise = tiny.conditioning("flux2", 11), tiny.noise("flux2", size=TINY_SIDE)
    template, ours = in_memory(other.model.diffusion_model), attach_references(patcher, bank=Bank())
    beside = Beside(other.model.diffusion_model, other.model.process_latent_in(latent)).attached(patcher)

    def encoding():
        entry = template.entry(conds[0][0], [latent], Bank())
        return _turns.sampled(ours, with_references(conds, referred(entry)), noise)

    timed = _turns.in_turn({"ours": encoding, "beside": lambda: _turns.sampled(beside, conds, noise), "plain": lambda: _turns.sampled(patcher, conds, noise)})
    return {**_turns.ratios(timed, "ours", {"": "beside", "_plain": "plain"}), **_turns.errors(timed, "ours", "beside", "plain")}


def rows():
    yield {"system": "Diffusion Templates, image", "references": 1,
           "shape": "FLUX.2-klein-base-4B, 1024 x 1024, a template's picture of 1024 x 1024; wall: FLUX.2 of 2 + 3 blocks of width 256, 256 tokens each",
           "against": "the template's network run on every step", **at_klein(), **on_a_tiny_model()}
