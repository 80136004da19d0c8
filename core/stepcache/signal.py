"""What a policy watches of a run: one tensor of every evaluation, and the model's output where it was computed.

Only samples are kept, of one row. A number is worked out when a policy asks for it, and read back from the device in
one transfer; a policy that watches nothing costs nothing.

    change      mean|s_t - s_(t-1)| / mean|s_(t-1)|      from one evaluation to the next, computed or skipped
    drift       mean|s_t - s_c| / mean|s_c|              c the last computed step
    rate        mean|v_c - v_b| / mean|s_c - s_b|        b, c the last two computed steps, v the output
"""
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.drift import relative_error, sampled
from ..step import Step
from ..store import SAME_PLACE, Row
from .predictors.divided_differences import DividedDifferences
from .predictors.hold import Hold

NOTHING = ""
FIRST_BLOCK = "first block"             # what the first blocks add to their input
MODULATED_INPUT = "modulated input"     # what the first block's attention is given
MODEL_INPUT = "model input"             # x, together with the output in velocity form
OUTPUT = "output"                       # what the level keeps, at computed steps alone
WITH_OUTPUT = (MODEL_INPUT, OUTPUT)
COMPUTED_STEPS = 4                      # kept of them, enough for a forecast of order 3


def signal_of(policy) -> str:
    """What a policy watches: what it says, else nothing, or the first blocks when it needs a forward."""
    return getattr(policy, "signal", FIRST_BLOCK if policy.needs_forward else NOTHING)


class Node(NamedTuple):
    """A computed step of the watched row."""

    step: Step
    signal: Tensor | None
    output: Tensor | None


class Flow(NamedTuple):
    """How output follows input: mean absolute values, read together."""

    input_norm: float           # |x| now
    travel: float               # sum of |x_t - x_(t-1)| since the last computed step
    output_norm: float | None   # |v| of the last computed step
    rate: float | None


def moved(now: Tensor, before: Tensor) -> Tensor:
    """mean|now - before| and mean|before|, fp32, still on the device."""
    return torch.stack([(now.float() - before.float()).abs().mean(), before.float().abs().mean()])


def comparable(now: Tensor | None, before: Tensor | None) -> bool:
    return now is not None and before is not None and now.shape == before.shape and now.device == before.device


