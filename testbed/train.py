"""Train the test bed's models: flow matching for FLUX, Z-Image and FLUX's EasyControl adapter, distillation for the TAESD.

    python3 -m testbed.train flux   --emoji DIR --out testbed/models/flux_tiny.safetensors
    python3 -m testbed.train zimage --emoji DIR --out testbed/models/z_image_tiny.safetensors
    python3 -m testbed.train taesd  --emoji DIR --out testbed/models/taef1_tiny.safetensors
    python3 -m testbed.train easycontrol --emoji DIR --out testbed/models/easycontrol_tiny.safetensors
    python3 -m testbed.train zimage-drawn     --out testbed/models/tiny_z_image_trained128.safetensors

DIR holds the two npm archives that data.py names; zimage-drawn sees procedural pictures alone, new ones at every step,
and easycontrol is trained on top of flux_tiny.safetensors, which it leaves as it is.
Every step draws its data from a generator seeded with the step's number, so a run is the same whether or not it was
stopped and resumed (`--state`). The learning rate warms up, stays, and decays at the end (PLANS). CPU or GPU; on one
CPU core about 38, 25, 16, 14 and 30 minutes.
"""
import argparse
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from . import arch, easycontrol, procedural
from .data import Drawn, Emoji, Mixture
from .nodes.patch_vae import PatchVAE
from .nodes.text import encode

log = logging.getLogger("testbed")


@dataclass
class Plan:
    """Phases of (steps, picture size); batch; peak learning rate."""

    phases: tuple[tuple[int, int], ...]
    batch: int
    rate: float
    decay: int
    warmup: int = 200
    average: float = 0.999

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.phases)

    def px(self, step: int) -> int:
        for steps, px in self.phases:
            if step < steps:
                return px
            step -= steps
        return self.phases[-1][1]

    def rate_at(self, step: int) -> float:
        left = self.steps - step
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * min(1.0, left / self.decay))


PLANS = {
    "flux": Plan(((7000, 64), (4500, 128)), batch=24, rate=1.2e-3, decay=1800),
    "zimage": Plan(((6000, 64), (4000, 128)), batch=24, rate=1.2e-3, decay=1700),
    "zimage-drawn": Plan(((7000, 64), (5000, 128)), batch=24, rate=1.2e-3, decay=2000),
    "easycontrol": Plan(((900, 64), (550, 128)), batch=16, rate=2e-3, decay=500, warmup=50, average=0.99),
    "taesd": Plan(((3000, 64),), batch=8, rate=1e-3, decay=1500, warmup=50, average=0.998),
}

NETS = {
    "flux": arch.Flux,
    "zimage": arch.ZImage,
    "zimage-drawn": lambda: arch.ZImage(arch.ZImageConfig(n_layers=2, ffn_dim_multiplier=2.0, multiple_of=32)),
}


def encoded(names: list[str]) -> tuple[Tensor, Tensor]:
    tokens, pooled = zip(*(encode(name) for name in names), strict=True)
    return torch.cat(tokens), torch.cat(pooled)


class Denoiser:
    """Flow matching: v = eps - x0 at x = (1 - sigma) x0 + sigma eps; a tenth of the captions is dropped."""

    def __init__(self, net: torch.nn.Module, emoji: Emoji | None, plan: Plan, device: str):
        self.net = net
        self.mixtures = {px: Drawn(px) if emoji is None else Mixture(emoji, px) for px in {px for _, px in plan.phases}}
        self.vae, self.plan, self.device = PatchVAE(), plan, device

    def loss(self, step: int, g: Generator) -> Tensor:
        n = self.plan.batch
        pictures, names = self.mixtures[self.plan.px(step)].batch(n, g)
        context, pooled = encoded(names)
        clean = self.vae.to_model_space(pictures)
        kept = (torch.rand(n, generator=g) > 0.1).float()
        context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        uniform, normal = torch.rand(n, generator=g), torch.sigmoid(torch.randn(n, generator=g) + 0.4)
        sigma = torch.where(torch.rand(n, generator=g) < 0.5, uniform, normal).clamp(1e-3, 1)
        eps = torch.randn(clean.shape, generator=g)
        at = sigma.view(-1, 1, 1, 1)
        inputs = [t.to(self.device) for t in ((1 - at) * clean + at * eps, sigma, context, pooled)]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            v = self.net(*inputs)
        return (v.float() - (eps - clean).to(self.device)).square().mean()


