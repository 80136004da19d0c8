"""Diffusion Templates by two ways: a template's layers evaluated on every step and its tokens joined behind the rotation, and ours.

Of a published template nothing passes the model's linear layers, by either way; its tokens are seen in attention alone:

    FLOPs of attention = 4 d Q (Q + S) per block        Q tokens of text and image, S of the template
"""
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _turns
from benchmarks._klein import TINY, TINY_SIDE, tiny_model
from benchmarks._published import KLEIN_4B, META, TEXT, evaluated, flops, flux, injected
from pack.core.reference.bank import Bank
from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.templates import template_of
from pack.core.reference.templates.merge import referred
from testbed import tiny

SIDE, TOKENS, BYTES = 64, 512, 307_200      # latent pixels of 1024 x 1024; of a template, and the bytes of each: 25 blocks x 3072 channels x K and V x 2
TINY_TOKENS, VALUE, WAVES, HEAD = 64, 0.7, 256, 128


def weights(width: int, doubles: int, singles: int, tokens: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Of a template of one number, by the published names."""
    generator = None if str(device) == "meta" else torch.Generator().manual_seed(4)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    made = {}
    for name in (f"proj_{part}.{block}" for part in "kv" for block in [f"double_{i}" for i in range(doubles)] + [f"single_{i}" for i in range(singles)]):
        made[f"{name}.prefer_value_embedder.0.weight"], made[f"{name}.prefer_value_embedder.0.bias"] = some(width, WAVES) / 8, some(width)
        made[f"{name}.prefer_value_embedder.2.weight"], made[f"{name}.prefer_value_embedder.2.bias"] = some(width, width) / width ** 0.5, some(width)
        made[f"{name}.positional_embedding"] = some(tokens, width)
    return made


def in_memory(tensors: dict[str, Tensor]):
    """What a file of these weights is read to."""
    return template_of(SimpleNamespace(name="random", digest="random", types=("F32",), shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
                                       tensors=lambda: tensors))


class Anew:
    """An `optimized_attention_override` that evaluates the template's layers in every block and puts its tokens behind those of the model."""

    def __init__(self, tensors: dict[str, Tensor], value: float):
        self.tensors, self.value = tensors, value

    def attached(self, patcher):
        clone = patcher.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = self.attention
        return clone

    def options(self) -> dict:
        return {"optimized_attention_override": self.attention}

    def attention(self, function, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, transformer_options=None, **kwargs) -> Tensor:
        block = f"{transformer_options['block_type']}_{transformer_options['block_index']}"
        keys, values = (torch.cat([own, self.made(f"proj_{part}.{block}", own)], 2) for part, own in (("k", k), ("v", v)))
        return function(q, keys, values, heads, *args, transformer_options=transformer_options, **kwargs)

    def made(self, name: str, like: Tensor) -> Tensor:
        """[B, H, S, D]"""
        first, second = (tuple(self.tensors[f"{name}.prefer_value_embedder.{layer}.{part}"] for part in ("weight", "bias")) for layer in (0, 2))
        angles = 1000 * self.value * 10_000 ** (-torch.arange(WAVES // 2, device=like.device) / (WAVES // 2))
        hidden = F.silu(F.linear(torch.cat([angles.cos(), angles.sin()]).to(first[0]), *first))
        tokens = F.linear(hidden, *second) + self.tensors[f"{name}.positional_embedding"]
        return tokens.unflatten(-1, (-1, HEAD)).transpose(0, 1).to(like).expand(len(like), -1, -1, -1)


def at_klein() -> dict:
    """bf16, 1024 x 1024, 512 tokens of text and 512 of the template. Linear FLOPs with the template and without it tell what its tokens cost there."""
    net = flux(KLEIN_4B)
    blocks = KLEIN_4B["depth"], KLEIN_4B["depth_single_blocks"]
    tensors = weights(KLEIN_4B["hidden_size"], *blocks, TOKENS, torch.bfloat16, META)
    entries = []
    with torch.device(META):        # the template's layers run where its weights are
        template = in_memory(tensors)
        prefill = flops(lambda: entries.append(template.entry([VALUE])))
    count = {"without": flops(lambda: evaluated(net, SIDE, SIDE, Anew(tensors, VALUE).options())),
             "with": flops(lambda: evaluated(net, SIDE, SIDE, injected(net, "flux", entries))), "plain": flops(lambda: evaluated(net, SIDE, SIDE))}
    queries = TEXT + SIDE ** 2
    return {
        **{f"flops_{name}": number.total for name, number in count.items()}, "flops_prefill": prefill.total,
        "linear_flops_of_tokens": count["with"].linear - count["plain"].linear, "attention_flops_of_tokens": count["with"].attention - count["plain"].attention,
        "formula_attention_flops_of_tokens": 4 * KLEIN_4B["hidden_size"] * queries * TOKENS * sum(blocks),
        "prefill_steps": round(prefill.total / count["with"].total, 8), "entry_bytes": entries[0].bytes, "formula_bytes": BYTES * TOKENS,
        "exactness": entries[0].exactness,
    }


def on_a_tiny_model() -> dict:
    """Seconds of a run by the two ways, and how far ours is from the template's layers evaluated on every step."""
    patcher, conds, noise = tiny_model(), tiny.conditioning("flux2", 11), tiny.noise("flux2", size=TINY_SIDE)
    tensors = weights(TINY["hidden"], TINY["depth"], TINY["depth_single"], TINY_TOKENS, torch.float32, "cpu")
    template, ours, anew = in_memory(tensors), attach_references(patcher, bank=Bank()), Anew(tensors, VALUE).attached(patcher)
    timed = _turns.in_turn({
        "ours": lambda: _turns.sampled(ours, with_references(conds, referred(template.entry([VALUE]))), noise),
        "anew": lambda: _turns.sampled(anew, conds, noise), "plain": lambda: _turns.sampled(patcher, conds, noise)})
    return {**_turns.ratios(timed, "ours", {"": "anew", "_plain": "plain"}), **_turns.errors(timed, "ours", "anew", "plain")}


def rows():
    yield {"system": "Diffusion Templates, scalar", "references": 1,
           "shape": "FLUX.2-klein-base-4B, 1024 x 1024, 512 tokens of a template; wall: FLUX.2 of 2 + 3 blocks of width 256, 64 tokens",
           "against": "the template's layers evaluated on every step", **at_klein(), **on_a_tiny_model()}
