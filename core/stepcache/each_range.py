"""Decisions for ranges of blocks one by one: what each range keeps is watched, and the policy asked about it alone.

    c_r = mean|H_n - H_m| / (mean|H_n| (n - m))      m, n the last two steps at which range r was computed

All are decided as an evaluation begins, from one transfer, before the GPU has work to wait for. An evaluation in which
any range is skipped is a skip for the governor, so after the most skips in a row that it allows all ranges are computed.
"""
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.drift import relative_error, sampled
from ..step import Step
from ..store import SAME_PLACE, Row
from .policies import Policy, View
from .signal import comparable


class Seen(NamedTuple):
    """What a policy may ask of one range, in place of a Watch."""

    output_change: float | None


class Kept:
    """One range: the last two steps at which it was computed, of the condition that came first."""

    def __init__(self, row: Row):
        self.row = row
        self.nodes: deque[tuple[Step, Tensor]] = deque(maxlen=2)
        self.change: Tensor | None = None       # between them, not read back yet
        self.rate: float | None = None          # the same per step of the schedule, once it is
        self.skips = 0                          # in a row
        self.learnt = False                     # in this evaluation

    def learn(self, step: Step, value: Tensor) -> None:
        if self.nodes and abs(self.nodes[-1][0].place - step.place) < SAME_PLACE:
            self.nodes.pop()
        self.nodes.append((step, sampled(value).clone()))
        (_, before), (_, now) = self.nodes[0], self.nodes[-1]
        self.rate, self.learnt = None, True
        self.change = relative_error(before, now) if len(self.nodes) > 1 and comparable(now, before) else None

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for _, value in self.nodes)


class EachRange:
    """One per run. skip(view) ... skips(blocks), learn(row, value) ... finish()."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.kept: dict[tuple[int, int], Kept] = {}
        self.step: Step | None = None
        self.allowed: frozenset[tuple[int, int]] = frozenset()
        self.peak = 0       # bytes

    def begin(self, step: Step) -> None:
        self.step, self.allowed = step, frozenset()

    def skip(self, view: View) -> bool:
        """Decide for every range; whether any is skipped."""
        self.read()
        self.allowed = frozenset(blocks for blocks, kept in self.kept.items() if kept.nodes and self.policy.skip(replace(
            view, computed=tuple(step for step, _ in kept.nodes), skipped=kept.skips, signal=Seen(kept.rate))))
        return bool(self.allowed)

    def skips(self, blocks: tuple[int, int]) -> bool:
        return blocks in self.allowed

    def read(self) -> None:
        """Read the changes back that are new."""
        fresh = [kept for kept in self.kept.values() if kept.change is not None]
        if not fresh:
            return
        changes = torch.stack([kept.change.to(fresh[0].change.device) for kept in fresh]).tolist()
        for kept, change in zip(fresh, changes, strict=True):
            (earlier, _), (later, _) = kept.nodes
            kept.rate, kept.change = change / max(later.place - earlier.place, SAME_PLACE), None

    def learn(self, row: Row, value: Tensor) -> None:
        """What a range of blocks was found to add for a row. Only the row that comes first is looked at."""
        kept = self.kept.get(row.blocks)
        if kept is not None and kept.row != row and (kept.learnt or self.skips(row.blocks)):
            return
        if kept is None or kept.row != row:     # two conditions cannot be compared
            kept = self.kept[row.blocks] = Kept(row)
        kept.learn(self.step, value)
        self.peak = max(self.peak, sum(each.bytes for each in self.kept.values()))

    def finish(self) -> None:
        for kept in self.kept.values():
            kept.skips, kept.learnt = 0 if kept.learnt else kept.skips + 1, False

    def forget(self) -> None:
        self.kept.clear()
        self.allowed = frozenset()