class Watch:
    """One per run. begin(step) ... see, learn ... finish(skipped); in between a policy asks.

    What is not known is None, or an empty tuple. The history is dropped when another row comes first: two conditions
    cannot be compared.
    """

    def __init__(self, signal: str = NOTHING):
        self.signal = signal
        self.peak = 0       # bytes
        self.forget()
        self.begin(None)

    def forget(self) -> None:
        """Drop the history."""
        self.row: Row | None = None
        self.computed: deque[Node] = deque(maxlen=COMPUTED_STEPS)
        self.before: Tensor | None = None       # the signal of the evaluation before
        self.moves: list[Tensor] = []           # of the skipped evaluations since the last computed step

    def close(self) -> None:
        self.forget()
        self.begin(None)

    # one evaluation ------------------------------------------------------------------------------------------------
    def begin(self, step: Step | None) -> None:
        self.step = step
        self.now: Tensor | None = None
        self.output: tuple[Row, Tensor] | None = None
        self.known: dict = {}

    def see(self, row: Row | None, signal: Tensor | None) -> None:
        """The signal of the row that the host runs first; those of later rows are not looked at."""
        if signal is None or self.now is not None or self.signal in (NOTHING, OUTPUT):
            return
        self.now = sampled(signal).clone()
        if row != self.row or not comparable(self.now, self.before):
            self.forget()
            self.row = row
        self.count()

    def learn(self, row: Row, output: Tensor) -> None:
        """The output that was computed for a row, for that of the signal if it comes at all."""
        if self.signal in WITH_OUTPUT and (self.output is None or row == self.row):
            self.output = (row, sampled(output).clone())
            self.count()

    def finish(self, skipped: bool) -> None:
        if skipped:
            if self.move is not None:
                self.moves.append(self.move)
        else:
            self.keep()
        self.before = self.now
        self.begin(None)

    def keep(self) -> None:
        """A computed step joins the history. Where nobody showed its signal, the next one to be seen begins a new history."""
        row, output = self.output or (None, None)
        if self.signal == OUTPUT and row != self.row:
            self.forget()
            self.row = row
        if self.computed and abs(self.computed[-1].step.place - self.step.place) < SAME_PLACE:
            self.computed.pop()
        self.computed.append(Node(self.step, self.now, output if row == self.row else None))
        self.moves = []

    def count(self) -> None:
        tensors = [self.now, self.before, self.output and self.output[1], *(tensor for node in self.computed for tensor in node[1:])]
        self.peak = max(self.peak, sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if t is not None}.values()))

    # what a policy may ask -------------------------------------------------------------------------------------------
    @property
    def drift(self) -> float | None:
        """Relative change of the signal since the last computed step."""
        if self.now is None or not self.computed:
            return None
        return self.once("drift", lambda: relative_error(self.now, self.computed[-1].signal).item())

    @property
    def changes(self) -> tuple[float, ...]:
        """Relative changes from evaluation to evaluation since the last computed step, that to the present one last."""
        if self.move is None or not self.computed:
            return ()
        return self.once("changes", lambda: tuple(change / max(norm, 1e-12) for change, norm in torch.stack([*self.moves, self.move]).tolist()))

    def forecast_error(self, order: int) -> float | None:
        """How far the forecast of the signal from computed steps is from the signal: mean|s' - s| / mean|s|.

        The forecast is a polynomial of `order` in the step index, of a lower one while the history is short.
        """
        if self.now is None or not self.computed:
            return None
        return self.once(("forecast", order), lambda: self.forecast(order))

    @property
    def flow(self) -> Flow | None:
        if self.move is None or not self.computed:
            return None
        return self.once("flow", self.measured_flow)

    @property
    def output_change(self) -> float | None:
        """Relative change of the output per step of the schedule, over the last two computed steps."""
        if len(self.computed) < 2 or not comparable(self.computed[-1].output, self.computed[-2].output):
            return None
        (earlier, _, before), (later, _, now) = self.computed[-2], self.computed[-1]
        return self.once("output", lambda: relative_error(before, now).item() / max(later.place - earlier.place, SAME_PLACE))

    # how it is worked out --------------------------------------------------------------------------------------------
    def once(self, name, compute):
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]

    @property
    def move(self) -> Tensor | None:
        """How the signal moved to the present evaluation from the one before."""
        if self.now is None or self.before is None:
            return None
        return self.once("move", lambda: moved(self.now, self.before))

    def forecast(self, order: int) -> float:
        nodes = list(self.computed)[-order - 1:]
        predictor = DividedDifferences(len(nodes) - 1) if len(nodes) > 1 else Hold()
        weights = predictor.weights([node.step for node in nodes], self.step)
        guess = sum(weight * node.signal.float() for weight, node in zip(weights, nodes, strict=True))
        return relative_error(guess, self.now).item()

    def measured_flow(self) -> Flow:
        last, earlier = self.computed[-1], self.computed[-2] if len(self.computed) > 1 else None
        parts = [self.now.float().abs().mean(), torch.stack([*self.moves, self.move])[:, 0].sum()]
        if last.output is not None:
            parts.append(last.output.float().abs().mean())
            if earlier is not None and comparable(last.output, earlier.output):
                parts += [moved(last.output, earlier.output)[0], moved(last.signal, earlier.signal)[0]]
        input_norm, travel, *more = torch.stack(parts).tolist()
        return Flow(input_norm, travel, more[0] if more else None, more[1] / max(more[2], 1e-12) if len(more) > 1 else None)
