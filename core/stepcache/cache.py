"""The step cache of one run: asks governor and policy, keeps the snapshots, predicts, and keeps the record."""
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.combine import combine
from ..report import Evaluation, Report
from ..step import Step
from ..store import SAME_PLACE, Row, Snapshot, Store
from .governor import Governor
from .hindcast import Hindcast, relative_error, sampled
from .policies import Policy, View
from .predictors.hold import Hold


class StepCache:
    """One per run, dropped with it; there is no reset.

    begin(step) ... the level calls `skips`, `predict`, `learn` and `ran` ... finish(), or nothing after an exception.
    """

    def __init__(self, policy: Policy, candidates, governor: Governor, report: Report, store: Callable[[int], Store] = Store):
        self.policy, self.governor, self.report = policy, governor, report
        self.hindcast = Hindcast(candidates)
        depth = max(candidate.history for candidate in self.hindcast.candidates)
        self.store = store(depth)
        self.computed: deque[Step] = deque(maxlen=depth)
        self.lock = threading.Lock()         # the host may evaluate conditions in several threads, one per GPU
        self.skipped_in_a_row, self.owed = 0, 0.0
        self.broken = ""                     # why everything is computed from here on
        self.restart = ""                    # why the history begins anew at the next evaluation
        # first blocks' residual of the gate's row, and that row: at the last computed step, and now
        self.signal: tuple[Row | None, Tensor] | None = None
        self.fresh_signal: tuple[Row | None, Tensor] | None = None
        # the evaluation under way
        self.step: Step | None = None
        self.begun = 0.0
        self.shares: list[float] = []
        self.seen: set[Row] = set()
        self.best, self.expected = None, None
        self.why = ""
        self.decision: bool | None = None

    # one evaluation ------------------------------------------------------------------------------------------------
    def begin(self, step: Step) -> None:
        if step.rises:
            self.forget("sigma rises")
        self.step, self.begun = step, time.perf_counter()
        self.shares, self.seen, self.fresh_signal, self.decision = [], set(), None, None
        self.best, expected = self.hindcast.choose(tuple(self.computed), step)
        self.expected = None if expected is None else expected * step.width
        self.why = self.broken or self.restart or self.governor.must_compute(step, tuple(self.computed), self.skipped_in_a_row)
        self.restart = ""
        if self.why or not self.policy.needs_forward:
            self.decide(None)

    def decide(self, drift: float | None) -> None:
        view = View(self.step, tuple(self.computed), self.expected, self.owed, drift)
        self.decision = not self.why and self.best is not None and self.policy.skip(view)

    def skips(self, signal: Tensor | None = None, row: Row | None = None) -> bool:
        """Whether this evaluation is a skip.

        A policy that needs a forward decides on the first call, from `signal`, the first blocks' residual of `row`,
        which the host runs first; every later call of the evaluation obeys.
        """
        with self.lock:
            if self.fresh_signal is None and signal is not None and self.policy.needs_forward:
                self.fresh_signal = (row, signal.clone())
            if self.decision is None:
                before, known = self.signal, self.signal is not None and signal is not None
                known = known and before[0] == row and before[1].shape == signal.shape and before[1].device == signal.device
                self.decide(relative_error(sampled(signal), sampled(before[1])).item() if known else None)
            return self.decision

    def finish(self) -> None:
        """The evaluation came to its end: settle the scores, move the history on, write the record.

        Rows that no evaluation of the history has seen, context windows that moved on, say, give their memory back.
        """
        step = self.step
        share = sum(self.shares) / len(self.shares) if self.shares else 1.0     # calls that no level understood were computed
        skipped = bool(self.decision) and share < 1                             # so were rows without a history
        self.hindcast.last = None
        if skipped:
            self.skipped_in_a_row += 1
            self.owed += self.expected or 0.0
        else:
            self.attempt(lambda: self.hindcast.settle(self.best))
            while self.computed and abs(self.computed[-1].place - step.place) < SAME_PLACE:
                self.computed.pop()
            self.computed.append(step)
            self.skipped_in_a_row, self.owed, self.signal = 0, 0.0, self.fresh_signal
        measured = None if self.hindcast.last is None else self.hindcast.last * step.width
        self.report.each.append(Evaluation(
            sigma=step.sigma, computed=not skipped, share=share, predicted_error=self.expected, hindcast_error=measured,
            ms=1000 * (time.perf_counter() - self.begun), why=self.why))
        if self.broken:
            self.forget()
        elif not skipped:
            self.store.drop(lambda row, newest: newest.step.evaluation < self.computed[0].evaluation)

    # rows, called by the levels and by what finds the rows for them ----------------------------------------------
    def enter(self, rows: tuple[Row, ...]) -> bool:
        """Whether these rows are evaluated for the first time in this evaluation, as the host does it.

        Something that cuts the picture into tiles calls the model several times for the same row; their histories
        could not be told apart.
        """
        with self.lock:
            if self.seen.intersection(rows):
                self.give_up("the model is called several times for one condition, as tiling does, so everything is computed; choose guided output")
                return False
            self.seen.update(rows)
            return True

    def ready(self, row: Row, shape=None) -> bool:
        """Whether a row's snapshots reach up to the last computed step, and have the shape that is wanted now."""
        past = self.store.get(row)
        return bool(past) and past[-1].step.evaluation >= self.computed[-1].evaluation and (shape is None or past[-1].shape == shape)

    def predict(self, row: Row, anchor: Tensor | None = None) -> Tensor:
        """What stands in for the row now, a new tensor, `anchor` added. The row must be ready."""
        past = self.store.get(row)
        used: tuple[Snapshot, ...] = past[-self.best.history:]
        predictor = self.best if len(used) == self.best.history else self.fallback(len(used))
        used = past[-predictor.history:]
        return combine(predictor.weights([s.step for s in used], self.step), [s.value for s in used], anchor)

    def fallback(self, snapshots: int):
        """The highest order for which a row with a shorter history than the others has snapshots enough."""
        able = [candidate for candidate in self.hindcast.candidates if candidate.history <= snapshots]
        return able[-1] if able else Hold()

    def learn(self, row: Row, value: Tensor) -> None:
        """Keep what was computed for a row; `value` must be the cache's own. Only the main pass is scored."""
        with self.lock:
            if self.broken:
                return
            past = self.store.get(row)
            if row.ordinal == 0 and past and past[-1].shape == value.shape and not self.decision:
                self.hindcast.score([at_hand(snapshot) for snapshot in past], self.step, value)
            depth = self.store.depth
            self.store.put(row, self.step, value)
            if self.store.depth < depth:
                self.shorten()

    def ran(self, rows: int, share: float) -> None:
        """`rows` conditions were evaluated with this share of the blocks of a full evaluation."""
        with self.lock:
            self.shares += [share] * rows

    # memory ----------------------------------------------------------------------------------------------------------
    def attempt(self, work: Callable, device: str = ""):
        """What `work` gives, which makes tensors for the cache alone; none where memory ran out: the run goes on without cache.

        The rows of `device`, which the caller works on, give their memory back at once, the others when no thread uses them.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            pass        # left behind first: it holds on to the tensors of its frames
        self.give_up("memory ran out for the cache, so everything is computed; set a cache budget, or keep results in host memory")
        with self.lock:
            self.signal = None
            self.hindcast.waiting.clear()
            self.store.drop(lambda row, newest: row.device == device)

    def shorten(self) -> None:
        """The store's rings got shorter: predictors that need more snapshots leave."""
        if not self.store.depth:
            self.give_up(self.store.gave)
        self.hindcast.candidates = tuple(c for c in self.hindcast.candidates if c.history <= self.store.depth) or (Hold(),)

    # the run ---------------------------------------------------------------------------------------------------------
    def give_up(self, why: str) -> None:
        """Compute everything from the next evaluation on, and say so."""
        if not self.broken:
            self.broken = why
            self.report.add_reason(why)

    def forget(self, why: str = "") -> None:
        """Drop the history; `why` is told with the next evaluation."""
        self.restart = why
        self.store.clear()
        self.computed.clear()
        self.skipped_in_a_row, self.owed, self.signal = 0, 0.0, None

    def close(self) -> None:
        self.report.cache_bytes = self.store.peak
        if self.store.gave:
            self.report.add_reason(self.store.gave)
        self.forget()
        self.fresh_signal = None
        self.hindcast.waiting.clear()


def at_hand(snapshot: Snapshot) -> Snapshot:
    """A snapshot whose value is where it was computed: itself, or a sample of it, which is enough for a score."""
    return snapshot if snapshot.came is None else Snapshot(snapshot.step, sampled(snapshot.value).clone())
