"""A sampler, models and schedules in plain torch, for the tests of what happens between two steps of a run."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pack.core.stepcache.look_back import KAPPA, LookBack
from pack.core.stepcache.predictors.divided_differences import lagrange

LATENT = (1, 2, 3, 4)


def flow(steps: int, shift: float = 3.0) -> list[float]:
    falling = [1 - n / steps for n in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in falling]


def exploding(steps: int, most: float = 14.6, least: float = 0.03) -> list[float]:
    """Karras et al., eq. 5."""
    return [*((most ** (1 / 7) + n / (steps - 1) * (least ** (1 / 7) - most ** (1 / 7))) ** 7 for n in range(steps)), 0.0]


SCHEDULES = {"flow": flow(12), "variance-exploding": exploding(12), "first part of a schedule": flow(20)[:13]}


def randn(seed: int, *shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*(shape or LATENT), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class Path:
    """A run without skips whose derivative is `along(n)`, and a denoiser that gives it: D(x, n) = D_n + kappa (x - x_n).

    That is a model with dD/dx = kappa everywhere, so what LookBack assumes of it holds to the letter.
    """

    solver: Callable
    sigmas: Sequence[float]
    along: Callable[[int], Tensor]
    kappa: float = KAPPA
    x: list[Tensor] = field(init=False)
    d: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.d = [self.along(n) for n in range(len(self.sigmas) - 1)]
        self.x = list(sampled(self.solver, self.sigmas, self.start, lambda n, x: x - self.sigmas[n] * self.d[n]))

    @property
    def start(self) -> Tensor:
        return randn(99, dtype=self.d[0].dtype) * self.sigmas[0]

    def denoised(self, n: int, x: Tensor) -> Tensor:
        return self.x[n] - self.sigmas[n] * self.d[n] + self.kappa * (x - self.x[n])


class Mixture:
    """The exact denoiser of some pictures with smooth noise on them: one whose dD/dx is not the same for any two directions.

    x = share y + sigma eps; in Fourier space, where y of cluster c is normal around its mean with a spectrum that falls as natural pictures' does.
    """

    def __init__(self, solver: Callable, sigmas: Sequence[float], is_flow: bool, seed: int, size: int = 12, clusters: int = 12):
        self.solver, self.sigmas, self.is_flow = solver, sigmas, is_flow
        self.start = randn(seed, size, size) * sigmas[0]
        f = torch.fft.fftfreq(size, dtype=torch.float64) * size
        spectrum = 1 / (1 + (f[:, None] ** 2 + f ** 2).sqrt()) ** 3
        self.spectrum = spectrum / spectrum.mean()
        self.means = 0.9 * torch.fft.fft2(randn(3, clusters, size, size)) * self.spectrum.sqrt()

    def denoised(self, n: int, x: Tensor) -> Tensor:
        sigma, wide = self.sigmas[n], 0.2 * self.spectrum
        share = max(1 - sigma, 1e-9) if self.is_flow else 1.0
        off, spread = torch.fft.fft2(x) - share * self.means, share ** 2 * wide + sigma ** 2
        among = torch.softmax(-(off.abs() ** 2 / spread).sum((1, 2)) / (2 * x.numel()), 0)
        return torch.fft.ifft2((among[:, None, None] * (self.means + share * wide / spread * off)).sum(0)).real


def sampled(solver, sigmas, x: Tensor, denoise: Callable[[int, Tensor], Tensor]):
    """x at every step of the schedule and after the last."""
    before = None
    yield x
    for n in range(len(sigmas) - 1):
        a, b, e = solver(sigmas, n)
        now = denoise(n, x)
        x = a * x + b * now + (e * before if e else 0.0)
        before = now
        yield x


def polynomial(degree: int, dtype=torch.float64, seed: int = 7) -> Callable[[int], Tensor]:
    coefficients = [randn(seed + k, dtype=dtype) for k in range(degree + 1)]
    return lambda n: sum(c * (n / 6) ** k for k, c in enumerate(coefficients))


def extrapolated(order: int, known: Sequence[tuple[int, Tensor]], at: int) -> Tensor:
    """Hold, or the line through the last two."""
    used = known[-(order + 1):]
    return sum(w * d for w, (_, d) in zip(lagrange([n for n, _ in used], at), used, strict=True))


def with_skips(path: Path | Mixture, skips, order: int, look_back=True) -> list[Tensor]:
    """The run with these steps skipped. `look_back` may be None, or something of LookBack's shape."""
    back = LookBack(path.solver, path.sigmas) if look_back is True else look_back
    known: list[tuple[int, Tensor]] = []

    def denoise(n, x):
        if n in skips:
            d = extrapolated(order, known, n)
            d = back.skipped(n, d) if back else d
        else:
            d = (x - path.denoised(n, x)) / path.sigmas[n]
            remembered, d = back.computed(n, d) if back else (d, d)
            known.append((n, remembered))
        return x - path.sigmas[n] * d

    return list(sampled(path.solver, path.sigmas, path.start, denoise))


def far(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


PATTERNS = {"one": (4,), "every second": (3, 5, 7, 9), "two in a row": (3, 4, 7, 8), "four in a row": (3, 4, 5, 6), "unlike": (2, 5, 6, 8, 9, 10)}
