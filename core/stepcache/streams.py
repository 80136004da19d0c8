"""The streams of what is predicted, each with a hindcast and a predictor of its own: video and sound, say, or the image alone.

    e = max_s e_s        a skip is as bad as the stream that takes it worst

Sound changes otherwise than video over a run, so what predicts the one best need not predict the other. Most models have
one stream.
"""
from collections.abc import Sequence

from ..step import Step
from .hindcast import Hindcast
from .predictors import Predictor
from .predictors.hold import Hold

MAIN = ""       # of a model with one stream, and what is weighed for the whole latent


class Streams:
    """One per run. choose(past, at) ... of(stream).score(...) ... settle()."""

    def __init__(self, candidates: Sequence[Predictor]):
        self.candidates = tuple(candidates)
        self.each = {MAIN: Hindcast(self.candidates)}
        self.best: dict[str, Predictor] = {}        # by stream; the one that is predicted worst comes first
        # found at the last computed step: the error of the best ones, and the group of skips before it
        self.last: float | None = None
        self.missed: float | None = None

    def of(self, stream: str) -> Hindcast:
        if stream not in self.each:
            self.each[stream] = Hindcast(self.candidates)
        return self.each[stream]

    def narrow(self, most: int) -> None:
        """From here on there are so many snapshots at most: predictors that need more leave."""
        self.candidates = tuple(c for c in self.candidates if c.history <= most) or (Hold(),)
        for hindcast in self.each.values():
            hindcast.candidates = self.candidates

    @property
    def needs_gram(self) -> bool:
        return any(candidate.needs_gram for candidate in self.candidates)

    def choose(self, past: Sequence[Step], at: Step) -> float | None:
        """Choose a predictor for each stream. The expected error of the worst; None where one of them is unknown."""
        known = {stream: hindcast for stream, hindcast in self.each.items() if hindcast.known} or {MAIN: self.each[MAIN]}
        chosen = {stream: hindcast.choose(past, at) for stream, hindcast in known.items()}
        by_error = sorted(chosen, key=lambda stream: -1 if chosen[stream][1] is None else chosen[stream][1], reverse=True)
        self.best = {stream: chosen[stream][0] for stream in by_error if chosen[stream][0] is not None}
        errors = [error for _, error in chosen.values()]
        return None if None in errors else max(errors)

    def able(self, stream: str, snapshots: int) -> Predictor:
        """The best predictor of a stream; for a row with a shorter history than the others, the highest order that has enough."""
        best = self.best.get(stream) or next(iter(self.best.values()), None)
        if best is not None and best.history <= snapshots:
            return best
        able = [candidate for candidate in self.candidates if candidate.history <= snapshots]
        return able[-1] if able else Hold()

    def settle(self) -> float | None:
        """Read the scores back. Returns |d| / |D| where it was weighed."""
        found = {stream: hindcast.settle(self.best.get(stream)) for stream, hindcast in self.each.items()}
        self.last = worst([hindcast.last for hindcast in self.each.values()])
        self.missed = worst([hindcast.missed for hindcast in self.each.values()])
        return found[MAIN]

    def drop(self) -> None:
        """Let go of what was not read back yet."""
        for hindcast in self.each.values():
            hindcast.waiting.clear()

    def forget(self) -> None:
        """The history is gone; what was learnt of the errors is not."""
        for hindcast in self.each.values():
            hindcast.forget()


def worst(errors: Sequence[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)
