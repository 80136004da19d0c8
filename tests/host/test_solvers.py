"""The samplers that are looked back on: their step is what the host's own functions do."""
import math

import comfy.k_diffusion.sampling as sampling
import pytest
import torch

from pack.core.stepcache.governor import DETERMINISTIC
from pack.core.stepcache.solvers import SOLVERS

FLOW = [1.0, 0.95, 0.9, 0.84, 0.77, 0.69, 0.6, 0.47, 0.29, 0.0]
SCHEDULES = {
    "flow": FLOW, "flow from the middle": FLOW[4:], "flow to the middle": FLOW[:5], "two steps": [1.0, 0.4, 0.0], "one step": [0.8, 0.0],
    "karras": sampling.get_sigmas_karras(12, 0.03, 14.6).tolist(), "exponential": sampling.get_sigmas_exponential(12, 0.03, 14.6).tolist(),
    "uneven": [14.6, 13.0, 4.0, 3.9, 3.0, 0.2, 0.1, 0.0], "down to above zero": [14.6, 9.0, 5.0, 2.0],
}


def hosts(name: str, sigmas: list[float], dtype=torch.float64):
    """x and D of every step of the host's function on a made-up denoiser, and the x that it ends with."""
    seen = []

    def denoiser(x, sigma, **more):
        return 0.6 * x + torch.sin(3 * x + 5 * sigma.view(-1, 1, 1))

    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * sigmas[0]
    end = getattr(sampling, f"sample_{name}")(
        denoiser, start, torch.tensor(sigmas, dtype=dtype), disable=True, callback=lambda now: seen.append((now["x"].clone(), now["denoised"].clone())))
    return [x for x, _ in seen] + [end], [denoised for _, denoised in seen]


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_next_x_is_the_sum_of_the_last_x_and_two_denoised_latents(name, sigmas):
    x, denoised = hosts(name, sigmas)
    for n in range(len(sigmas) - 1):
        a, b, e = SOLVERS[name](sigmas, n)
        before = denoised[n - 1] if n else torch.full_like(x[0], math.nan)
        told = a * x[n] + b * denoised[n] + (e * before if e else 0.0)
        assert ((told - x[n + 1]).abs().max() / x[n + 1].abs().max()).item() < 1e-6, n


@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_of_float32_as_a_run_has_them_do_as_well(name):
    x, denoised = hosts(name, FLOW, torch.float32)
    sigmas = torch.tensor(FLOW, dtype=torch.float32).tolist()
    for n in range(1, len(sigmas) - 1):
        a, b, e = SOLVERS[name](sigmas, n)
        told = a * x[n] + b * denoised[n] + e * denoised[n - 1]
        assert ((told - x[n + 1]).abs().max() / x[n + 1].abs().max()).item() < 1e-5, n


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_model_that_says_x_leaves_x_as_it_is(name, sigmas):
    assert all(sum(SOLVERS[name](sigmas, n)) == pytest.approx(1) for n in range(len(sigmas) - 1))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_schedule_that_repeats_a_sigma_or_rises_is_answered_with_numbers(name):
    for sigmas in ([1.0, 0.8, 0.8, 0.5, 0.0], [1.0, 0.8, 0.8, 0.8, 0.0], [1.0, 1.0, 0.5, 0.0], [1.0, 0.5, 0.7, 0.6, 0.0], [1.0, 0.5, 0.5 * (1 + 1e-7), 0.2]):
        assert all(math.isfinite(part) for n in range(len(sigmas) - 1) for part in SOLVERS[name](sigmas, n))


def test_every_one_of_them_adds_no_noise():
    assert set(SOLVERS) <= DETERMINISTIC
