"""What is compared: plain sampling, error control, every policy of the registry, an evenly spread mask, and the host's two caches.

A method leaves a model that samples its way; `settings` is what a row says of it. Methods of one name that differ in
strength alone (same predictor, same level) make one curve, error against evaluations. To have a policy measured at
settings of its own, add a line to SETTINGS; one without a line runs at its defaults, with a warning. AT_LEVELS has policies
once more, at levels whose knobs are set.
"""
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

from ._curves import counts as whole_counts
from pack.core.attach import attach_step_cache
from pack.core.knob import checked
from pack.core.presets import TOLERANCE, preset_settings
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS

log = logging.getLogger("benchmarks")

ERROR_CONTROL, PROFILE = "error control", "profile"
OUTSIDE = (0.15, 0.2, 0.7, 0.8)     # shares of the steps, besides all counts in RANGE
TOLERANCES = tuple(float(f"{0.0025 * 2 ** (k / 4):.3g}") for k in range(33))    # to 0.64, four to the octave
TOLERANCES_ALONE = tuple(sorted({*TOLERANCES[4::2], *TOLERANCE.values()}))      # where every picture takes its own decisions, and time
LONG = 8        # skips in a row
HOST_NODES = {"host EasyCache": EasyCacheNode, "host LazyCache": LazyCacheNode}
HOST_THRESHOLDS = (0.1, 0.2, 0.4)
MASK_ORDERS = (1, 2)


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
    level: Entry = entry("automatic")
    max_skips: int = 50     # the policy's own rule ends a skip
    family: str = ""        # of models, the only one that the level's knobs are for


def over(knob: str, *values, **others) -> tuple[dict, ...]:
    return tuple({knob: value, **others} for value in values)


# Published settings where there are such (each policy's file names its source), and around them what it takes to cover RANGE on
# the test bed. Warm-ups are those of 50 steps scaled to 28. Published predictor first; then a line, which is mostly nearer.
SETTINGS = {
    "interval": Series(over("interval", 2, 3, 4, 5, 6, warm_up=3), (HOLD, LINE, BEND)),
    "first block": Series(over("threshold", 0.05, 0.08, 0.12, 0.2, 0.3), (HOLD, LINE)),
    "TeaCache": Series(over("threshold", 0.2, 0.4, 0.8, 1.6), (HOLD, LINE)),
    "EasyCache": Series(over("threshold", 0.025, 0.05, 0.1, 0.2, warm_up=3), (HOLD, LINE)),
    "MagCache": Series(over("max_skips", 1, 2, 3, 5, threshold=0.24, retention_ratio=0.1), (HOLD, LINE)),
    "CG-Taylor": Series(over("gate", 0.03, 0.06, 0.13, 0.25, warm_up=3), (LINE,)),
    "ZEUS": Series(over("preset", "FLUX", "SD", "Wan 2.1"), (entry("ZEUS"), LINE), level=entry("guided output")),
    "centred interval": Series(over("interval", 3, 4, 5), (HOLD, LINE)),
    "key steps": Series(({},), (HOLD, LINE)),
    "schedule": Series(over("preset", "slow", "medium", "fast", "ultra"), (LINE, BEND)),
    "temporal delta": Series((*over("threshold", 0.05, 0.1, max_skips=2), *over("threshold", 0.2, max_skips=3)), (HOLD, LINE)),
}

# The two thirds of a model's blocks that change their input least, by mean |out - in| / |in| over 28 steps of euler, cfg 1 and 3.5, on the
# prompts of the set CHOOSE, in two ranges where there are that many: FLUX 0.68 for block 0, 0.37 to 0.40 for 1 and 2, 0.16 to 0.23 for 3 to 8;
# Z-Image 0.66 and 1.10; Wan, random weights, 0.35, 0.35, 0.31. With fewer blocks no setting of FLUX would lie in RANGE; none of Z-Image does,
# of whose four blocks the refiners' two always run. Border and share: of 0.25, 0.5, 0.75 and 0.5, 0.75, those with the best curve of FLUX on the same set.
RANGES = {"flux": "3-5, 6-8", "nextdit": "0", "wan": "0, 2"}
AT_LEVELS = (
    *(("temporal delta", Series((*over("threshold", 0.1, max_skips=2), *over("threshold", 0.3, max_skips=4)),
                                level=entry("block ranges", ranges=ranges), family=family)) for family, ranges in RANGES.items()),
    ("interval", Series(over("interval", 3, 5, warm_up=3), level=entry("front or rear range", border=0.5, share=0.75))),
)

# constants that were published for another model of the family
BORROWED = (("TeaCache", Series(over("threshold", 0.2, 0.4, 0.8, 1.6, coefficients="lumina_2"), (HOLD, LINE), family="nextdit")),)


@cache
def warn(text: str) -> None:
    """Once, however many cells it is true of."""
    log.warning(text)


class Method:
    """What makes a row: `own` tells whether the step cache of this pack is at work, `steps` how many if not the cell's, `expected` a guess at evaluations."""

    own, steps = False, None

    def refused(self, family: str, steps: int, sampler: str) -> str:
        """Why it can skip nothing in such a run."""
        return ""


