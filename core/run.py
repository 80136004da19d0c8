"""One sampling run: it begins, knows where it is, and ends. It owns every tensor that lives across evaluations."""
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .families import Family
from .knob import settings as knob_settings
from .knob import shown
from .report import Report
from .step import Clock, Step
from .stepcache.cache import StepCache
from .stepcache.corrections import Correction, NoCorrection
from .stepcache.each_range import EachRange
from .stepcache.error_budget import ErrorBudget
from .stepcache.governor import DETERMINISTIC, Governor, most_skips
from .stepcache.levels import GuidedOutput, Level, Seam
from .stepcache.look_back import LookBack, most_bytes
from .stepcache.policies import Policy
from .stepcache.predictors import Predictor
from .stepcache.predictors.divided_differences import DividedDifferences
from .stepcache.predictors.hold import Hold
from .stepcache.profiles import Facts, Profile
from .stepcache.signal import MODEL_INPUT, signal_of
from .stepcache.solvers import SOLVERS
from .store import MIB, STORAGE, Row, Store, page_locked

DEVICES = ("gpu", "cpu")
PHASE = "the phase changes"


@dataclass(frozen=True)
class Settings:
    """What a Step Cache node puts on a model: immutable, and without tensors."""

    policy: Policy
    predictor: Predictor
    level: Level
    start_percent: float = 0.0
    end_percent: float = 1.0
    max_consecutive_skips: int = 4      # 0: by the run's length
    preset: str = "custom"
    correction: Correction = NoCorrection()
    warm_up: int = 1            # evaluations at the start that are always computed
    last_steps: int = 1         # steps at the end that are
    few_steps: bool = False     # serve runs that are too short to gain by it, too
    budget_mib: int = 0         # for everything the cache keeps; 0 is no limit
    storage: str = "same"       # how it is kept: same, bf16, fp8
    device: str = "gpu"         # where: gpu is where it was computed, cpu is host memory

    def __post_init__(self):
        for name, known in (("storage", STORAGE), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} '{shown(getattr(self, name))}'; known: {', '.join(known)}")
        for name, least in (("warm_up", 1), ("last_steps", 1), ("budget_mib", 0), ("max_consecutive_skips", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.storage == "fp8" and not any(c.depth == 1 for c in self.predictor.candidates()):
            raise ValueError(f"storage 'fp8' is too coarse to extrapolate from, which predictor '{self.predictor.name}' does; "
                             "choose predictor 'hold' or 'automatic', or storage 'bf16'")
        level = self.level.resolve(self.policy)
        if self.policy.needs_forward and not level.gates:
            raise ValueError(f"policy '{self.policy.name}' must see the first blocks run, and level '{level.name}' runs none before it decides; "
                             "choose level 'block range' or 'automatic'")
        if signal_of(self.policy) == MODEL_INPUT and level.seam is Seam.NETWORK:
            raise ValueError(f"policy '{self.policy.name}' must see the model's input and output, and level '{level.name}' works inside the model; "
                             "choose level 'guided output', 'model output' or 'automatic'")

    def as_dict(self) -> dict:
        entries = (("policy", self.policy), ("predictor", self.predictor), ("level", self.level), ("correction", self.correction))
        return {
            "preset": self.preset, **{kind: {"name": entry.name, **knob_settings(entry)} for kind, entry in entries},
            "start_percent": self.start_percent, "end_percent": self.end_percent, "max_consecutive_skips": self.max_consecutive_skips,
            "warm_up": self.warm_up, "last_steps": self.last_steps, "few_steps": self.few_steps,
            "budget_mib": self.budget_mib, "storage": self.storage, "device": self.device,
        }


KINDS = {"transformer": "a transformer", "unet": "a UNet"}


class Run:
    """Opened and closed around the host's outer sampling call; lives in that call's model options only."""

    def __init__(self, settings: Settings, family: Family, sigmas: list[float], flow: bool, sampler: str, start_sigma: float, end_sigma: float,
                 plain: bool = True, guidance: float = 1.0, shape: Sequence[int] = (), facts: Facts | None = None,
                 read: Callable[[str], Profile] | None = None, latents: Sequence[Sequence[int]] = ()):
        """`plain` says that the sampler is not set to add noise, as churn does between two steps; `guidance` is the CFG scale.

        `shape` is the latent's, `latents` those of the ones that it is packed from, if of several. `facts` and `read`, which
        gives a profile by name, are for policies that depend on the run.
        """
        self.family, self.level, self.shape = family, settings.level.resolve(settings.policy), shape
        self.clock = Clock(sigmas, flow)
        steady, longest = plain and sampler in DETERMINISTIC, settings.max_consecutive_skips or most_skips(self.clock.steps)
        candidates = [c for c in settings.predictor.candidates() if steady or c.depth <= 2] or [Hold(), DividedDifferences(1)]
        self.report = Report(
            model=family.name, sampler=sampler, steps=self.clock.steps, policy=settings.policy.name, predictor=settings.predictor.name,
            level=self.level.name, settings=settings.as_dict() | {"max_consecutive_skips": longest})
        if self.level.serves not in (None, family.kind):
            wanted, self.level = self.level, GuidedOutput()
            self.report.level = self.level.name
            if settings.policy.needs_forward:
                self.report.add_reason(f"policy '{settings.policy.name}' must see the first blocks of a transformer and this model is {KINDS[family.kind]}, "
                                       "so everything is computed")
            else:
                self.report.add_reason(f"level '{wanted.name}' is for {KINDS[wanted.serves]} and this model is {KINDS[family.kind]}, "
                                       f"so level '{self.level.name}' takes its place")
        if not steady:
            does = "may add noise or build errors up" if plain else "is set to add noise"
            self.report.add_reason(f"{sampler} {does}, so at most one skip in a row")
        if self.clock.ahead and self.clock.descends:
            so = "error control computes everything before the last rise" if getattr(settings.policy, "by_error", False) else "no error is told of such skips"
            self.report.add_reason(f"sigma rises on the way, and what an error from before that comes to is not known, so {so}")
        if settings.storage == "fp8" and any(c.depth > 1 for c in candidates):
            candidates = [c for c in candidates if c.depth == 1] or [Hold()]
            self.report.add_reason("fp8 is too coarse to extrapolate from, so the last result stands in as it is")
        skips = longest if steady else min(longest, 1)
        governor = Governor(start_sigma, end_sigma, skips, max(settings.warm_up, family.warm_up), settings.last_steps + self.clock.idle)
        solver = SOLVERS.get(sampler) if getattr(self.level, "look_back", False) and plain and self.clock.falls else None
        policy = settings.policy
        if facts is not None:       # the run was asked for them by a policy that depends on it
            policy = policy.bound(read, facts, skips, self.may_skip(governor, min(c.history for c in candidates)), solver is not None)
            if policy.note:
                self.report.add_reason(policy.note)
        look_back, most = solver and LookBack(solver, sigmas), settings.budget_mib * MIB
        self.look_back_bytes = most_bytes(shape, skips) if look_back is not None else 0
        if most and 2 * self.look_back_bytes > most:
            look_back, self.look_back_bytes = None, 0
            self.report.add_reason("the cache budget leaves no room to look back")
        store = partial(Store, storage=settings.storage, budget=most and most - self.look_back_bytes,
                        away=page_locked if settings.device == "cpu" else None)
        budget = ErrorBudget(guidance, look_back is not None, sampler, self.clock)
        self.cache = StepCache(policy, candidates, governor, self.report, settings.correction.start(), look_back, budget, store,
                               EachRange(policy) if getattr(policy, "by_range", False) and getattr(self.level, "several", False) else None)
        if len(latents) > 1:
            self.cache.packed = tuple(math.prod(latent[1:]) for latent in latents)
        refuses = getattr(policy, "refuses", None)
        if refuses is not None and (why := refuses(family.name, self.clock.steps, sampler)):
            self.cache.give_up(f"{why}, so everything is computed")
        self.begun: float | None = None     # when the first evaluation began; models were loaded before
        self.ordinals: Counter = Counter()
        self.ordinal: int | None = None     # none outside an evaluation, and before the host comes to its conditions
        self.inside = False
        self.borders: dict[str, object] = {}
        self.mask: Tensor | None = None     # the denoise mask in force, where something changes it from step to step
        self.masks = 0                      # masks so far

    def may_skip(self, governor: Governor, history: int) -> list[bool]:
        """For each step of the schedule, whether the governor would leave it to the policy, and a predictor could stand in for it."""
        clock = Clock(self.clock.sigmas, self.clock.flow)
        steps = [clock.tick(sigma) for sigma in clock.sigmas[:-1]]
        phases = [self.phase(step) for step in steps]
        return [n >= history and phases[n - history] == phases[n] and not governor.must_compute(step, tuple(steps[:n]), 0) for n, step in enumerate(steps)]

    def phase(self, step: Step) -> str:
        """What the level calls this part of the schedule, if it does not do the same in all of it."""
        told = getattr(self.level, "phase", None)
        return "" if told is None else told(step)

    def begin(self, sigma: float, acting: tuple = (), form: tuple = ()) -> None:
        """A solver evaluation begins. `acting` tells which conditions act in it, `form` shape and type of the latent.

        The output jumps where one of them changes, or the denoise mask, so nothing is predicted across that; nor where
        the level keeps something else from here on.
        """
        self.begun = self.begun or time.perf_counter()
        self.ordinals.clear()
        self.ordinal, self.inside = None, True
        step = self.clock.tick(sigma)
        borders = {
            "conditions start or end": acting, "the latent changes its shape or type": form, "the denoise mask changes": self.masks,
            PHASE: self.phase(step)}
        if step.evaluation and borders != self.borders:
            self.cache.forget(next(why for why, now in borders.items() if now != self.borders[why]))
        self.borders = borders
        self.cache.begin(step)

    def masked(self, mask: Tensor) -> None:
        """The denoise mask of the evaluation that is about to begin."""
        if self.mask is None or self.mask.shape != mask.shape or not torch.equal(self.mask, mask):
            self.mask, self.masks = mask.clone(), self.masks + 1

    def fall_back(self, level: Level, why: str) -> None:
        """Go on at a safer level, from an empty history."""
        self.level, self.report.level = level, level.name
        self.borders |= {PHASE: ""}
        self.cache.each = None
        self.report.add_reason(why)
        self.cache.look_back_no_more()
        self.cache.forget()

    def without_blocks(self, level: Level, why: str) -> None:
        """Go on at a level that needs no blocks, and compute everything where the policy must see them."""
        policy = self.cache.policy
        if policy.needs_forward:
            self.cache.give_up(f"{why}, and policy '{policy.name}' must see its blocks, so everything is computed")
        else:
            self.fall_back(level, f"{why}, so {level.name} is skipped instead of blocks")

    def finish(self) -> None:
        self.ordinal, self.inside = None, False
        self.cache.finish()

    def batch(self, window: tuple | None) -> None:
        """The conditions of one pass are about to be evaluated: the main pass first, guidance that repeats them after it.

        Counted within a context window, because windows go through the same call one after the other. A call from
        outside an evaluation belongs to none.
        """
        if not self.inside:
            return
        self.ordinal = self.ordinals[window]
        self.ordinals[window] += 1

    def rows(self, device: str, uuids, conds, window: tuple | None, shape: tuple, patches: frozenset) -> tuple[Row, ...]:
        return tuple(Row(device, self.ordinal, uuid, cond, window, shape, patches) for uuid, cond in zip(uuids, conds, strict=True))

    def close(self) -> Report:
        self.report.seconds = time.perf_counter() - self.begun if self.begun else 0.0
        self.cache.close()
        if self.mask is not None:
            self.report.cache_bytes += self.mask.numel() * self.mask.element_size()
            self.mask = None
        if self.masks > 1:
            changes = "once" if self.masks == 2 else f"{self.masks - 1} times"
            self.report.add_reason(f"the denoise mask changed {changes}, and nothing is predicted across that")
        return self.report
