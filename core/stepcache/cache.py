"""The step cache of one run: asks governor and policy, keeps the snapshots, predicts, and keeps the record."""
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.combine import combine
from ...kernels.drift import sampled
from ..report import Evaluation, Report
from ..step import Step
from ..store import SAME_PLACE, Row, Snapshot, Store
from .corrections import Correcting, Guess
from .each_range import EachRange
from .error_budget import ErrorBudget
from .governor import Governor
from .hindcast import dot_products
from .look_back import LookBack
from .policies import Policy, View
from .predictors import Gram, Predictor
from .predictors.base import ahead, weighed
from .signal import MODEL_INPUT, NOTHING, OUTPUT, Watch, signal_of
from .streams import MAIN, Streams


def whole(value: Tensor) -> Tensor:
    """A tensor that is scored in one piece."""
    return value


class StepCache:
    """One per run, dropped with it; there is no reset.

    begin(step) ... the level calls `skips`, `predict`, `learn` and `ran` ... finish(), or nothing after an exception.
    """

    def __init__(self, policy: Policy, candidates, governor: Governor, report: Report, correcting: Correcting | None = None,
                 look_back: LookBack | None = None, budget: ErrorBudget | None = None, store: Callable[[int], Store] = Store, each: EachRange | None = None):
        self.policy, self.governor, self.report = policy, governor, report
        self.streams, self.correcting = Streams(candidates), correcting
        depth = max(candidate.depth for candidate in self.streams.candidates)
        self.store = store(depth)
        self.grams: dict[Row, tuple[list[int], Gram]] = {}     # dot products of a row's snapshots, and whose they are
        self.computed: deque[Step] = deque(maxlen=depth)
        self.packed: tuple[int, ...] = ()    # sizes of the latents that the host packs into one tensor, as video and sound; each is scored apart
        self.notes: dict = {}                # what a level remembers of the network over the run; no tensors
        self.lock = threading.Lock()         # the host may evaluate conditions in several threads, one per GPU
        self.skipped_in_a_row, self.look_back, self.budget = 0, look_back, budget or ErrorBudget(looks_back=look_back is not None)
        self.longest = 0                     # skips in a row so far
        self.broken = ""                     # why everything is computed from here on
        self.restart = ""                    # why the history begins anew at the next evaluation
        self.watch = Watch(signal_of(policy))
        self.each = each                     # decides for each range of blocks; none where the policy decides for all of an evaluation
        # the evaluation under way
        self.step: Step | None = None
        self.begun = 0.0
        self.shares: list[float] = []
        self.seen: set[Row] = set()
        self.error, self.expected = None, None      # of the best predictors in d, and expected in the final latent
        self.why = ""
        self.decision: bool | None = None

    # one evaluation ------------------------------------------------------------------------------------------------
    def begin(self, step: Step) -> None:
        if step.rises:
            self.forget("sigma rises")
        self.step, self.begun = step, time.perf_counter()
        self.watch.begin(step)
        if self.each is not None:
            self.each.begin(step)
        self.shares, self.seen, self.decision = [], set(), None
        self.error = self.streams.choose(tuple(self.computed), step)
        self.expected = self.budget.share(step, self.error, self.again(step))
        self.why = self.broken or self.restart or self.governor.must_compute(step, tuple(self.computed), self.skipped_in_a_row)
        self.restart = ""
        if self.why or self.watch.signal in (NOTHING, OUTPUT):
            self.decide()

    def decide(self) -> None:
        view = View(self.step, tuple(self.computed), self.expected, self.budget.owed, self.skipped_in_a_row, self.longest, self.budget.guided,
                    self.report.model, self.watch)
        self.decision = not self.why and bool(self.streams.best) and (self.each or self.policy).skip(view)

    def skips(self, signal: Tensor | None = None, row: Row | None = None, x: Tensor | None = None) -> bool:
        """Whether this evaluation is a skip.

        A policy that watches something decides on the first call, from what it is shown of `row`, which the host runs
        first: a `signal` from inside the model, or the model's input `x`. Every later call of the evaluation obeys.
        """
        with self.lock:
            self.watch.see(row, x if self.watch.signal == MODEL_INPUT else signal)
            if self.decision is None:
                self.decide()
            return self.decision

    def finish(self) -> None:
        """The evaluation came to its end: settle the scores, move the history on, write the record.

        Rows that no evaluation of the history has seen, context windows that moved on, say, give their memory back.
        """
        step = self.step
        share = sum(self.shares) / len(self.shares) if self.shares else 1.0     # calls that no level understood were computed
        skipped = bool(self.decision) and share < 1                             # so were rows without a history
        measured = None
        if skipped:
            self.skipped_in_a_row += 1
            self.budget.skip(step, self.error, self.again(step))
        else:
            scale = self.attempt(self.streams.settle)
            self.budget.scale = self.budget.scale if scale is None else scale
            measured = self.budget.share(step, self.streams.last, self.again(step))
            self.budget.settle(self.streams.missed)
            while self.again(step):
                self.computed.pop()
            self.computed.append(step)
            self.longest, self.skipped_in_a_row = max(self.longest, self.skipped_in_a_row), 0
        self.watch.finish(skipped)
        if self.each is not None:
            self.each.finish()
        self.report.each.append(Evaluation(
            sigma=step.sigma, computed=not skipped, share=share, predicted_error=self.expected, hindcast_error=measured,
            ms=1000 * (time.perf_counter() - self.begun), why=self.why))
        if self.broken:
            self.forget()
        elif not skipped:
            # rows of context windows that moved on; what is below 0 belongs to no condition and is for the whole run
            for row in self.store.drop(lambda row, newest: row.ordinal >= 0 and newest.step.evaluation < self.computed[0].evaluation):
                self.grams.pop(row, None)

    def again(self, step: Step) -> bool:
        """Whether the last computed step was at this sigma too."""
        return bool(self.computed) and abs(self.computed[-1].place - step.place) < SAME_PLACE

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
        parts = self.parts(row, past[-1].value)
        said = [self.predicted(part, cut, row, past, anchor) for part, cut in parts]
        return said[0] if len(said) == 1 else torch.cat(said, -1)

    def predicted(self, part: Row, cut: Callable[[Tensor], Tensor], row: Row, past: tuple[Snapshot, ...], anchor: Tensor | None) -> Tensor:
        """What stands in for a part of the row."""
        predictor = self.streams.able(part.stream, len(past))
        if self.correcting is not None:
            guess = self.guess(predictor, row, past)
            weights, values = [1.0], [cut(self.correcting.apply(guess).to(guess.value.dtype))]
        else:
            used, weights = weighed(predictor, past, self.step, self.gram(row, past))
            values = [cut(s.value) for s in used]
        if row.ordinal == 0 and not self.again(self.step):      # of a second evaluation a later one cannot tell the error
            with self.lock:
                self.streams.of(part.stream).stood_in.setdefault(part, []).append((self.step, combine(weights, [sampled(value) for value in values])))
        return combine(weights, values, anchor if anchor is None else cut(anchor), out_dtype=None if anchor is None else anchor.dtype)

    def guess(self, predictor: Predictor, row: Row, past: tuple[Snapshot, ...]) -> Guess:
        """What a predictor alone says for the row now."""
        used, weights = weighed(predictor, past, self.step, self.gram(row, past))
        value = combine(weights, [s.value for s in used])
        return Guess(row, predictor, self.step, ahead([past[-1].step], self.step), value, past[-1].value)

    def gram(self, row: Row, past: tuple[Snapshot, ...]) -> Gram | None:
        """Dot products of a row's snapshots, read back once however many steps they serve; none where nobody asks."""
        if not self.streams.needs_gram:
            return None
        known, evaluations = self.grams.get(row), [s.step.evaluation for s in past]
        if known is None or known[0] != evaluations:
            known = self.grams[row] = evaluations, dot_products(past)
        return known[1]

    def learn(self, row: Row, value: Tensor) -> None:
        """Keep what was computed for a row; `value` must be the cache's own. Only the main pass is scored."""
        with self.lock:
            if self.broken:
                return
            (self.each or self.watch).learn(row, value)
            past, guesses = self.store.get(row), []
            if past and past[-1].shape == value.shape and not self.decision:
                if self.correcting is not None and ahead([past[-1].step], self.step) >= SAME_PLACE:
                    guesses = [self.guess(candidate, row, past) for candidate in self.streams.candidates if candidate.history <= len(past)]
                if row.ordinal == 0:
                    gram, said = self.gram(row, past), {guess.predictor: self.correcting.apply(guess) for guess in guesses}
                    for part, cut in self.parts(row, value):
                        # what has to be fetched comes one by one, and no more of it stays than a score looks at
                        look = cut if past[-1].came is None else lambda t, cut=cut: sampled(cut(t)).clone()
                        seen, actual = past if look is whole else [Snapshot(s.step, look(s.value)) for s in past], look(value)
                        hindcast = self.streams.of(part.stream)
                        hindcast.measure(part, seen, self.step, actual)
                        hindcast.score(seen, self.step, actual, gram, {predictor: look(guess) for predictor, guess in said.items()})
            if self.correcting is not None:
                self.correcting.learn(row, self.step, value, guesses)
            depth = self.store.depth
            self.store.put(row, self.step, value)
            if self.store.depth < depth:
                self.shorten()

    def parts(self, row: Row, value: Tensor) -> list[tuple[Row, Callable[[Tensor], Tensor]]]:
        """What of a row's tensor is scored apart, so that the longest does not drown the others: under which row, and how it is cut out."""
        if not self.packed or value.shape[1:] != (1, sum(self.packed)):
            return [(row, whole)]
        return [(row._replace(stream=f"latent {n}"), lambda value, n=n: value.split(self.packed, -1)[n].contiguous()) for n in range(len(self.packed))]

    def handed_out(self, d: Tensor) -> Tensor:
        """The derivative to hand out where `d` stands in for the whole evaluation."""
        return d if self.look_back is None else self.look_back.skipped(self.step.place, d)

    def made_up(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative to remember and the one to hand out where `d` was computed; both are `d` where nothing is owed."""
        return (d, d) if self.look_back is None else self.look_back.computed(self.step.place, d)

    def weigh(self, x: Tensor, denoised: Tensor) -> None:
        """Look at how large d is against the denoised latent, at a computed evaluation."""
        if not self.decision and self.step.sigma > 0 and x.shape == denoised.shape:
            self.streams.of(MAIN).weigh(x, denoised, self.step.sigma)

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
            self.watch.forget()
            if self.each is not None:
                self.each.forget()
            self.streams.drop()
            self.store.drop(lambda row, newest: row.device == device)

    def shorten(self) -> None:
        """The store's rings got shorter: predictors that need more snapshots leave."""
        if not self.store.depth:
            self.give_up(self.store.gave)
        self.streams.narrow(self.store.depth)

    def look_back_no_more(self) -> None:
        """From here on the end of the run sees more of an error, because computed steps do not make up for it."""
        if self.look_back is not None:
            self.look_back, self.budget.looks_back = None, False

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
        self.grams.clear()
        if self.correcting is not None:
            self.correcting.clear()
        self.computed.clear()
        self.watch.forget()
        if self.each is not None:
            self.each.forget()
        self.streams.forget()
        if self.look_back is not None:
            self.look_back.forget()
        self.budget.drop()
        self.skipped_in_a_row = 0

    def close(self) -> None:
        self.report.estimated_error = self.budget.total if len(self.report.each) > self.report.computed else None
        self.report.cache_bytes = sum(part.peak for part in (self.store, self.watch, self.each, self.look_back, self.correcting) if part is not None)
        if self.store.gave:
            self.report.add_reason(self.store.gave)
        self.forget()
        self.watch.close()
