"""When to skip: one decision per solver evaluation, shared by all conditions."""
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ...step import Step


@dataclass(frozen=True)
class View:
    """What a policy may look at. Asked for one evaluation; the governor has already seen to the hard rules."""

    step: Step
    computed: tuple[Step, ...]      # computed steps, newest last; at least one
    predicted: float | None         # relative error of the best predictor at this step, weighted by the step's width
    owed: float                     # sum of `predicted` over the steps skipped since the last computed one
    drift: float | None = None      # relative change of the first blocks' residual since the last computed step


class Policy(Protocol):
    """An immutable dataclass with knobs; what it has to remember is in the View."""

    name: str
    needs_forward: ClassVar[bool]   # it wants `drift`, so the first blocks must run before it can decide

    def skip(self, view: View) -> bool: ...
