"""Reference latents frozen: their K and V are taken in an early evaluation and read in those after it, without their tokens.

    evaluation 0 ... n - 1          X, R -> blocks                                   K(R), V(R) taken at n - 1
    from n on                       X -> blocks,  Attn(Q(X), [K(X) ; K(R)], [V(X) ; V(R)])
    every r-th after a taking       as the first ones, K and V taken anew            r = 0: never

Approximate: the models this is for let references read the noise and text of every step, and most modulate them by its time.
How far off it is can be measured for one evaluation (measured.py).
The idea is that of the host's Flux KV Cache; here every row of every condition has its own.
"""
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..store import ASIDE, ITEMSIZE, Row
from .join import Buffers, Mismatch, Segment
from .kept import Kept, Taking
from .leaving import Leaving
from .measured import Comparison

SEVERAL = "the model is called several times for one condition, as tiling does"


@dataclass
class State:
    """Of one condition's rows."""

    full: int = 0       # evaluations that were computed with the references in the sequence
    age: int = 0        # evaluations since K and V were taken
    kept: list[Kept] | None = None


@dataclass
class Call:
    """One model call. run: the host's, with these options and further arguments; rows split the batch evenly, in order."""

    rows: tuple[Row, ...]
    network: object
    options: dict
    extra: dict
    run: Callable[[dict, dict], Tensor]

    @property
    def batch(self) -> int:
        return sum(row.shape[0] for row in self.rows)


