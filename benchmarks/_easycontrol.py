"""EasyControl by three ways: the masked joint attention of all tokens on every step, the scheme of the public code, and ours.

The public scheme caches the conditions' keys and values and what they attend to, and still sends their tokens through every
linear layer on every step; ours sends them once. Joint and public run the host's own forward, with the condition's tokens
behind the image's.
"""
import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import _turns
from benchmarks._published import FLUX_DEV, GUIDANCE, META, encoded, evaluated, flops, flux, injected
from pack.core.reference.bank import Bank
from pack.core.reference.easycontrol import Adapter, EasyControl
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.prefill import vector
from testbed import tiny

SIDE, CONDITION, RANK = 128, 64, 128        # latent pixels of picture and condition; of the published adapters
BYTES = 700_416                             # of a token: 57 blocks x 3072 channels x K and V x 2 bytes
TINY, TINY_SIDE, TINY_CONDITION, TINY_RANK = "flux_13m", 32, 16, 8


def random_adapter(width: int, double: int, single: int, slots: int, rank: int, device: torch.device | str = "cpu") -> Adapter:
    generator = None if str(device) == "meta" else torch.Generator().manual_seed(3)

    def pair():
        down, up = (torch.randn(shape, generator=generator, device=device) for shape in ((rank, width), (width, rank)))
        return down / math.sqrt(width), up / math.sqrt(rank) / 2

    def slot():
        return ({f"double.{i}": {part: pair() for part in ("q", "k", "v", "proj")} for i in range(double)}
                | {f"single.{i}": {part: pair() for part in "qkv"} for i in range(single)})

    return Adapter(tuple(slot() for _ in range(slots)), "random", "random")


def conditions_of(adapter: Adapter, side: int, seed: int = 5) -> list[EasyControl]:
    generator = torch.Generator().manual_seed(seed)
    return [EasyControl(adapter, torch.randn(1, 16, side, side, generator=generator), slot=i) for i in range(len(adapter.slots))]


def at_flux_dev(references: int) -> dict:
    """1024 x 1024, 512 text tokens, conditions of 512 x 512, bf16. The public scheme is counted without its adapter's layers, so in its favour."""
    net = flux(FLUX_DEV)
    conditions = conditions_of(random_adapter(3072, 19, 38, references, RANK, META), CONDITION)
    made = [encoded(condition, net, (SIDE, SIDE), torch.bfloat16) for condition in conditions]
    entries = [entry for entry, _ in made]
    schemes = {name: Scheme(net, conditions, cached, adapted=False) for name, cached in (("without", True), ("joint", False))}
    evaluated(net, SIDE, SIDE, schemes["without"].options())    # the first one keeps what the later ones take
    count = {name: flops(lambda scheme=scheme: evaluated(net, SIDE, SIDE, scheme.options())).total for name, scheme in schemes.items()}
    count["with"] = flops(lambda: evaluated(net, SIDE, SIDE, injected(net, "flux", entries))).total
    count["plain"] = flops(lambda: evaluated(net, SIDE, SIDE)).total
    prefill = sum(cost.total for _, cost in made)
    return {
        **{f"flops_{name}": number for name, number in count.items()}, "flops_prefill": prefill, "prefill_steps": round(prefill / count["with"], 4),
        "entry_bytes": sum(entry.bytes for entry in entries), "formula_bytes": sum(BYTES * condition.tokens for condition in conditions),
        "exactness": entries[0].exactness,
    }


