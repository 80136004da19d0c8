"""EasyControl against an explicit masked joint attention, written from the paper's description over the same weights."""
import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from harness import model, sample
from torch.nn import functional as F

from pack.core.reference.bank import Bank
from pack.core.reference.easycontrol import Adapter, EasyControl
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from testbed import tiny


def adapter(network, slots=1, rank=4, seed=3, scale=0.5) -> Adapter:
    generator, width = torch.Generator().manual_seed(seed), network.hidden_size

    def pair():
        return (torch.randn(rank, width, generator=generator) / math.sqrt(width), scale * torch.randn(width, rank, generator=generator) / math.sqrt(rank))

    def slot():
        return {f"{kind}.{i}": {part: pair() for part in parts}
                for kind, blocks, parts in (("double", network.double_blocks, ("q", "k", "v", "proj")), ("single", network.single_blocks, ("q", "k", "v")))
                for i in range(len(blocks))}

    return Adapter(tuple(slot() for _ in range(slots)), f"random {seed}", "random")


def condition(network, seed=5, size=(8, 8), **more) -> EasyControl:
    return EasyControl(more.pop("adapter", None) or adapter(network), torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed)), **more)


def turned(x, ids, params):
    """Rotary position code, axis by axis, on pairs of neighbours. x: [B, H, N, D]; ids: [N, axes]."""
    out, begin = [], 0
    for axis, dim in enumerate(params.axes_dim):
        omega = params.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = ids[:, axis].double()[:, None] * omega
        part = x[..., begin:begin + dim].double()
        even, odd = part[..., 0::2], part[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        out.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2))
        begin += dim
    return torch.cat(out, -1).float()


