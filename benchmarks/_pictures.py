"""The pictures that step caching is measured on: which model, which captions, which noise, and how far two results are apart."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.sd
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from torch import Tensor

from pack.compare import metrics
from testbed import captions, procedural
from testbed.nodes.patch_vae import PatchVAE
from testbed.nodes.text import encode

MODELS = Path(__file__).resolve().parent.parent / "testbed" / "models"


@dataclass(frozen=True)
class Subject:
    """A model of the test bed and its captions; two noise seeds each, 128 px."""

    file: str
    captions: tuple[str, ...]
    shift: float | None = None    # Z-Image's

    @property
    def name(self) -> str:
        return Path(self.file).stem

    def load(self):
        patcher = comfy.sd.load_diffusion_model(str(MODELS / self.file))
        return patcher if self.shift is None else ModelSamplingAuraFlow().patch_aura(patcher, self.shift)[0]

    def pictures(self):
        """(caption, noise [1, 16, 16, 16])"""
        for i, caption in enumerate(self.captions):
            for seed in range(2):
                yield caption, torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(1000 + 10 * i + seed))


DRAWN = tuple(procedural.caption(row) for row in procedural.sample_attributes(8, torch.Generator().manual_seed(777)).tolist())
SUBJECTS = (
    Subject("flux_tiny.safetensors", captions.DEMO[:8]),
    Subject("z_image_tiny.safetensors", captions.DEMO[:8], shift=3.0),
    Subject("tiny_flux_trained128.safetensors", DRAWN),
    Subject("tiny_z_image_trained128.safetensors", DRAWN, shift=3.0),
)
VAE = PatchVAE()


def conditions(captions: Sequence[str]) -> tuple[list, list]:
    """Positive and negative, one entry each, with a row per caption; the negative is what the models were trained on as "no caption"."""
    tokens, pooled = (torch.cat(parts) for parts in zip(*map(encode, captions), strict=True))
    return ([[tokens, {"pooled_output": pooled, "guidance": 3.5}]],
            [[torch.zeros_like(tokens), {"pooled_output": torch.zeros_like(pooled), "guidance": 3.5}]])


def sample(patcher, caption: str, noise: Tensor, steps: int, cfg: float, sampler: str) -> Tensor:
    return sample_under(patcher, conditions([caption]), noise, steps, cfg, sampler)


def sample_under(patcher, conds: tuple[list, list], noise: Tensor, steps: int, cfg: float, sampler: str) -> Tensor:
    with torch.inference_mode():
        return comfy.sample.sample(patcher, noise, steps, cfg, sampler, "simple", *conds, torch.zeros_like(noise), disable_pbar=True, seed=1)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """dB between the decoded, clamped pictures, peak 1."""
    return metrics.psnr(VAE.decode(latent), VAE.decode(reference))
