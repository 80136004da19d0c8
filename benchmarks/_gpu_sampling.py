"""One run of the host's sampler, with a stamp of the GPU's clock at its start and after every step."""
from dataclasses import dataclass

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP

KEY = "reprise.benchmark"


@dataclass(frozen=True)
class Sampled:
    steps: list[float]      # milliseconds of each; the first has what is prepared in it
    finite: bool            # whether the latent is of numbers


def sampled(bench, patcher, subject, tokens: int, steps: int) -> Sampled:
    """euler at CFG 1, one picture of the benchmark's size, `tokens` of text."""
    stamps, clone = [], patcher.clone()

    def begun(executor, *args, **kwargs):
        stamps.append(bench.meter.stamp())
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, begun)
    side = bench.sizes.latent
    noise = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(2))
    text = subject.conditioning(tokens)
    latent = comfy.sample.sample(
        clone, noise, steps, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), seed=1, disable_pbar=True,
        callback=lambda *_: stamps.append(bench.meter.stamp()))
    return Sampled(bench.meter.milliseconds(stamps), bool(latent.isfinite().all()))