class Scheme:
    """The condition's tokens in the host's forward, on every step: `cached` as the public code has it, else the masked joint attention."""

    def __init__(self, net, conditions: Sequence[EasyControl], cached: bool, adapted: bool = True, scaled=lambda latent: latent):
        """adapted: whether the adapter's layers run; scaled: from the VAE's latents to the network's."""
        self.net, self.conditions, self.cached, self.adapted, self.scaled = net, conditions, cached, adapted, scaled
        self.sizes = [condition.tokens for condition in conditions]
        self.kept: dict[tuple[str, int], Tensor] = {}       # what the conditions attended to, by block

    def options(self) -> dict:
        """Of a call of the network that goes this way."""
        return {"wrappers": {"diffusion_model": {"bench": [self.forward]}}, "patches": {"post_input": [self.positioned]}}

    def attached(self, patcher):
        """A clone of the model that samples this way."""
        clone = patcher.clone()
        clone.add_wrapper_with_key("outer_sample", "bench", self.run)
        clone.add_wrapper_with_key("diffusion_model", "bench", self.forward)
        clone.set_model_post_input_patch(self.positioned)
        return clone

    def run(self, executor, *args, **kwargs):
        self.kept = {}
        return executor(*args, **kwargs)

    def positioned(self, given: dict) -> dict:
        begin = given["img"].shape[1] - sum(self.sizes)
        ids = torch.cat([condition.ids(self.shape) for condition in self.conditions]).to(given["img_ids"].device)
        given["img_ids"] = torch.cat([given["img_ids"][:, :begin], ids[None].expand(len(given["img"]), -1, -1)], dim=1)
        return given

    def forward(self, executor, x, timestep, context, *args, **kwargs):
        """x: one row."""
        self.shape, self.text, self.image = tuple(x.shape[-2:]), context.shape[1], x.shape[-2] * x.shape[-1] // 4
        own = self.text + self.image
        latents = [self.scaled(condition.latent).to(x) for condition in self.conditions]
        owner = torch.cat([torch.zeros(own), *(torch.full((size,), i + 1.0) for i, size in enumerate(self.sizes))])
        mask = ((owner[:, None] == 0) | (owner[:, None] == owner[None])).to(x.device)
        y, guidance, _, control, options = args
        self.still = vector(self.net, 0.0, GUIDANCE, y, x.dtype, x.device)
        options = {**options, "optimized_attention_override": self.attention} if self.cached else options
        with ExitStack() as stack:
            for layer, change in self.taps():
                stack.callback(layer.register_forward_hook(change).remove)
            return executor(x, timestep, context, y, guidance, latents, control, options, ref_latents_method="index", **kwargs,
                            **({} if self.cached else {"attention_mask": mask[None, None]}))

    def attention(self, function, q, k, v, heads, *args, transformer_options=None, **kwargs):
        """Own queries alone; what the conditions attend to, each to itself, is kept from the first evaluation on."""
        more, block = sum(self.sizes), (transformer_options["block_type"], transformer_options["block_index"])
        kwargs["transformer_options"] = transformer_options
        if block not in self.kept:
            each = zip(*(tensor[:, :, -more:].split(self.sizes, 2) for tensor in (q, k, v)), strict=True)
            self.kept[block] = torch.cat([function(*part, heads, *args, **kwargs) for part in each], dim=1)
        return torch.cat([function(q[:, :, :-more], k, v, heads, *args, **kwargs), self.kept[block]], dim=1)

    def taps(self):
        for name, blocks in (("double", self.net.double_blocks), ("single", self.net.single_blocks)):
            for i, block in enumerate(blocks):
                first = block.img_attn.qkv if name == "double" else block.linear1
                yield (block.img_mod if name == "double" else block.modulation), self.modulated
                if not self.adapted:
                    continue
                yield first, lambda module, args, output, key=f"{name}.{i}": self.added(args[0], output, key, "qkv")
                if name == "double":
                    yield block.img_attn.proj, lambda module, args, output, key=f"double.{i}": self.added(output, output, key, ("proj",))

    def modulated(self, module, args, output):
        """Shift, scale and gate of every token: those of the step for text and image, of t = 0 for the conditions."""
        more, text = sum(self.sizes), self.text if module.is_double is False else 0
        parts = []
        for moving, still in zip(output, module.forward(self.still), strict=True):
            parts.append(moving and type(moving)(*(
                torch.cat([a.expand(-1, text + self.image, -1), b.expand(-1, more, -1)], dim=1)
                for a, b in ((getattr(moving, name), getattr(still, name)) for name in ("shift", "scale", "gate")))))
        return tuple(parts)

    def added(self, x: Tensor, output: Tensor, key: str, parts) -> Tensor:
        output, begin, width = output.clone(), x.shape[1] - sum(self.sizes), self.net.hidden_size
        for condition, size in zip(self.conditions, self.sizes, strict=True):
            rows = x[:, begin:begin + size].clone()
            for i, part in enumerate(parts):
                down, up = condition.adapter.slots[condition.slot][key][part]
                output[:, begin:begin + size, i * width:(i + 1) * width] += condition.strength * linear(linear(rows, down), up)
            begin += size
        return output


def on_a_tiny_model(references: int) -> dict:
    """Seconds of a run, encoding included, by the three ways, and how far ours is from the joint attention."""
    patcher = tiny.patcher(TINY)
    net = patcher.model.diffusion_model
    conditions = conditions_of(random_adapter(net.hidden_size, len(net.double_blocks), len(net.single_blocks), references, TINY_RANK), TINY_CONDITION)
    conds, noise = tiny.conditioning(TINY, 11), tiny.noise(TINY, size=TINY_SIDE)
    ours = attach_references(patcher, Keeping(keep=False), bank=Bank())
    public, joint = (Scheme(net, conditions, cached, scaled=patcher.model.process_latent_in).attached(patcher) for cached in (True, False))
    positive = with_references(conds, Handle(tuple(map(Reference, conditions))))
    timed = _turns.in_turn({
        "ours": lambda: _turns.sampled(ours, positive, noise), "public": lambda: _turns.sampled(public, conds, noise),
        "joint": lambda: _turns.sampled(joint, conds, noise), "plain": lambda: _turns.sampled(patcher, conds, noise)})
    return {**_turns.ratios(timed, "ours", {"": "public", "_joint": "joint", "_plain": "plain"}),
            **_turns.errors(timed, "ours", "joint", "plain", {"_public": "public"})}


def rows():
    for references in (1, 2):
        yield {"system": "EasyControl", "references": references, "shape": "FLUX.1-dev, 1024 x 1024, conditions 512 x 512; wall: 13 M FLUX, 256 x 256",
               "against": "the cached path of the public code", **at_flux_dev(references), **on_a_tiny_model(references)}
