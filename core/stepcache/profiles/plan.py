"""Which steps to compute: dynamic programming over errors that were measured.

    a skip of step m after the computed steps a < b < c says     d'_m = sum_k w_k(m) d_k,  k in (a, b, c)
    its group, up to the next computed step j, moves x by         u = sum_m gap_m (d'_m - d_m)
    looking back leaves of that                                   v = sum_m gap_m (d~_m - d_m),  d~ through b, c and j
    and in the final latent                                       E = gain(c)^2 (|v|^2 + LEFT^2 |u|^2) / |D|^2
    a schedule's error is the sum of E over its groups; the last step is always computed

d_n are the derivatives of the full runs, w the weights of a line or a parabola in the step index, whichever errs less,
the gain that of the error budget (error_budget.py). u and v are weighted sums of the d_n, so all that has to be known of
them is the matrix of their overlaps <d_i, d_j> / |D|^2, averaged over the calibrated pictures. Without looking back, E has
|u|^2 alone.

A state is the last three computed steps, told by their distances; with groups of at most L skips there are (L + 1)^2 of
them at each step, and the best schedule of every count comes out of one pass. The idea of choosing a cache's schedule by
dynamic programming over a calibration run is CacheQuant's (arXiv 2503.01323), whose cost is the change of a feature held.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..predictors.divided_differences import lagrange

LEFT = 0.1      # the share of what was missed that looking back leaves, as it does not know how the model's output follows x


@dataclass(frozen=True)
class Plan:
    """The best schedule with this many computed steps."""

    computed: tuple[int, ...]
    error: float                    # the root of the sum of E; a relative L2 error of the final latent, up to the scale that check runs tell
    measured: float | None = None   # that error, where the schedule itself was run


def plans(overlaps: Tensor, gaps: Sequence[float], gains: Sequence[float], longest: int, may_skip: Sequence[bool], looks_back: bool) -> dict[int, Plan]:
    """The best schedule for each count of computed steps that there is one for.

    overlaps [N, N] in fp64; gaps: the sigma each step covers; gains: what x moved at a step is multiplied by in the final
    latent; longest: most skips in a row.
    """
    total, reach = len(gaps), min(longest, len(gaps) - 1) + 1
    costs = group_costs(overlaps, gaps, gains, reach, looks_back)
    free = [*may_skip[:-1], False]
    # best[n][h, o, k]: the least error of a schedule of k steps that ends n - h - o, n - h, n; 0 stands for none
    best = [torch.full((reach + 1, reach + 1, total + 1), math.inf, dtype=torch.float64) for _ in range(total)]
    came: list[dict[int, Tensor]] = [{} for _ in range(total)]       # came[n][h][o, k]: the o of the state before
    best[0][0, 0, 1] = 0.0
    for now in range(total - 1):
        for ahead in range(1, min(reach, total - 1 - now) + 1):
            if not all(free[now + 1:now + ahead]):
                break
            least, older = (best[now] + costs[ahead][now].unsqueeze(-1)).min(1)     # over the oldest; [old, count]
            following = best[now + ahead]
            following[ahead, :, 1:] = least[:, :-1]
            came[now + ahead][ahead] = older
    found, ends = best[-1].flatten(0, 1).min(0)
    return {count: Plan(traced(came, total, count, *divmod(int(ends[count]), reach + 1)), math.sqrt(max(float(found[count]), 0.0)))
            for count in range(1, total + 1) if math.isfinite(float(found[count]))}


def traced(came: list[dict[int, Tensor]], total: int, count: int, ahead: int, old: int) -> tuple[int, ...]:
    """The computed steps of the schedule that ends in this state."""
    now, steps = total - 1, []
    while ahead:
        steps.append(now)
        before = int(came[now][ahead][old, count - 1])
        now, ahead, old, count = now - ahead, old, before, count - 1
    return (*reversed([*steps, now]),)


def error_of(costs: dict[int, Tensor], computed: Sequence[int]) -> float:
    """The root of the sum of E of any schedule whose groups the costs know."""
    total, before = 0.0, (0, 0)         # distances to the computed step before, and to the one before that
    for now, following in zip(computed, computed[1:], strict=False):
        ahead = following - now
        total += float(costs[ahead][now, before[0], before[1]])
        before = ahead, before[0]
    return math.sqrt(max(total, 0.0))


def neighbours(computed: Sequence[int], longest: int, may_skip: Sequence[bool]) -> list[tuple[int, ...]]:
    """The schedules that differ in one computed step, which lies one step earlier or later."""
    found = []
    for place in range(1, len(computed) - 1):
        for moved in (computed[place] - 1, computed[place] + 1):
            other = (*computed[:place], moved, *computed[place + 1:])
            if computed[place - 1] < moved < computed[place + 1] and allowed(other, longest, may_skip):
                found.append(other)
    return found


def allowed(computed: Sequence[int], longest: int, may_skip: Sequence[bool]) -> bool:
    short = all(following - now <= longest + 1 for now, following in zip(computed, computed[1:], strict=False))
    return short and all(free or n in computed for n, free in enumerate(may_skip))


def group_costs(overlaps: Tensor, gaps: Sequence[float], gains: Sequence[float], reach: int, looks_back: bool) -> dict[int, Tensor]:
    """costs[ahead][n, old, older]: E of the group between the computed steps n and n + ahead, after n - old and n - old - older.

    Where there is no such step, 0 stands for it; what lies outside of the schedule is never asked for.
    """
    total = len(gaps)
    gap, gain = (torch.tensor(values, dtype=torch.float64) for values in (gaps, gains))
    costs = {ahead: torch.zeros(total, reach + 1, reach + 1, dtype=torch.float64) for ahead in range(1, reach + 1)}
    for ahead in range(2, reach + 1):
        for old in range(reach + 1):
            line = [0, -old] if old else [0]
            by_line = moved(overlaps, gap, line, ahead)
            left = moved(overlaps, gap, [ahead, *line], ahead) if looks_back else None
            for older in range(reach + 1 if old else 1):
                missed = torch.minimum(by_line, moved(overlaps, gap, [*line, -old - older], ahead)) if older else by_line
                costs[ahead][:, old, older] = gain ** 2 * (missed if left is None else left + LEFT ** 2 * missed)
    return costs


def moved(overlaps: Tensor, gap: Tensor, nodes: list[int], ahead: int) -> Tensor:
    """|sum_m gap_m (sum_k w_k(m) d_k - d_m)|^2 for the skips m after each step n, [N]; nodes k are told by their distance to n."""
    total = len(gap)
    support = sorted({*nodes, *range(1, ahead)})
    weights = torch.zeros(len(support), total, dtype=torch.float64)
    for skip in range(1, ahead):
        covered = torch.nn.functional.pad(gap[skip:], (0, min(skip, total)))[:total]    # gap of step n + skip
        for node, weight in zip(nodes, lagrange([float(node) for node in nodes], float(skip)), strict=True):
            weights[support.index(node)] += covered * weight
        weights[support.index(skip)] -= covered
    places = (torch.arange(total) + torch.tensor(support).unsqueeze(-1)).clamp(0, total - 1)
    among = overlaps[places.unsqueeze(1), places.unsqueeze(0)]      # [support, support, N]
    return torch.einsum("in,ijn,jn->n", weights, among, weights).clamp_min(0.0)
