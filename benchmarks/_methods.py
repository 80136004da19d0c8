"""What is compared: plain sampling, error control, every policy of the registry, an evenly spread mask, and the host's two caches.

A method leaves a model that samples its way; `settings` is what a row says of it. Methods of one name that differ in
strength alone (same predictor, same level) make one curve, error against evaluations. To have a policy measured at
settings of its own, add a line to SETTINGS; one without a line runs at its defaults, with a warning.
"""
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

from ._curves import counts as whole_counts
from pack.core.attach import attach_step_cache
from pack.core.knob import checked
from pack.core.presets import preset_settings
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS

log = logging.getLogger("benchmarks")

ERROR_CONTROL = "error control"
OUTSIDE = (0.15, 0.2, 0.7, 0.8)     # shares of the steps, besides all counts in RANGE
TOLERANCES = tuple(float(f"{0.0025 * 2 ** (k / 4):.3g}") for k in range(29))    # to 0.32, four to the octave
HOST_NODES = {"host EasyCache": EasyCacheNode, "host LazyCache": LazyCacheNode}
HOST_THRESHOLDS = (0.1, 0.2, 0.4)
MASK_ORDERS = (1, 2)
MASK_WARM_UP = 1        # the first step alone; 2, 3 and 4 came less near on almost every cell that was tried


@dataclass(frozen=True)
class Entry:
    """An entry of a registry and the knobs that are not at their default."""

    name: str
    knobs: tuple[tuple[str, object], ...] = ()

    def made(self, registry):
        return checked(registry[self.name](**dict(self.knobs)))

    def told(self) -> dict:
        return {"name": self.name, **dict(self.knobs)}


def entry(name: str, **settings) -> Entry:
    return Entry(name, tuple(settings.items()))


HOLD, LINE, BEND = entry("hold"), entry("divided differences", order=1), entry("divided differences", order=2)


@dataclass(frozen=True)
class Series:
    """One policy at several strengths, each with each of the predictors."""

    strengths: tuple[dict, ...]
    predictors: tuple[Entry, ...] = (HOLD,)
    level: str = "automatic"
    max_skips: int = 50     # the policy's own rule ends a skip


# Published settings where there are such (each policy's file names its source), and around them what it takes to cover RANGE.
SETTINGS = {
    "interval": Series(tuple({"interval": n, "warm_up": 3} for n in (2, 3, 4, 5, 6)), (HOLD, LINE, BEND)),
    "first block": Series(({"threshold": 0.05}, {"threshold": 0.08}, {"threshold": 0.12}, {"threshold": 0.2}), (HOLD, LINE)),
}


class Plain:
    """The host alone, with fewer steps."""

    name, own = "plain", False

    def __init__(self, steps: int):
        self.steps, self.settings, self.expected = steps, {"steps": steps}, steps

    def applied(self, patcher, notify):
        return patcher


class Host:
    """A step skipper of the host, as its node puts it there."""

    own, steps = False, None

    def __init__(self, name: str, threshold: float, steps: int):
        self.name, self.settings, self.expected = name, {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95}, 0.5 * steps

    def applied(self, patcher, notify):
        return HOST_NODES[self.name].execute(patcher, **self.settings, verbose=False).result[0]


class Own:
    """The step cache of this pack."""

    own, steps = True, None

    def __init__(self, name: str, cache: Settings, told: dict, expected: float):
        self.name, self.cache, self.settings, self.expected = name, cache, told, expected

    def applied(self, patcher, notify):
        return attach_step_cache(patcher, self.cache, notify)


@dataclass(frozen=True)
class Mask:
    """A policy of the benchmark's own: computes the evaluations of a list and no other, so no menu has it."""

    name = "mask"
    needs_forward = False
    computed: tuple[int, ...] = ()

    def skip(self, view) -> bool:
        return view.step.evaluation not in self.computed


def spread(steps: int, count: int, warm_up: int) -> tuple[int, ...]:
    """`count` of `steps` evaluations: the first `warm_up`, the last one, and the others evenly between them."""
    warm_up = min(warm_up, count - 1)
    gaps, begin = count - warm_up, warm_up - 1
    return (*range(warm_up), *(begin + round((i + 1) * (steps - 1 - begin) / gaps) for i in range(gaps)))


def counts(steps: int) -> list[int]:
    """Every count of evaluations in RANGE, and a few outside."""
    return sorted({*whole_counts(steps), *(round(share * steps) for share in OUTSIDE)})


def error_control(tolerance: float, steps: int) -> Own:
    """As the presets run it, at a tolerance of our choice."""
    balanced = preset_settings("balanced")
    cache = replace(balanced, policy=replace(balanced.policy, tolerance=tolerance), preset="custom")
    return Own(ERROR_CONTROL, cache, {"tolerance": tolerance}, 0.5 * steps)


def mask(count: int, order: int, steps: int, warm_up: int = MASK_WARM_UP) -> Own:
    predictor = entry("divided differences", order=order)
    cache = Settings(Mask(spread(steps, count, warm_up)), predictor.made(PREDICTORS), LEVELS["automatic"](), max_consecutive_skips=steps)
    return Own("mask", cache, {"computed": count, "predictor": predictor.told(), "level": "automatic"}, count)


def policy(name: str, strength: dict, predictor: Entry | None, series: Series, steps: int) -> Own:
    chosen = entry(name, **strength).made(POLICIES)
    stands_in = PREDICTORS["automatic"]() if predictor is None else predictor.made(PREDICTORS)
    cache = Settings(chosen, stands_in, LEVELS[series.level](), max_consecutive_skips=series.max_skips)
    told = {**strength, "predictor": predictor.told() if predictor else {"name": "automatic"}, "level": series.level}
    return Own(name, cache, told, 0.5 * steps)


def policies(steps: int, quick: bool) -> Iterator[Own]:
    for name in POLICIES:
        if name == ERROR_CONTROL:
            continue
        series = SETTINGS.get(name)
        if series is None:
            log.warning("policy '%s' has no line in benchmarks/_methods.py, SETTINGS; it runs at its defaults", name)
            yield policy(name, {}, None, Series(({},), max_skips=4), steps)
            continue
        strengths = series.strengths[1:2] if quick else series.strengths
        for predictor in series.predictors[:1] if quick else series.predictors:
            if predictor.name in PREDICTORS:
                yield from (policy(name, strength, predictor, series, steps) for strength in strengths)
            else:
                log.warning("policy '%s' is to be measured with predictor '%s', which does not exist", name, predictor.name)


def methods(steps: int, quick: bool = False) -> list:
    """All that a cell of `steps` steps is sampled with, the full run first."""
    every = counts(steps)[1::4] if quick else counts(steps)
    tolerances = TOLERANCES[8::4] if quick else TOLERANCES
    return [
        *(Plain(count) for count in (steps, *reversed(every))),
        *(error_control(tolerance, steps) for tolerance in tolerances),
        *(mask(count, order, steps) for order in MASK_ORDERS for count in every),
        *policies(steps, quick),
        *(Host(name, threshold, steps) for name in HOST_NODES for threshold in (HOST_THRESHOLDS[1:2] if quick else HOST_THRESHOLDS)),
    ]
