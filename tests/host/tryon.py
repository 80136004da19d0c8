"""FastFit for its tests: a tiny model, an explicit joint attention written from the paper's description, and what the pack makes of the same."""
import math
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample, timestep_embedding
from torch.nn import functional as F

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit import CLASSES, FastFitReference
from pack.core.reference.fastfit_checkpoint import build, renamed, unet_config
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from testbed import tiny_fastfit

SCALE = 0.18215     # of SD 1.5's latents, published
SIZE = (8, 6)
TENSORS = tiny_fastfit.tensors()


def fastfit(**changed):
    tensors = {**TENSORS, **changed}
    config = unet_config(tensors, "tiny")
    return build(renamed(tensors, config, "tiny"), config, dtype=torch.float32)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def garment(seed=5, label="upper", size=(8, 6)) -> FastFitReference:
    return FastFitReference(drawn(seed, 1, 4, *size), label)


def handle(*garments, **used) -> Handle:
    return Handle(tuple(Reference(one, **used) for one in garments))


def conditioning(size=SIZE, seed=21) -> list:
    mask = (drawn(seed, 1, 1, *size) > 0).float()
    return [[torch.zeros(1, 1, 768), {"concat_latent_image": drawn(seed + 1, 1, 4, *size), "concat_mask": mask}]]


# The reference implementation.

def softmax_attention(q, k, v, heads, weights=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    odds = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    odds = odds if weights is None else odds * weights
    return ((odds / odds.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class Features:
    """One pass over the UNet's layers. `read`: features of references per layer, each with its weight; `written`: of this pass."""

    def __init__(self, net, read=(), copies=1):
        self.net, self.read, self.copies, self.written = net, read, copies, []

    def transformer(self, layer, x):
        b, c, h, w = x.shape
        y = F.conv2d(F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6), layer.proj_in.weight, layer.proj_in.bias).flatten(2).transpose(1, 2)
        for block in layer.transformer_blocks:
            n = F.layer_norm(y, (c,), block.norm1.weight, block.norm1.bias)
            index = len(self.written)
            self.written.append(n)
            seen = [n] + [features[index].expand(b, -1, -1) for features, _ in self.read]
            weights = torch.cat([torch.full((s.shape[1],), weight) for s, weight in zip(seen, [1.0] + [w for _, w in self.read], strict=True)])
            seen, weights = torch.cat(seen * self.copies, 1), weights.repeat(self.copies)
            attn = block.attn1
            out = softmax_attention(n @ attn.to_q.weight.T, seen @ attn.to_k.weight.T, seen @ attn.to_v.weight.T, 8, weights)
            y = y + F.linear(out, attn.to_out[0].weight, attn.to_out[0].bias)
            a, gate = F.linear(F.layer_norm(y, (c,), block.norm3.weight, block.norm3.bias), block.ff.net[0].proj.weight, block.ff.net[0].proj.bias).chunk(2, -1)
            y = y + F.linear(a * F.gelu(gate), block.ff.net[2].weight, block.ff.net[2].bias)
        return x + F.conv2d(y.transpose(1, 2).unflatten(2, (h, w)), layer.proj_out.weight, layer.proj_out.bias)

    def through(self, layers, h, emb, shape=None):
        for layer in layers:
            if isinstance(layer, SpatialTransformer):
                h = self.transformer(layer, h)
            elif isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, Upsample):
                h = layer(h, shape)
            else:
                h = layer(h)
        return h

    def run(self, h, emb):
        """h: after the first convolution."""
        hs = [h]
        for layers in self.net.input_blocks[1:]:
            hs.append(self.through(layers, hs[-1], emb))
        h = self.through(self.net.middle_block, hs[-1], emb)
        for layers in self.net.output_blocks:
            h = self.through(layers, torch.cat([h, hs.pop()], 1), emb, hs[-1].shape if hs else None)
        return self.net.out(h)


def features_of(patcher, one: FastFitReference, null=False) -> list:
    """The normed input of every self-attention layer in the reference pass, from the checkpoint's own two tensors."""
    latent = one.latent * (0 if null else SCALE)
    net = Features(patcher.model.diffusion_model)
    net.run(F.conv2d(latent, TENSORS["condition_conv_in.weight"], TENSORS["condition_conv_in.bias"], padding=1),
            TENSORS["class_embedding.weight"][CLASSES.index(one.label)][None])
    return net.written


def explicit(patcher, x, sigma, conds, garments, weights=None, null=False, copies=1):
    """The model's prediction of the noise."""
    net, more = patcher.model.diffusion_model, conds[0][1]
    weights = weights or [1.0] * len(garments)
    batch = len(x)
    said = torch.cat([x / math.sqrt(sigma ** 2 + 1), more["concat_mask"].expand(batch, -1, -1, -1),
                      (more["concat_latent_image"] * SCALE).expand(batch, -1, -1, -1)], 1)
    time = patcher.get_model_object("model_sampling").timestep(torch.full((batch,), sigma)).float()
    read = [(features_of(patcher, one, null), weight) for one, weight in zip(garments, weights, strict=True)]
    return Features(net, read, copies).run(F.conv2d(said, net.input_blocks[0][0].weight, net.input_blocks[0][0].bias, padding=1),
                                           net.time_embed(timestep_embedding(time, net.model_channels)))


# The pack, through the whole of the host's machinery.

def by_pack(patcher, references: Handle, sigma=3.0, cfg=1.0, conds=None, negative=None, size=SIZE, batch=1, bank=None, keeping=None, seed=1):
    """The first prediction of noise that a sampler gets, and what it was asked about."""
    got = SimpleNamespace(calls=0)

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.x = x.clone()
        got.eps = (x - denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args)) / sigmas[0]
        return x

    def counted(executor, x, *args, **kwargs):
        got.calls += 1
        got.rows = len(x)
        return executor(x, *args, **kwargs)

    attached = attach_references(patcher, keeping=keeping, bank=bank if bank is not None else Bank())
    attached.add_wrapper_with_key("apply_model", "test", counted)
    conds = conds or conditioning(size)
    noise = drawn(seed, batch, 4, *size)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            attached, noise, cfg, comfy.samplers.KSAMPLER(sampler), torch.tensor([sigma, 0.0]), with_references(conds, references),
            with_references(conds, references.other_side() if negative is None else negative), noise * 0, disable_pbar=True, seed=seed)
    return got
