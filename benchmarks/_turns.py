"""Several ways to sample the same picture, timed in turn, so that whatever else the machine does comes to all of them alike."""
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import comfy.sample
import torch
from torch import Tensor

STEPS, ROUNDS = 20, 5


class Timed(NamedTuple):
    """Medians of a way's runs; cpu: of all threads, which the other programs of a busy machine leave alone."""

    wall: float
    cpu: float
    latent: Tensor


def sampled(patcher, positive: list, noise: Tensor, negative: list | None = None, cfg: float = 1.0, steps: int | None = None) -> Tensor:
    with torch.inference_mode():
        return comfy.sample.sample(patcher, noise, steps or STEPS, cfg, "euler", "simple", positive, negative or positive, noise * 0,
                                   disable_pbar=True, seed=1)


def in_turn(ways: Mapping[str, Callable[[], Tensor]]) -> dict[str, Timed]:
    """The first round warms up and is not counted."""
    wall, cpu, latents = {name: [] for name in ways}, {name: [] for name in ways}, {}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            begun = time.perf_counter(), time.process_time()
            latents[name] = way()
            wall[name].append(time.perf_counter() - begun[0])
            cpu[name].append(time.process_time() - begun[1])
        print(f"    round {number} of {ROUNDS}: " + ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in wall.items()), flush=True)
    return {name: Timed(statistics.median(wall[name][1:]), statistics.median(cpu[name][1:]), latents[name]) for name in ways}


def ratios(timed: Mapping[str, Timed], ours: str, others: Mapping[str, str]) -> dict[str, float]:
    """Seconds of `ours` for one of another way's. others: {ending of the field: way}."""
    found = {}
    for ending, other in others.items():
        for field in ("wall", "cpu"):
            found[f"{field}_ratio{ending}"] = round(getattr(timed[ours], field) / getattr(timed[other], field), 4)
    return found


def errors(timed: Mapping[str, Timed], ours: str, exact: str, plain: str, others: Mapping[str, str] | None = None) -> dict[str, float]:
    """Of the final latent: the largest difference from `exact`, the same as relative L2, and what the references change at all.

    others: {ending of the field: way} whose largest difference is told beside ours.
    """
    right = timed[exact].latent

    def off(way: str) -> float:
        return (timed[way].latent - right).abs().max().item()

    return {"max_abs_error": off(ours), "relative_error": ((timed[ours].latent - right).norm() / right.norm()).item(), "effect": off(plain),
            **{f"max_abs_error{ending}": off(way) for ending, way in (others or {}).items()}}
