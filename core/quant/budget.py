"""A plan within a memory budget: every layer at its smallest format, then the budget goes where it takes away most error per byte.

    choose the next step up of a layer by  (cost now - cost then) / (bytes then - bytes now),  largest first
"""
from __future__ import annotations

import heapq
from collections.abc import Sequence

from .score import Scored
from .transcode import BITS


def ladder(layer: Scored, score: str) -> list[str]:
    """Targets from small to large, each with less cost than the one before, and no step with less gain per byte than the next."""
    best: list[str] = []
    for target in sorted((*layer.errors, "full"), key=lambda target: (BITS[target], layer.cost(target, score))):
        if best and layer.cost(target, score) >= layer.cost(best[-1], score):
            continue
        while len(best) > 1 and gain(layer, best[-2], best[-1], score) <= gain(layer, best[-2], target, score):
            best.pop()
        best.append(target)
    return best


def gain(layer: Scored, low: str, high: str, score: str) -> float:
    """Cost taken away per byte."""
    return (layer.cost(low, score) - layer.cost(high, score)) / (size(layer, high) - size(layer, low))


def size(layer: Scored, target: str) -> float:
    """Bytes of a layer's weights."""
    return layer.weights * BITS[target] / 8


def planned(layers: Sequence[Scored], budget: float, score: str, others: float = 0.0) -> dict[str, str]:
    """Layer -> target, so that all weights fit into `budget` bytes, `others` among them, which stay. ValueError where not even the smallest formats do."""
    asked, budget = budget, budget - others
    ladders = [ladder(layer, score) for layer in layers]
    chosen = [0] * len(layers)
    used = sum(size(layer, rungs[0]) for layer, rungs in zip(layers, ladders, strict=True))
    if used > budget:
        raise ValueError(f"the weights need {(used + others) / 2**20:.1f} MiB in their smallest formats, and the budget is {asked / 2**20:g} MiB; raise it, "
                         "or allow a smaller format")
    steps: list[tuple[float, int]] = []

    def offer(n: int) -> None:
        if chosen[n] + 1 < len(ladders[n]):
            heapq.heappush(steps, (-gain(layers[n], *ladders[n][chosen[n]:chosen[n] + 2], score), n))

    for n in range(len(layers)):
        offer(n)
    while steps:
        _, n = heapq.heappop(steps)
        low, high = ladders[n][chosen[n]:chosen[n] + 2]
        more = size(layers[n], high) - size(layers[n], low)
        if used + more <= budget:       # one that is too large is passed over; smaller ones may fit yet
            used += more
            chosen[n] += 1
            offer(n)
    return {layer.name: rungs[at] for layer, rungs, at in zip(layers, ladders, chosen, strict=True)}
