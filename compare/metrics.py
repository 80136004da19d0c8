"""How far two pictures are apart. All take [1, 3, H, W] in 0..1.

    PSNR = -10 log10(mean (a - b)^2)                                                 dB, peak 1; at most EXACT
    SSIM = (2 m_a m_b + c_1)(2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1)(s_a^2 + s_b^2 + c_2))    mean over places and channels

m, s^2 and s_ab are means, variances and covariance under a Gaussian of sigma 1.5 that lies wholly inside the picture, c_1 = 0.01^2,
c_2 = 0.03^2 (Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 2004); kornia computes it. HaarPSI (Reisenhofer et al., 2018) and MDSI
(Nafchi et al., IEEE Access 2016) come from piq where it is installed.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 120.0    # dB, for pictures that are equal or as good as that
WINDOW = 11      # pixels of SSIM's Gaussian
LEAST_PIQ = 16   # pixels, below which HaarPSI's largest filter does not fit
ROWS = 128       # of SSIM's map at a time: faster than a large picture at once, and in less memory


@dataclass(frozen=True)
class Scores:
    """What was measured on one pair; None is what could not be."""

    psnr: float
    ssim: float | None
    haarpsi: float | None = None
    mdsi: float | None = None


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square_().mean(dtype=torch.float64).item()
    return EXACT if error <= 10 ** (-EXACT / 10) else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor) -> float | None:
    """None where the window does not fit into the picture or kornia is missing."""
    try:
        from kornia.metrics import ssim as ssim_map  # a second to import, so not before it is wanted
    except ImportError:
        return None
    height, width = a.shape[-2:]
    if min(height, width) < WINDOW:
        return None
    total, places = 0.0, 0
    for top in range(0, height - WINDOW + 1, ROWS):     # the window reaches WINDOW - 1 rows below the map's
        rows = slice(top, top + ROWS + WINDOW - 1)
        part = ssim_map(a[..., rows, :], b[..., rows, :], WINDOW, eps=0.0, padding="valid")
        total, places = total + part.sum(dtype=torch.float64).item(), places + part.numel()
    return total / places


def perceptual(a: Tensor, b: Tensor) -> tuple[float | None, float | None]:
    """HaarPSI and MDSI; None where piq is missing or the picture is too small for it."""
    try:
        from piq import haarpsi, mdsi
    except ImportError:
        return None, None
    if min(a.shape[-2:]) < LEAST_PIQ:
        return None, None
    return haarpsi(a, b).item(), mdsi(a, b).item()


def scores(a: Tensor, b: Tensor) -> Scores:
    return Scores(psnr(a, b), ssim(a, b), *perceptual(a, b))