def explicit(patcher, x, sigma, context, pooled, guidance, conditions):
    """One denoised prediction with all condition tokens carried through every layer beside text and image, and a mask."""
    net, real = patcher.model.diffusion_model, patcher.model
    heads, width, params = net.num_heads, net.hidden_size, net.params
    batch, _, height, wide = x.shape

    def patched(latent):
        b, c, h, w = latent.shape
        return latent.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)

    def grid(rows, columns):
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
        return ids.view(-1, 3)

    def vec(time):
        v = net.time_in(timestep_embedding(torch.full((batch,), time), 256)) + net.vector_in(pooled)
        return v + net.guidance_in(timestep_embedding(torch.full((batch,), guidance), 256)) if params.guidance_embed else v

    tokens = [net.txt_in(context), net.img_in(patched(x))]
    ids = [torch.zeros(context.shape[1], 3), grid(height // 2, wide // 2)]
    for cond in conditions:
        tokens.append(net.img_in(patched(real.process_latent_in(cond.latent)).repeat(batch, 1, 1)))
        h, w = cond.latent.shape[-2:]
        at = grid(h // 2, w // 2)
        ids.append(at * torch.tensor([0, height / h, wide / w]) if cond.kind == "spatial" else at + torch.tensor([0, 64.0, 0]))
    sizes = [t.shape[1] for t in tokens]
    owner = torch.cat([torch.full((n,), max(i - 1, 0)) for i, n in enumerate(sizes)])     # 0: text and image; 1, 2, ...: conditions
    allowed = (owner[:, None] == 0) | (owner[:, None] == owner[None])
    ids = torch.cat(ids)
    times = [vec(sigma), vec(sigma), *(vec(0.0) for _ in conditions)]

    def split(x):
        return x.view(batch, -1, heads, width // heads).transpose(1, 2)

    def lora(cond, name, part, h):
        down, up = cond.adapter.slots[cond.slot][name][part]
        return cond.strength * (h @ down.T) @ up.T

    def attend(qkv):
        q, k, v = (torch.cat(part, 2) for part in zip(*qkv, strict=True))
        weights = (turned(q, ids, params) @ turned(k, ids, params).transpose(-1, -2)) / math.sqrt(width // heads)
        out = weights.masked_fill(~allowed, -math.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2).split(sizes, 1)

    def rms(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale

    def norm(x):
        return F.layer_norm(x, (width,), eps=1e-6)

    for i, block in enumerate(net.double_blocks):
        mods, qkv = [], []
        for stream, h in enumerate(tokens):
            attn, mod = (block.txt_attn, block.txt_mod) if stream == 0 else (block.img_attn, block.img_mod)
            shift1, scale1, gate1, shift2, scale2, gate2 = F.linear(F.silu(times[stream]), mod.lin.weight, mod.lin.bias)[:, None].chunk(6, -1)
            mods.append((gate1, shift2, scale2, gate2))
            x = norm(h) * (1 + scale1) + shift1
            parts = list(F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1))
            if stream > 1:
                parts = [p + lora(conditions[stream - 2], f"double.{i}", name, x) for p, name in zip(parts, "qkv", strict=True)]
            q, k, v = map(split, parts)
            qkv.append((rms(q, attn.norm.query_norm.scale if hasattr(attn.norm.query_norm, "scale") else attn.norm.query_norm.weight),
                        rms(k, attn.norm.key_norm.scale if hasattr(attn.norm.key_norm, "scale") else attn.norm.key_norm.weight), v))
        for stream, out in enumerate(attend(qkv)):
            attn, mlp = (block.txt_attn, block.txt_mlp) if stream == 0 else (block.img_attn, block.img_mlp)
            gate1, shift2, scale2, gate2 = mods[stream]
            o = F.linear(out, attn.proj.weight, attn.proj.bias)
            if stream > 1:
                o = o + lora(conditions[stream - 2], f"double.{i}", "proj", o)
            h = tokens[stream] + gate1 * o
            tokens[stream] = h + gate2 * mlp(norm(h) * (1 + scale2) + shift2)
    for i, block in enumerate(net.single_blocks):
        qkv, rest = [], []
        for stream, h in enumerate(tokens):
            shift, scale, gate = F.linear(F.silu(times[stream]), block.modulation.lin.weight, block.modulation.lin.bias)[:, None].chunk(3, -1)
            x = norm(h) * (1 + scale) + shift
            y = F.linear(x, block.linear1.weight, block.linear1.bias)
            parts = list(y[..., :3 * width].chunk(3, -1))
            if stream > 1:
                parts = [p + lora(conditions[stream - 2], f"single.{i}", name, x) for p, name in zip(parts, "qkv", strict=True)]
            q, k, v = map(split, parts)
            qk = block.norm
            qkv.append((rms(q, getattr(qk.query_norm, "scale", getattr(qk.query_norm, "weight", None))),
                        rms(k, getattr(qk.key_norm, "scale", getattr(qk.key_norm, "weight", None))), v))
            rest.append((F.gelu(y[..., 3 * width:], approximate="tanh"), gate))
        for stream, out in enumerate(attend(qkv)):
            mlp, gate = rest[stream]
            tokens[stream] = tokens[stream] + gate * F.linear(torch.cat([out, mlp], -1), block.linear2.weight, block.linear2.bias)
    shift, scale = net.final_layer.adaLN_modulation(times[1])[:, None].chunk(2, -1)
    out = F.linear(norm(tokens[1]) * (1 + scale) + shift, net.final_layer.linear.weight, net.final_layer.linear.bias)
    return out.view(batch, height // 2, wide // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, 16, height, wide)


def by_pack(patcher, x, sigma, conds, handle, bank=None, cfg=1.0):
    """The first velocity that the host's sampler gets, through the whole of its machinery."""
    got = {}

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got["x"] = x.clone()
        got["v"] = (x - denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args)) / sigmas[0]
        return x

    attached = attach_references(patcher, bank=Bank() if bank is None else bank)
    sigmas = torch.tensor([sigma, 0.0])
    noise = x
    with torch.inference_mode():
        comfy.sample.sample_custom(attached, noise, cfg, comfy.samplers.KSAMPLER(sampler), sigmas, with_references(conds, handle),
                                   with_references(tiny.conditioning("flux", 12), handle.other_side()), noise * 0, disable_pbar=True, seed=1)
    return got


@pytest.mark.parametrize("kinds", [("spatial",), ("subject",), ("spatial", "subject")])
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_a_condition_equals_the_masked_joint_attention_of_all_tokens(kinds, size):
    patcher = model("flux")
    net = patcher.model.diffusion_model
    one = adapter(net, slots=2)
    conditions = [condition(net, seed=i, kind=kind, slot=i, adapter=one, strength=0.7 + i) for i, kind in enumerate(kinds)]
    conds = tiny.conditioning("flux", 11)
    noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(2))
    handle = Handle(tuple(Reference(c) for c in conditions))
    got = by_pack(patcher, noise, 0.7, conds, handle)
    with torch.inference_mode():
        wanted = explicit(patcher, got["x"], 0.7, conds[0][0], conds[0][1]["pooled_output"], 3.5, conditions)
        without = explicit(patcher, got["x"], 0.7, conds[0][0], conds[0][1]["pooled_output"], 3.5, [])
    assert (wanted - without).abs().max() > 1e-2
    assert (got["v"] - wanted).abs().max() <= 1e-5


def test_a_model_with_the_injector_and_no_handle_samples_as_the_host_does():
    patcher = model("flux")
    assert torch.equal(sample(attach_references(patcher), "flux"), sample(patcher, "flux"))


def test_a_handle_on_a_model_without_the_injector_is_an_error():
    patcher = model("flux")
    positive = with_references(tiny.conditioning("flux", 11), Handle((Reference(condition(patcher.model.diffusion_model)),)))
    with pytest.raises(ValueError, match="sample with the model that comes out of Apply Reference Cache"):
        sample(patcher, "flux", positive=positive)


def test_a_whole_run_encodes_once_for_each_pooled_text_and_a_second_seed_encodes_nothing():
    patcher, records, bank = model("flux"), [], Bank()
    handle = Handle((Reference(condition(patcher.model.diffusion_model)),))
    positive, negative = (with_references(tiny.conditioning("flux", seed), handle) for seed in (11, 12))
    attached = attach_references(patcher, notify=records.append, bank=bank)
    first = sample(attached, "flux", positive=positive, negative=negative)
    sample(attached, "flux", positive=positive, negative=negative, seed=9)
    assert [len(record.made) for record in records] == [2, 0] and [len(record.found) for record in records] == [0, 2]
    again = sample(attach_references(patcher, Keeping(place="streamed"), bank=bank), "flux", positive=positive, negative=negative)
    assert torch.equal(first, again)
