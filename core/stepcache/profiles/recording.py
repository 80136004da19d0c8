"""What a full run shows, step by step. Nothing here changes what is computed.

    output, first block, modulated input      mean|s_n - s_(n-1)| / mean|s_(n-1)| for d, for what the first block adds to the image tokens,
                                              and for what TeaCache looks at
    scale                                     |d_n| / |D_n|
    magcache                                  mean over tokens of |r_n| / |r_(n-1)|, r what all blocks add; for each condition

d = (x - D) / sigma after guidance. The blocks are listened to through the same seam as level block range uses.
"""
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ....kernels.drift import relative_error, sampled
from ...families import Family, Unfamiliar
from ...store import Row
from ..levels import BlockRange, Blocks, Call
from ..signal import FIRST_BLOCK, MODULATED_INPUT

MOST = 100_000      # elements of a derivative that are kept, so that all steps of a run fit into memory
OUTPUT, SCALE = "output", "scale"
NAMES = (OUTPUT, FIRST_BLOCK, MODULATED_INPUT, SCALE)


@dataclass(frozen=True)
class Listening:
    """A policy that wants to see a signal and skips nothing."""

    signal: str
    name = "listening"
    needs_forward = True


class Ear:
    """Stands where the step cache of a run would be, for a level that works inside the model: it takes down what it is shown."""

    broken, each = "", None

    def __init__(self, signal: str):
        self.policy = Listening(signal)
        self.signal: tuple[int, Tensor] | None = None       # condition and signal, of the row that the host runs first
        self.added: dict[int, Tensor] = {}                  # condition: length of what the blocks add to each token

    def skips(self, signal: Tensor | None = None, row: Row | None = None, x: Tensor | None = None) -> bool:
        if signal is not None and self.signal is None:
            self.signal = row.cond, sampled(signal, MOST).float()
        return False

    def learn(self, row: Row, value: Tensor) -> None:
        if not row.stream and row.cond not in self.added:
            self.added[row.cond] = value.float().norm(dim=-1)

    def attempt(self, work: Callable, device: str = ""):
        return work()

    def ran(self, rows: int, share: float) -> None: ...

    def give_up(self, why: str) -> None: ...


class Recording:
    """One full run. begin() ... inside(...) ... end(x, denoised, sigma), once per step."""

    def __init__(self, family: Family | None):
        self.family = family
        self.deaf = "" if family is not None and family.stacks else "the blocks of this model are not known"     # why blocks are not listened to
        self.derivatives: list[Tensor] = []         # samples of d, one per step
        self.latent: Tensor | None = None           # the same sample of the newest denoised latent
        self.each: dict[str, list[float | None]] = {name: [] for name in NAMES}
        self.growth: dict[int, list[float]] = {}    # condition: magnitude ratios, from the second step on
        self.ears: tuple[Ear, ...] = ()
        self.before: tuple[Ear, ...] = ()

    def begin(self) -> None:
        self.before, self.ears = self.ears, (Ear(FIRST_BLOCK), Ear(MODULATED_INPUT))

    def inside(self, rows: tuple[Row, ...], network, compute):
        """A call of the diffusion model, listened to where its blocks are as the family says."""
        if self.deaf or not self.ears or not rows:
            return compute()
        first, all_blocks = self.ears
        try:
            call = Call(rows, blocks=Blocks.of(self.family, network), network=network)
            return BlockRange(1).evaluate(first, call, lambda: BlockRange(0).evaluate(all_blocks, call, compute))
        except Unfamiliar as fact:
            self.deaf = f"{self.family.name} is not built as expected: {fact}"
        return compute()

    def end(self, x: Tensor, denoised: Tensor, sigma: float) -> None:
        latent = sampled(denoised, MOST).float()
        d = (sampled(x, MOST).float() - latent) / sigma
        self.each[OUTPUT].append(relative_error(d, self.derivatives[-1].to(d.device)).item() if self.derivatives else None)
        self.each[SCALE].append((d.norm() / latent.norm().clamp_min(1e-12)).item())
        for ear, before in zip(self.ears, self.before or (None, None), strict=True):
            self.each[ear.policy.signal].append(change(ear.signal, before and before.signal))
        if self.before:
            now, then = self.ears[1].added, self.before[1].added
            for cond in now.keys() & then.keys():
                if now[cond].shape == then[cond].shape:
                    self.growth.setdefault(cond, []).append((now[cond] / then[cond].clamp_min(1e-12)).mean().item())
        self.derivatives.append(d.cpu())
        self.latent = latent.cpu()

    def overlaps(self) -> Tensor:
        """<d_i, d_j> / |D|^2, in fp64."""
        d = torch.stack([derivative.flatten() for derivative in self.derivatives]).double()
        return d @ d.T / self.latent.double().square().sum().clamp_min(1e-24)


def change(now: tuple[int, Tensor] | None, before: tuple[int, Tensor] | None) -> float | None:
    """Relative change from one step to the next; unknown where another condition came first."""
    if now is None or before is None or now[0] != before[0] or now[1].shape != before[1].shape:
        return None
    return relative_error(now[1], before[1]).item()


def averaged(recordings: list[Recording], name: str) -> tuple[float | None, ...]:
    """One number per step, the mean over the runs that know it."""
    columns = zip(*(recording.each[name] for recording in recordings), strict=True)
    return tuple(fmean(known) if (known := [value for value in column if value is not None]) else None for column in columns)


def magnitude_ratios(recordings: list[Recording]) -> tuple[tuple[float, ...], ...]:
    """MagCache's curves, 1 at the first step: of the positive condition, and of the negative one where there is one."""
    curves, steps = [], len(recordings[0].derivatives)
    for cond in sorted({cond for recording in recordings for cond in recording.growth}):
        known = [recording.growth[cond] for recording in recordings if len(recording.growth.get(cond, ())) == steps - 1]
        if known:
            curves.append((1.0, *(fmean(column) for column in zip(*known, strict=True))))
    return tuple(curves)
