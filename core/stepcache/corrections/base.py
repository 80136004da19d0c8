"""What is done to a prediction before it stands in for a row: small statistics of the run, learnt at computed steps."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from ...step import Step
from ...store import Row
from ..predictors import Predictor


class Guess(NamedTuple):
    """What a predictor says for a row. Neither tensor may be written to."""

    row: Row
    predictor: Predictor
    step: Step
    reach: float        # steps from what is known
    value: Tensor       # [B, C, ...] for latents, [B, N, C] for tokens
    last: Tensor        # the newest snapshot, of the same shape


class Correcting(Protocol):
    """The state of a correction in one run, dropped with it. What it keeps is its own, small, and counted."""

    peak: int           # bytes

    def apply(self, guess: Guess) -> Tensor:
        """The guess corrected, in fp32; itself while nothing is known."""
        ...

    def learn(self, row: Row, step: Step, actual: Tensor, guesses: Sequence[Guess]) -> None:
        """A row was computed; `guesses` is what the competing predictors would have said for it."""
        ...

    def clear(self) -> None:
        """The history begins anew."""
        ...


class Correction(Protocol):
    """An immutable dataclass with knobs."""

    name: str

    def start(self) -> Correcting | None: ...


@dataclass
class Kept:
    """A Correcting's tensors: by key, tuples with small tensors in them, which must be the state's own."""

    tensors: dict = field(default_factory=dict)
    peak: int = 0

    def keep(self, key, value: tuple) -> None:
        self.tensors[key] = value
        held = (t for entry in self.tensors.values() for t in entry if isinstance(t, Tensor))
        self.peak = max(self.peak, sum(t.numel() * t.element_size() for t in held))

    def clear(self) -> None:
        self.tensors.clear()
