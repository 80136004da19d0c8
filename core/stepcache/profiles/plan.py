"""Which steps to compute: dynamic programming over errors that were measured.

    a skip of step m after the computed steps a < b < c says     d'_m = sum_k w_k(m) d_k,  k in (a, b, c)
    its group, up to the next computed step j, moves x by         u = sum_m gap_m (d'_m - d_m)
    looking back leaves of that                                   v = sum_m gap_m (d~_m - d_m),  d~ through b, c and j
    and in the final latent                                       E = gain(c)^2 (|v|^2 + LEFT^2 |u|^2) / |D|^2
    of all schedules with k computed steps, the one with the least sum of E over its groups; the last step is always computed

d_n are the derivatives of the full runs, w the weights of a line or a parabola in the step index, whichever errs less,
the gain that of the error budget (error_budget.py). u and v are weighted sums of the d_n, so all that has to be known of
them is the matrix of their overlaps <d_i, d_j> / |D|^2, averaged over the calibrated pictures. Without looking back, E has
|u|^2 alone.

Groups also add up or cancel each other, which a sum of squares does not see. So the programme runs with several gains, and
of its schedules the one is taken whose whole error is least: half the sum of E, half the E of the summed u and v.

A state is the last three computed steps, told by their distances; with groups of at most L skips there are (L + 1)^2 of
them at each step, and the best schedule of every count comes out of one pass. The idea of choosing a cache's schedule by
dynamic programming over a calibration run is CacheQuant's (arXiv 2503.01323), whose cost is the change of a feature held.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from ..predictors.divided_differences import lagrange

LEFT = 0.1      # the share of what was missed that looking back leaves, as it does not know how the model's output follows x


@dataclass(frozen=True)
class Plan:
    """The best schedule with this many computed steps."""

    computed: tuple[int, ...]
    error: float        # a relative L2 error of the final latent, up to the scale that check runs tell


@dataclass(frozen=True, eq=False)
class Measured:
    """What plans are made from: overlaps [N, N] in fp64, and the sigma that each step covers."""

    overlaps: Tensor
    gaps: Tensor        # [N], fp64
    looks_back: bool

    def plans(self, gains: Sequence[Sequence[float]], longest: int, may_skip: Sequence[bool]) -> dict[int, Plan]:
        """The best schedule for each count of computed steps that there is one for.

        gains: what x moved at a step is multiplied by in the final latent; the first one tells the errors, all are tried.
        longest: most skips in a row.
        """
        reach = min(longest, len(self.gaps) - 1) + 1
        errors, rivals = self.group_errors(reach), {}
        for gain in gains:
            for count, computed in schedules(errors, torch.tensor(gain, dtype=torch.float64), reach, may_skip).items():
                rivals.setdefault(count, set()).add(computed)
        return {count: min((Plan(computed, self.error(computed, gains[0])) for computed in sorted(those)), key=attrgetter("error"))
                for count, those in rivals.items()}

    def group_errors(self, reach: int) -> dict[int, Tensor]:
        """errors[ahead][n, old, older]: E, less its gain, of the group between the computed steps n and n + ahead, after n - old and n - old - older.

        Where there is no such step, 0 stands for it; what lies outside of the schedule is never asked for.
        """
        errors = {ahead: torch.zeros(len(self.gaps), reach + 1, reach + 1, dtype=torch.float64) for ahead in range(1, reach + 1)}
        for ahead in range(2, reach + 1):
            for old in range(reach + 1):
                line = [0, -old] if old else [0]
                by_line = self.squared(*self.moved(line, ahead))
                left = self.squared(*self.moved([ahead, *line], ahead)) if self.looks_back else None
                for older in range(reach + 1 if old else 1):
                    missed = torch.minimum(by_line, self.squared(*self.moved([*line, -old - older], ahead))) if older else by_line
                    errors[ahead][:, old, older] = missed if left is None else left + LEFT ** 2 * missed
        return errors

    def moved(self, nodes: list[int], ahead: int) -> tuple[list[int], Tensor]:
        """sum_m gap_m (sum_k w_k(m) d_k - d_m) over the skips m between n and n + ahead, as weights of the d, for every n at once.

        nodes k are told by their distance to n. Gives such distances, and the weight of each, [distances, N].
        """
        total, support = len(self.gaps), sorted({*nodes, *range(1, ahead)})
        weights = torch.zeros(len(support), total, dtype=torch.float64)
        for skip in range(1, ahead):
            covered = torch.nn.functional.pad(self.gaps[skip:], (0, min(skip, total)))[:total]      # gap of step n + skip
            for node, weight in zip(nodes, lagrange([float(node) for node in nodes], float(skip)), strict=True):
                weights[support.index(node)] += covered * weight
            weights[support.index(skip)] -= covered
        return support, weights

    def squared(self, support: list[int], weights: Tensor) -> Tensor:
        """|sum of weights d|^2 for every n, [N]."""
        total = len(self.gaps)
        places = (torch.arange(total) + torch.tensor(support).unsqueeze(-1)).clamp(0, total - 1)
        among = self.overlaps[places.unsqueeze(1), places.unsqueeze(0)]     # [support, support, N]
        return torch.einsum("in,ijn,jn->n", weights, among, weights).clamp_min(0.0)

    def error(self, computed: Sequence[int], gains: Sequence[float]) -> float:
        """The whole error of a schedule."""
        missed, left, apart = *(torch.zeros(len(self.gaps), dtype=torch.float64) for _ in range(2)), 0.0
        for place, (now, following) in enumerate(zip(computed, computed[1:], strict=False)):
            past, ahead = [step - now for step in reversed(computed[max(place - 2, 0):place + 1])], following - now
            ways = [self.at(now, past[:count], ahead) for count in range(min(len(past), 2), len(past) + 1)]
            by = min(ways, key=self.size) * gains[now]
            rest = self.at(now, [ahead, *past[:2]], ahead) * gains[now] if self.looks_back else by
            missed, left = missed + by, left + rest
            apart += self.cost(rest, by)
        return math.sqrt((apart + self.cost(left, missed)) / 2)

    def at(self, now: int, nodes: list[int], ahead: int) -> Tensor:
        """`moved` for one n, as weights of all d, [N]."""
        support, weights = self.moved(nodes, ahead)
        return torch.zeros(len(self.gaps), dtype=torch.float64).index_add_(0, torch.tensor(support) + now, weights[:, now])

    def size(self, weights: Tensor) -> float:
        return max(float(weights @ self.overlaps @ weights), 0.0)

    def cost(self, left: Tensor, missed: Tensor) -> float:
        return self.size(left) + LEFT ** 2 * self.size(missed) if self.looks_back else self.size(missed)


def schedules(errors: dict[int, Tensor], gain: Tensor, reach: int, may_skip: Sequence[bool]) -> dict[int, tuple[int, ...]]:
    """The schedule with the least sum of gain^2 E for each count of computed steps."""
    total, free = len(gain), [*may_skip[:-1], False]
    # best[n][h, o, k]: the least sum of a schedule of k steps that ends n - h - o, n - h, n; 0 stands for none
    best = [torch.full((reach + 1, reach + 1, total + 1), math.inf, dtype=torch.float64) for _ in range(total)]
    came: list[dict[int, Tensor]] = [{} for _ in range(total)]       # came[n][h][o, k]: the o of the state before
    best[0][0, 0, 1] = 0.0
    for now in range(total - 1):
        for ahead in range(1, min(reach, total - 1 - now) + 1):
            if not all(free[now + 1:now + ahead]):
                break
            least, older = (best[now] + (gain[now] ** 2 * errors[ahead][now]).unsqueeze(-1)).min(1)     # over the oldest; [old, count]
            best[now + ahead][ahead, :, 1:] = least[:, :-1]
            came[now + ahead][ahead] = older
    found, ends = best[-1].flatten(0, 1).min(0)
    return {count: traced(came, total, count, *divmod(int(ends[count]), reach + 1)) for count in range(1, total + 1) if math.isfinite(float(found[count]))}


def traced(came: list[dict[int, Tensor]], total: int, count: int, ahead: int, old: int) -> tuple[int, ...]:
    """The computed steps of the schedule that ends in this state."""
    now, steps = total - 1, []
    while ahead:
        steps.append(now)
        before = int(came[now][ahead][old, count - 1])
        now, ahead, old, count = now - ahead, old, before, count - 1
    return (*reversed([*steps, now]),)