class Plain(Method):
    """The host alone, with fewer steps."""

    name = "plain"

    def __init__(self, steps: int):
        self.steps, self.settings, self.expected = steps, {"steps": steps}, steps

    def applied(self, patcher, notify):
        return patcher


class Host(Method):
    """A step skipper of the host, as its node puts it there."""

    def __init__(self, name: str, threshold: float, steps: int):
        self.name, self.settings, self.expected = name, {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95}, 0.5 * steps

    def applied(self, patcher, notify):
        return HOST_NODES[self.name].execute(patcher, **self.settings, verbose=False).result[0]


class Own(Method):
    """The step cache of this pack."""

    own = True

    def __init__(self, name: str, attached: Settings, told: dict, expected: float, family: str = ""):
        self.name, self.attached, self.settings, self.expected, self.family = name, attached, told, expected, family

    def applied(self, patcher, notify):
        return attach_step_cache(patcher, self.attached, notify)

    def refused(self, family: str, steps: int, sampler: str) -> str:
        if self.family not in ("", family):
            return f"its level is set for {self.family}"
        refuses = getattr(self.attached.policy, "refuses", None)
        why = refuses(family, steps, sampler) if refuses else ""
        if why:
            warn(f"{self.name} is left out on {family}: {why}")
        return why


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


def error_control(tolerance: float, steps: int, max_skips: int | None = None) -> Own:
    """As the presets run it, at a tolerance of our choice and maybe with longer skips."""
    balanced = preset_settings("balanced")
    longer = {} if max_skips is None else {"max_consecutive_skips": max_skips}
    settings = replace(balanced, policy=replace(balanced.policy, tolerance=tolerance), preset="custom", **longer)
    return Own(ERROR_CONTROL, settings, {"tolerance": tolerance, **longer}, 0.5 * steps)


def far_ladder(steps: int) -> list[Own]:
    """Tolerances for the peers' pictures; with many steps the fewest evaluations want longer skips than the default's."""
    longer = [error_control(tolerance, steps, LONG) for tolerance in TOLERANCES_ALONE if tolerance >= 0.02] if steps > 28 else []
    return [error_control(tolerance, steps) for tolerance in TOLERANCES_ALONE] + longer


def mask(count: int, order: int, steps: int) -> Own:
    """The first order + 1 steps are those that the predictor needs; more of them came less near on every cell that was tried."""
    predictor = entry("divided differences", order=order)
    settings = Settings(Mask(spread(steps, count, order + 1)), predictor.made(PREDICTORS), LEVELS["automatic"](), max_consecutive_skips=steps)
    return Own("mask", settings, {"computed": count, "predictor": predictor.told(), "level": "automatic"}, count)


def policy(name: str, strength: dict, predictor: Entry | None, series: Series, steps: int) -> Own:
    chosen = entry(name, **strength).made(POLICIES)
    stands_in = PREDICTORS["automatic"]() if predictor is None else predictor.made(PREDICTORS)
    settings = Settings(chosen, stands_in, series.level.made(LEVELS), max_consecutive_skips=series.max_skips)
    level = series.level.told() if series.level.knobs else series.level.name
    told = {**strength, "predictor": predictor.told() if predictor else {"name": "automatic"}, "level": level}
    return Own(name, settings, told, 0.5 * steps, series.family)


def in_series(name: str, series: Series, steps: int, quick: bool) -> Iterator[Own]:
    strengths = series.strengths[1:2] if quick else series.strengths
    for predictor in series.predictors[:1] if quick else series.predictors:
        if predictor.name in PREDICTORS:
            yield from (policy(name, strength, predictor, series, steps) for strength in strengths)
        else:
            warn(f"policy '{name}' is to be measured with predictor '{predictor.name}', which does not exist")


def policies(steps: int, quick: bool) -> Iterator[Own]:
    for name in POLICIES:
        if name in (ERROR_CONTROL, PROFILE):      # a profile has to be made first
            continue
        series = SETTINGS.get(name)
        if series is None:
            warn(f"policy '{name}' has no line in benchmarks/_methods.py, SETTINGS; it runs at its defaults")
            yield policy(name, {}, None, Series(({},), max_skips=4), steps)
            continue
        yield from in_series(name, series, steps, quick)
    for name, series in (*AT_LEVELS, *BORROWED):
        yield from in_series(name, series, steps, quick)


def methods(steps: int, quick: bool = False) -> list:
    """All that a cell of `steps` steps is sampled with, the full run first."""
    every = counts(steps)[1::4] if quick else counts(steps)
    tolerances = TOLERANCES[8::4] if quick else TOLERANCES
    return [
        *(Plain(count) for count in (steps, *reversed(every))),
        *(error_control(tolerance, steps) for tolerance in tolerances),
        *(mask(count, order, steps) for order in MASK_ORDERS for count in every if count > order + 1),
        *policies(steps, quick),
        *(Host(name, threshold, steps) for name in HOST_NODES for threshold in (HOST_THRESHOLDS[1:2] if quick else HOST_THRESHOLDS)),
    ]
