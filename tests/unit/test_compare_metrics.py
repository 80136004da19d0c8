"""The measures that nodes, demo and benchmark share, against formulas written here."""
import math
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from pack.compare.metrics import EXACT, LEAST_PIQ, ROWS, WINDOW, Scores, psnr, scores, ssim
from pack.compare.words import average, summary


def noisy(height: int, width: int, noise: float, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand((1, 3, height, width), generator=generator)
    return a.to(dtype), (a + noise * torch.randn(a.shape, generator=generator)).clamp(0, 1).to(dtype)


def ssim_by_the_paper(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sums under the window, in float64, one place at a time but for numpy's views."""
    taps = numpy.exp(-((numpy.arange(11) - 5.0) ** 2) / (2 * 1.5 ** 2))
    window = numpy.outer(taps, taps) / taps.sum() ** 2

    def mean(values):
        return (numpy.lib.stride_tricks.sliding_window_view(values, (11, 11), (-2, -1)) * window).sum((-2, -1))

    x, y = a[0].double().numpy(), b[0].double().numpy()
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx ** 2, mean(y * y) - my ** 2, mean(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1e-4, 0.01, 0.3])
def test_psnr_is_the_mean_square_in_decibels(noise, dtype):
    a, b = noisy(37, 53, noise, dtype=dtype)
    error = ((a.double().numpy() - b.double().numpy()) ** 2).mean()
    assert psnr(a, b) == psnr(b, a) == pytest.approx(10 * math.log10(1 / error), abs=1e-4)


def test_one_level_of_error_everywhere_is_48_db():
    a = torch.full((1, 3, 4, 4), 100 / 255)
    assert psnr(a, a + 1 / 255) == pytest.approx(48.13, abs=0.01)


def test_psnr_ends_at_exact():
    a, _ = noisy(8, 8, 0)
    assert psnr(a, a) == EXACT
    assert psnr(a.double(), a.double() + 1e-9) == EXACT
    assert psnr(a.double(), a.double() + 1.1e-6) < EXACT


SEAM = ROWS + WINDOW - 1    # rows of picture behind which a second part begins


@pytest.mark.parametrize(("height", "width"), [(WINDOW, WINDOW), (11, 40), (33, 21), (SEAM - 1, 12), (SEAM, 11), (SEAM + 1, 13), (2 * ROWS + 35, 12)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_is_that_of_the_paper_however_the_picture_is_cut(height, width, noise):
    a, b = noisy(height, width, noise, seed=height)
    assert ssim(a, b) == pytest.approx(ssim_by_the_paper(a, b), abs=2e-5)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_equal_pictures_have_an_ssim_of_one_even_when_they_are_flat(level):
    flat = torch.full((1, 3, 20, 20), level)
    assert ssim(flat, flat) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (WINDOW - 1, 100), (100, WINDOW - 1)])
def test_a_picture_that_is_smaller_than_the_window_has_psnr_alone(height, width):
    a, b = noisy(height, width, 0.1)
    found = scores(a, b)
    assert found.ssim is None and found.psnr == pytest.approx(10 * math.log10(1 / ((a - b) ** 2).mean().item()), abs=1e-3)
    assert "SSIM needs" in "\n".join(summary([found])) and f"{WINDOW} x {WINDOW}" in "\n".join(summary([found]))


@pytest.mark.parametrize("missing", ["kornia.metrics", "piq"])
def test_a_library_that_is_missing_is_named_and_the_rest_is_measured(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    found = scores(*noisy(32, 32, 0.1))
    text = "\n".join(summary([found]))
    assert found.psnr > 0 and f"need{'s' if missing[0] == 'k' else ''} {missing.split('.')[0]}" in text
    assert (found.ssim is None) == (missing == "kornia.metrics") and (found.haarpsi is None or missing != "piq")


def test_piq_is_used_where_it_is_installed(monkeypatch):
    asked = []
    stand_in = SimpleNamespace(haarpsi=lambda a, b: asked.append((a, b)) or torch.tensor(0.75), mdsi=lambda a, b: torch.tensor(0.25))
    monkeypatch.setitem(sys.modules, "piq", stand_in)
    a, b = noisy(LEAST_PIQ, 32, 0.1)
    found = scores(a, b)
    assert (found.haarpsi, found.mdsi) == (0.75, 0.25) and asked[0][0] is a and asked[0][1] is b
    assert "HaarPSI 0.7500, MDSI 0.2500" in summary([found])[0] and "piq" not in "\n".join(summary([found]))
    assert scores(*noisy(LEAST_PIQ - 1, 32, 0.1)).haarpsi is None


def test_the_real_piq_takes_the_smallest_picture_that_it_is_given():
    pytest.importorskip("piq")
    a, b = noisy(LEAST_PIQ, LEAST_PIQ, 0.1)
    same, other = scores(a, a), scores(a, b)
    assert same.haarpsi == pytest.approx(1, abs=1e-3) and same.mdsi == pytest.approx(0, abs=1e-3)
    assert other.haarpsi < same.haarpsi and other.mdsi > same.mdsi


def test_a_batch_is_told_picture_by_picture_with_its_mean_and_its_worst():
    lines = summary([Scores(40.0, 0.9), Scores(20.0, 0.5), Scores(EXACT, 1.0)])
    assert lines[:3] == ["1: PSNR 40.00 dB, SSIM 0.9000", "2: PSNR 20.00 dB, SSIM 0.5000", "3: PSNR 120.00 dB (equal), SSIM 1.0000"]
    assert lines[3] == "mean: PSNR 60.00 dB, SSIM 0.8000; the worst is picture 2"
    assert average([Scores(40.0, None), Scores(20.0, None)]) == Scores(30.0, None)