@dataclass
class Freezing:
    """One run's, dropped with it.

    first: evaluations in full; refresh: every so many evaluations K and V are taken anew; measure: compare the first frozen evaluation.
    """

    leaving: Leaving
    first: int
    refresh: int
    measure: bool
    storage: str
    states: dict[Row, State] = field(default_factory=dict)
    buffers: dict[str, Buffers] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)    # the host may use several GPUs, each in its thread
    evaluation: int = -1
    ordinals: Counter | None = None     # none outside an evaluation
    ordinal: int = 0
    seen: set[Row] = field(default_factory=set)
    begun: int | None = None            # the first evaluation with frozen references
    full_in: set[int] = field(default_factory=set)
    frozen_in: set[int] = field(default_factory=set)
    comparison: Comparison = field(default_factory=Comparison)     # of this evaluation
    errors: dict[int, float] = field(default_factory=dict)      # by evaluation
    unguided: set[int] = field(default_factory=set)     # evaluations whose error is that of the predictions before guidance
    peak: int = 0       # bytes
    broken: str = ""    # why everything is computed in full from here on

    # where the run is ------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        self.evaluation, self.ordinals, self.seen, self.comparison = self.evaluation + 1, Counter(), set(), Comparison()

    def finish(self, denoised: Tensor | None = None, scale: float = 1.0) -> None:
        """With what guidance of this scale made of the predictions; without it where the evaluation was broken off."""
        found = None if denoised is None else self.comparison.result(denoised, scale)
        if found is not None:
            self.errors[self.evaluation], guided = found
            self.unguided |= set() if guided else {self.evaluation}
        self.ordinals, self.comparison = None, Comparison()

    def batched(self, window: tuple | None) -> None:
        """The host comes to the conditions of one pass: the main one first, then guidance that repeats them."""
        if self.ordinals is not None:
            self.ordinal = self.ordinals[window]
            self.ordinals[window] += 1

    def rows(self, x, options: dict, window: tuple | None) -> tuple[Row, ...]:
        """The rows of a model call; none where it is not understood."""
        uuids, conds = options.get("uuids"), options.get("cond_or_uncond")
        if self.ordinals is None or not torch.is_tensor(x) or not uuids or not conds or len(uuids) != len(conds) or x.shape[0] % len(uuids):
            return ()
        shape = (x.shape[0] // len(uuids), *x.shape[1:])
        patches = frozenset((kind, key) for kind, blocks in options.get("patches_replace", {}).items() for key in blocks)
        return tuple(Row(str(x.device), self.ordinal, uuid, cond, window, shape, patches) for uuid, cond in zip(uuids, conds, strict=True))

    # one call --------------------------------------------------------------------------------------------------------
    def untouched(self, rows: tuple[Row, ...], output: Tensor) -> Tensor:
        """A call that is the same both ways, as it came."""
        if rows:
            with self.lock:
                self.comparison.add(rows, output)
        return output

    def evaluate(self, call: Call) -> Tensor:
        """Denoised, with the references in the sequence or frozen."""
        with self.lock:
            if self.seen.intersection(call.rows):
                self.give_up(SEVERAL)
            self.seen.update(call.rows)
            states = [self.states.setdefault(row, State()) for row in call.rows]
        if self.broken or not call.rows:
            self.full_in.add(self.evaluation)
            return self.untouched(call.rows, call.run(call.options, call.extra))
        if any(self.due(state) for state in states):
            return self.full(call, states)
        output = self.frozen(call, states, call.options)
        if output is None:
            self.full_in.add(self.evaluation)
            return self.untouched(call.rows, call.run(call.options, call.extra))
        for state in states:
            state.age += 1
        self.frozen_in.add(self.evaluation)
        self.begun = self.evaluation if self.begun is None else self.begun
        full = call.run({**call.options, ASIDE: True}, call.extra) if self.measure and self.begun == self.evaluation else None
        with self.lock:
            self.comparison.add(call.rows, output, full=full)
        return output

    def due(self, state: State) -> bool:
        return state.kept is None or state.full < self.first or bool(self.refresh and state.age + 1 >= self.refresh)

    def full(self, call: Call, states: list[State]) -> Tensor:
        """The host's own evaluation; K and V are taken where the next one may be frozen, and those before are measured by it, then let go."""
        self.full_in.add(self.evaluation)
        taking = stale = None
        if all(state.full + 1 >= self.first for state in states):
            if all(state.kept is not None for state in states):
                stale = self.frozen(call, states, {**call.options, ASIDE: True})
            for state in states:
                state.kept = None
        if not self.broken and all(state.full + 1 >= self.first for state in states):
            taking = Taking(call.batch, self.leaving.names(call.network), self.storage)
        context = nullcontext((call.options, call.extra))
        if taking is not None:
            context = self.leaving.taken(call.network, call.options, call.extra, taking)
        try:
            with context as (options, extra):
                output = call.run(options, extra)
        except Mismatch as fact:
            self.give_up(str(fact))
            return self.untouched(call.rows, call.run(call.options, call.extra))
        if taking is not None and taking.short:
            self.give_up("memory ran out for the references' K and V; set storage to fp8, or use fewer references")
        if taking is not None and taking.empty:
            self.give_up("the model makes no tokens of its references; choose how it places them in Edit Model Reference Method")
        kept = None if taking is None or self.broken else taking.result()
        with self.lock:
            self.comparison.add(call.rows, output, frozen=None if kept is None else stale)
            for i, state in enumerate(states):
                state.full += 1
                if kept is not None:
                    batch = len(kept) // len(states)
                    state.kept, state.age = kept[i * batch:(i + 1) * batch], 0
            self.peak = max(self.peak, self.bytes)
        return output

    def frozen(self, call: Call, states: list[State], options: dict) -> Tensor | None:
        """Without reference tokens; none where that cannot be done after all."""
        segment = Segment([kept for state in states for kept in state.kept])
        buffers = self.buffers.setdefault(call.rows[0].device, Buffers())
        try:
            with self.leaving.frozen(call.network, options, call.extra, segment, buffers) as (options, extra):
                return call.run(options, extra)
        except Mismatch as fact:
            self.give_up(str(fact))
        except torch.OutOfMemoryError:
            self.give_up("memory ran out beside the references' K and V; set storage to fp8, or use fewer references")
        return None

    def give_up(self, why: str) -> None:
        self.broken = self.broken or why
        self.states, self.buffers = {}, {}

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for state in self.states.values() for kept in state.kept or ())

    def needed(self, network, dtype: torch.dtype, conds: list[dict], batch: int) -> int:
        """Bytes on the GPU that K and V will take, known before the run."""
        tokens = sum(self.leaving.tokens(network, cond) for cond in conds)
        return batch * tokens * 2 * self.leaving.width(network) * len(self.leaving.names(network)) * min(dtype.itemsize, ITEMSIZE[self.storage])