class Distiller:
    """A TAESD that decodes, and encodes to, the latents of the linear patch VAE; on crops at several scales."""

    def __init__(self, net: torch.nn.Module, emoji: Emoji, plan: Plan, device: str):
        self.net, self.emoji, self.plan, self.device, self.vae = net, emoji, plan, device, PatchVAE()

    def loss(self, step: int, g: Generator) -> Tensor:
        n, px = self.plan.batch, self.plan.px(step)
        if step % 4 == 3:
            x, _ = procedural.batch(n, 128, g)
        else:
            chosen = torch.randint(0, len(self.emoji.names), (n,), generator=g)
            ground = torch.rand(n, 3, 1, 1, generator=g) if step % 4 == 2 else 0.93
            x = self.emoji.render(chosen, 128 if step % 2 else 256, ground)
        top, left = (int(torch.randint(0, x.shape[-1] - px + 1, (1,), generator=g)) // 8 * 8 for _ in range(2))
        x = x[:, :, top: top + px, left: left + px].contiguous()
        z = self.vae.to_model_space(x)
        noisy = z + torch.randn(z.shape, generator=g) * 0.08 * torch.rand(n, 1, 1, 1, generator=g)
        x, z, noisy = (t.to(self.device).contiguous(memory_format=torch.channels_last) for t in (x, z, noisy))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            pixels, latent = self.net.taesd_decoder(noisy), self.net.taesd_encoder(x)
        wrong = pixels.float() - x
        edges = (wrong.diff(dim=-1).abs().mean() + wrong.diff(dim=-2).abs().mean())
        return 20 * wrong.square().mean() + 3 * wrong.abs().mean() + 3 * edges + (latent.float() - z).square().mean()


BASE = Path(__file__).with_name("models") / "flux_tiny.safetensors"     # of the EasyControl adapter


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "easycontrol":
        base = arch.Flux()
        base.load_state_dict({name: tensor.float() for name, tensor in load_file(BASE).items()})
        return easycontrol.EasyControl(base)
    if kind == "taesd":
        from .taesd import TAESD, init_

        return init_(TAESD())
    return arch.init_(NETS[kind]())


def checkpoint(net: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """fp16 safetensors that the stock loaders open; Z-Image carries its own configuration."""
    tensors = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt"}
    if isinstance(net, easycontrol.EasyControl):
        tensors = {easycontrol.published(name): tensor for name, tensor in tensors.items()}
    if isinstance(net, arch.ZImage):
        tensors |= {name: torch.zeros(shape, dtype=torch.float16) for name, shape in arch.Z_IMAGE_DECOY.items()}
        metadata["config"] = json.dumps({"transformer": net.config.as_dict()})
    save_file(tensors, path, metadata=metadata)


def train(kind: str, emoji: Path | None, out: Path, state: Path | None, device: str, stop: int | None) -> None:
    plan, net = PLANS[kind], build(kind).to(device).train()
    tasks = {"taesd": Distiller, "easycontrol": easycontrol.Steered}
    task = tasks.get(kind, Denoiser)(net, emoji and Emoji(emoji), plan, device)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2 and p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=plan.rate, betas=(0.9, 0.98), fused=True)
    average = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    step = 0
    if state is not None and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]
    log.info("%s: %s parameters, from step %d of %d", kind, f"{sum(p.numel() for p in net.parameters()):,}", step, plan.steps)
    begun, first, smooth = time.monotonic(), step, None
    while step < min(plan.steps, stop or plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        loss = task.loss(step, Generator().manual_seed(1_000_003 * (step + 1)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(plan.average, (1 + step) / (10 + step))
        with torch.no_grad():
            current = net.state_dict()
            torch._foreach_lerp_(list(average.values()), [current[name] for name in average], 1 - keep)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if not math.isfinite(smooth):
            raise RuntimeError(f"{kind}: the loss is {smooth} at step {step}; lower the learning rate")
        if step % 100 == 0:
            each = (time.monotonic() - begun) / (step - first)
            log.info("step %d of %d, %d px, loss %.4f, %.0f ms a step, %.0f min left",
                     step, plan.steps, plan.px(step), smooth, 1000 * each, each * (plan.steps - step) / 60)
        if step % 500 == 0 or step == min(plan.steps, stop or plan.steps):
            checkpoint(net, average, out)
            if state is not None:
                part = state.with_suffix(".part")
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, part)
                part.replace(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(PLANS))
    parser.add_argument("--emoji", type=Path, help="folder with the two npm archives; zimage-drawn needs none")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, help="file to resume from and to keep up to date")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--stop", type=int, help="stop at this step (the schedule stays that of the whole run)")
    options = parser.parse_args()
    if (options.emoji is None) != (options.kind == "zimage-drawn"):
        parser.error(f"{options.kind} {'needs' if options.emoji is None else 'takes no'} --emoji")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options.kind, options.emoji, options.out, options.state, options.device, options.stop)


if __name__ == "__main__":
    main()
