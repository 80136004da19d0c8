"""Reference latents of FLUX.2 klein by three ways: in the sequence on every step, as the host has them; the same with the mask that makes them
blind to text and image; and ours, which encodes them once and gives the picture of the second.

A checkpoint trained for that is FLUX.2-klein-9b-KV, so its sizes are counted: 8 + 24 blocks, 32 heads.
"""
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from benchmarks import _turns
from benchmarks._published import KLEIN_9B, META, encoded, evaluated, flops, flux, injected
from pack.core.reference.bank import Bank
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.joint_latents import JointLatents
from pack.core.reference.latents import Settings, attach_reference_latents
from testbed import tiny

SIDE, CHANNELS = 64, 128        # latent pixels of 1024 x 1024, which are tokens; channels
BYTES = 4 * 4096 * (KLEIN_9B["depth"] + KLEIN_9B["depth_single_blocks"])     # of a token: K and V x 2 bytes x channels x blocks
TINY_SIDE, TINY = 16, {"hidden": 256, "depth": 2, "depth_single": 3}
METHOD = "index_timestep_zero"


def tiny_model(seed: int = 0):
    """A FLUX.2 of two heads."""
    net = tiny.fill_(tiny.flux2(comfy.ops.disable_weight_init, **TINY), seed)
    return comfy.sd.load_diffusion_model_state_dict(net.state_dict(), model_options={"dtype": torch.float32})


def latents(count: int, side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [0.7 * torch.randn(1, CHANNELS, side, side, generator=generator) for _ in range(count)]


def blind(q: Tensor, k: Tensor, v: Tensor, pe=None, attn_mask=None, extra_options=None, **others) -> dict:
    """An `attn1_patch`: references, the last tokens, see references alone."""
    tokens, more = q.shape[2], sum(extra_options.get("reference_image_num_tokens", ()))
    allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=q.device)
    allowed[..., tokens - more:, :tokens - more] = False
    return {"attn_mask": allowed}


def at_klein(references: int) -> dict:
    """bf16, 1024 x 1024, 512 text tokens, references of 1024 x 1024."""
    net, shown = flux(KLEIN_9B), latents(references, SIDE)
    entry, prefill = encoded(JointLatents(tuple(shown), references * SIDE ** 2), net, (SIDE, SIDE), torch.bfloat16)
    count = {
        "without": flops(lambda: evaluated(net, SIDE, SIDE, ref_latents=[latent.to(META, torch.bfloat16) for latent in shown])),
        "with": flops(lambda: evaluated(net, SIDE, SIDE, injected(net, "flux", [entry]))),
        "plain": flops(lambda: evaluated(net, SIDE, SIDE)),
    }
    return {
        **{f"flops_{name}": number.total for name, number in count.items()}, "flops_prefill": prefill.total,
        "prefill_steps": round(prefill.total / count["with"].total, 4), "entry_bytes": entry.bytes,
        "formula_bytes": BYTES * references * SIDE ** 2, "exactness": entry.exactness,
    }


def on_a_tiny_model(references: int) -> dict:
    """Seconds of a run, encoding included, by the three ways, and how far ours is from the masked one."""
    patcher, shown = tiny_model(), latents(references, TINY_SIDE)
    (text, more), = tiny.conditioning("flux2", 11)
    noise = tiny.noise("flux2", size=TINY_SIDE)
    carrying = {method: [[text, {**more, "reference_latents": shown, "reference_latents_method": method}]] for method in ("index", METHOD)}
    ours = attach_reference_latents(attach_references(patcher, Keeping(keep=False), bank=Bank()), Settings("exact"))
    masked = patcher.clone()
    masked.set_model_attn1_patch(blind)
    timed = _turns.in_turn({
        "ours": lambda: _turns.sampled(ours, carrying["index"], noise), "host": lambda: _turns.sampled(patcher, carrying["index"], noise),
        "masked": lambda: _turns.sampled(masked, carrying[METHOD], noise), "plain": lambda: _turns.sampled(patcher, [[text, more]], noise)})
    return {**_turns.ratios(timed, "ours", {"": "host", "_masked": "masked", "_plain": "plain"}), **_turns.errors(timed, "ours", "masked", "plain")}


def rows():
    for references in (1, 2):
        yield {"system": "Reference Latent Cache, exact", "references": references,
               "shape": "FLUX.2-klein-9b-KV, 1024 x 1024, references 1024 x 1024; wall: FLUX.2 of 2 + 3 blocks of width 256, 256 tokens each",
               "against": "the host's own run, references in the sequence on every step", **at_klein(references), **on_a_tiny_model(references)}
