"""EasyControl by three ways: the masked joint attention of all tokens on every step, the scheme of the public code, and ours.

The public scheme caches the conditions' keys and values and what they attend to, and still sends their tokens through every
linear layer on every step; ours sends them once. Joint and public run the host's own forward, with the condition's tokens
behind the image's.
"""
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import comfy.ldm.flux.model
import comfy.ops
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from pack.core.reference.bank import Bank
from pack.core.reference.easycontrol import Adapter, EasyControl
from pack.core.reference.entry import Entry, Key
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.join import Buffers, Segment
from pack.core.reference.lend import Resident
from pack.core.reference.prefill import vector
from pack.core.reference.seams import SEAMS
from testbed import tiny

FLUX_DEV = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [],
}
TEXT, SIDE, CONDITION = 512, 128, 64        # tokens; latent pixels of picture and condition
TINY, STEPS, ROUNDS = "flux_13m", 20, 5


def random_adapter(width: int, double: int, single: int, slots: int, rank: int = 8, device: str = "cpu") -> Adapter:
    generator = torch.Generator().manual_seed(3)

    def pair():
        if device == "meta":
            return torch.empty(rank, width, device="meta"), torch.empty(width, rank, device="meta")
        return (torch.randn(rank, width, generator=generator) / math.sqrt(width), torch.randn(width, rank, generator=generator) / math.sqrt(rank) / 2)

    def slot():
        return ({f"double.{i}": {part: pair() for part in ("q", "k", "v", "proj")} for i in range(double)}
                | {f"single.{i}": {part: pair() for part in "qkv"} for i in range(single)})

    return Adapter(tuple(slot() for _ in range(slots)), "random", "random")


