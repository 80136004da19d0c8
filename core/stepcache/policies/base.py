"""When to skip: one decision per solver evaluation, shared by all conditions."""
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ...step import Step
from ..signal import Watch


@dataclass(frozen=True)
class View:
    """What a policy may look at. Asked for one evaluation; the governor has already seen to the hard rules."""

    step: Step
    computed: tuple[Step, ...]      # computed steps, newest last; at least one
    predicted: float | None         # what a skip here is expected to add to the relative error of the final latent
    owed: float                     # sum of `predicted` over the steps skipped since the last computed one
    skipped: int = 0                # so many
    longest: int = 0                # and in the longest group of skips that a computed step has measured
    guided: bool = False            # CFG is above 1
    family: str = ""                # the model family's name
    signal: Watch = field(default_factory=Watch)    # what the policy asked to watch; numbers are worked out when asked for


class Policy(Protocol):
    """An immutable dataclass with knobs; what it has to remember is in the View.

    needs_forward: the first blocks must run before it can decide, which is so for two of the signals.
    signal: optional; what it watches, one of those in signal.py.
    by_error: optional; it skips nothing of which no error is expected, or one without limit.
    by_range: optional; with a level of several ranges of blocks it is asked for each by itself, and sees its output_change alone.
    refuses(family, steps, sampler): optional; why it can skip nothing in such a run, or an empty text. The run then
    computes everything and says why.
    bound(read, run, longest, may_skip, looks_back): optional; the policy for one run, where it depends on it (profile.py).
    """

    name: str
    needs_forward: ClassVar[bool]

    def skip(self, view: View) -> bool: ...