def flops(call: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def at_flux_dev(references: int) -> dict:
    """FLOPs of one evaluation on the meta device, bf16, 1024 x 1024, 512 text tokens, conditions of 512 x 512."""
    kind = {"device": "meta", "dtype": torch.bfloat16}
    net = comfy.ldm.flux.model.Flux(**FLUX_DEV, **kind, operations=comfy.ops.disable_weight_init)
    tokens = (CONDITION // 2) ** 2

    def forward(options=None, **more):
        return net(torch.empty(1, 16, SIDE, SIDE, **kind), torch.empty(1, device="meta"), torch.empty(1, TEXT, 4096, **kind),
                   y=torch.empty(1, 768, **kind), guidance=torch.empty(1, device="meta"), transformer_options=options or {}, **more)

    blocks = {f"{name}.{i}": tuple(torch.empty(1, 24, tokens, 128, **kind) for _ in range(2)) for name, n in (("double", 19), ("single", 38)) for i in range(n)}
    entry = Entry("flux", blocks, Key({}), "", "pre", torch.empty(tokens, 3, device="meta"))
    segments = [Segment([Resident(entry, torch.device("meta"))]) for _ in range(references)]
    latents = [torch.empty(1, 16, CONDITION, CONDITION, **kind)] * references
    seen = 2 * 2 * (TEXT + (SIDE // 2) ** 2) * tokens * references * 3072       # what the public scheme's own tokens attend to; the rest is linear
    joint = flops(lambda: forward(ref_latents=latents, ref_latents_method="index"))
    everything = TEXT + (SIDE // 2) ** 2 + references * tokens
    attended = 4 * everything ** 2 * 3072
    own = 4 * (TEXT + (SIDE // 2) ** 2) ** 2 * 3072
    return {
        "flops_plain": flops(forward), "flops_joint": joint, "flops_without": joint - 57 * (attended - own - seen),
        "flops_with": flops(lambda: forward(SEAMS["flux"]({}, net, segments, Buffers()))),
        "entry_bytes": references * entry.bytes, "formula_bytes": references * (700_416 * tokens + 3 * 4 * tokens),
    }


class Scheme:
    """The condition's tokens in the host's forward, on every step: `cached` as the public code has it, else the masked joint attention."""

    def __init__(self, patcher, conditions: Sequence[EasyControl], cached: bool):
        self.net, self.real, self.conditions, self.cached = patcher.model.diffusion_model, patcher.model, conditions, cached
        self.sizes = [condition.tokens for condition in conditions]

    def attached(self, patcher):
        """A clone of the model that samples this way."""
        clone = patcher.clone()
        clone.add_wrapper_with_key("diffusion_model", "bench", self.forward)
        clone.set_model_post_input_patch(self.positioned)
        return clone

    def positioned(self, given: dict) -> dict:
        begin = given["img"].shape[1] - sum(self.sizes)
        ids = torch.cat([condition.ids(self.shape) for condition in self.conditions])
        given["img_ids"] = torch.cat([given["img_ids"][:, :begin], ids[None].expand(len(given["img"]), -1, -1)], dim=1)
        return given

    def forward(self, executor, x, timestep, context, *args, **kwargs):
        """x: one row."""
        self.shape, self.text, self.image = tuple(x.shape[-2:]), context.shape[1], x.shape[-2] * x.shape[-1] // 4
        own = self.text + self.image
        latents = [self.real.process_latent_in(condition.latent) for condition in self.conditions]
        owner = torch.cat([torch.zeros(own), *(torch.full((size,), i + 1.0) for i, size in enumerate(self.sizes))])
        mask = (owner[:, None] == 0) | (owner[:, None] == owner[None])
        y, guidance, _, control, options = args
        self.still = vector(self.net, 0.0, float(guidance), y, x.dtype, x.device)
        options = {**options, "optimized_attention_override": self.attention} if self.cached else options
        with ExitStack() as stack:
            for layer, change in self.taps():
                stack.callback(layer.register_forward_hook(change).remove)
            return executor(x, timestep, context, y, guidance, latents, control, options, ref_latents_method="index", **kwargs,
                            **({} if self.cached else {"attention_mask": mask[None, None]}))

    def attention(self, function, q, k, v, heads, *args, **kwargs):
        """Own queries alone; what the conditions attend to is taken as kept."""
        more = sum(self.sizes)
        out = function(q[:, :, :-more], k, v, heads, *args, **kwargs)
        return torch.cat([out, out.new_zeros(out.shape[0], more, out.shape[2])], dim=1)

    def taps(self):
        for name, blocks in (("double", self.net.double_blocks), ("single", self.net.single_blocks)):
            for i, block in enumerate(blocks):
                first = block.img_attn.qkv if name == "double" else block.linear1
                yield (block.img_mod if name == "double" else block.modulation), self.modulated
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


def sampled(patcher, conds, noise: Tensor, steps: int) -> Tensor:
    with torch.inference_mode():
        return comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", conds, conds, noise * 0, disable_pbar=True, seed=1)


def on_a_tiny_model(references: int) -> dict:
    """Seconds of a run of 20 steps by the three ways, how far ours is from the joint attention, and what encoding costs in evaluations."""
    patcher = tiny.patcher(TINY)
    net = patcher.model.diffusion_model
    adapter = random_adapter(net.hidden_size, len(net.double_blocks), len(net.single_blocks), references)
    generator = torch.Generator().manual_seed(5)
    conditions = [EasyControl(adapter, torch.randn(1, 16, 16, 16, generator=generator), slot=i) for i in range(references)]
    conds, noise = tiny.conditioning(TINY, 11), torch.randn(1, 16, 32, 32, generator=generator)
    handle, records = Handle(tuple(map(Reference, conditions))), []
    ours = attach_references(patcher, Keeping(keep=False), records.append, Bank())
    ways = {"with": (ours, with_references(conds, handle)), "without": (Scheme(patcher, conditions, True).attached(patcher), conds),
            "joint": (Scheme(patcher, conditions, False).attached(patcher), conds)}
    seconds, latents = {name: [] for name in ways}, {}
    for _ in range(ROUNDS + 1):     # the first one warms up
        for name, (model, positive) in ways.items():
            begun = time.perf_counter()
            latents[name] = sampled(model, positive, noise, STEPS)
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    made = statistics.median(record.seconds for record in records[1:])
    return {
        "wall_ratio": round(median["with"] / median["without"], 4), "wall_ratio_joint": round(median["with"] / median["joint"], 4),
        "prefill_steps": round(made / ((median["with"] - made) / STEPS), 3), "max_abs_error": (latents["with"] - latents["joint"]).abs().max().item(),
    }


def rows():
    for references in (1, 2):
        print(f"EasyControl, {references} condition{'s' * (references > 1)} ...", flush=True)
        row = {"system": "EasyControl", "references": references, "shape": "FLUX.1-dev, 1024 x 1024, conditions 512 x 512; wall: 13 M FLUX, 256 x 256",
               **at_flux_dev(references), **on_a_tiny_model(references), "exactness": "exact"}
        yield row
