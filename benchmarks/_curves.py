"""Curves of error against evaluations: chosen on one set of prompts, scored on another, compared pair by pair.

A curve holds the settings of one method that differ in strength alone. A setting stays on its curve if on the set CHOOSE
no other is at least as near with at most as many evaluations; what the curve is worth is read from the set SCORE. Between
two settings dB is taken to be linear in log(evaluations), for each picture by itself. Who may spend more evaluations than
the dearest setting takes can still use that one, so there its value stands; below the cheapest a curve says nothing.
"""
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

CELL = ("model", "sampler", "steps", "cfg")
RANGE = (0.25, 0.60)
T975 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)   # Student, by freedom


def strength_free(row: dict) -> str:
    """A row's curve: its method with all of its settings but those that say how strong it is."""
    return json.dumps([row["method"], *(row["settings"].get(key) for key in ("predictor", "level"))], sort_keys=True)


@dataclass
class Curve:
    method: str
    label: str
    points: dict[str, dict[str, dict]] = field(default_factory=lambda: defaultdict(dict))    # {set: {settings: row}}

    def add(self, row: dict) -> None:
        self.points[row["set"]][json.dumps(row["settings"], sort_keys=True)] = row

    def kept(self) -> list[str]:
        """Settings that no other beats on the first set, fewest evaluations first."""
        front, best = [], -math.inf
        for settings, row in sorted(self.points["choose"].items(), key=lambda item: (item[1]["evaluations"], -item[1]["psnr_image_db"])):
            if row["psnr_image_db"] > best:
                best = row["psnr_image_db"]
                front.append(settings)
        return front

    def at(self, evaluations: float, which: str) -> list[float] | None:
        """dB of every picture of a set at so many evaluations; None where every setting takes more."""
        rows = [self.points[which][settings] for settings in self.kept() if settings in self.points[which]]
        return between([(row["evaluations"], row["psnr_image_each"]) for row in rows], evaluations)


def between(points: list[tuple[float, list[float]]], at: float) -> list[float] | None:
    """Linear in log(evaluations), for each of the values by itself, and as the last point beyond it; of points at one place the later one holds."""
    known = sorted(dict(points).items())
    for place, values in known:
        if math.isclose(place, at, rel_tol=1e-6):
            return list(values)
    for (a, low), (b, high) in zip(known, known[1:], strict=False):
        if a < at < b:
            share = math.log(at / a) / math.log(b / a)
            return [x + share * (y - x) for x, y in zip(low, high, strict=True)]
    return list(known[-1][1]) if known and at > known[-1][0] else None


def curves(rows: Iterable[dict]) -> dict[tuple, list[Curve]]:
    """{(model, sampler, steps, cfg): curves} of the rows that have pictures and were sampled as one batch."""
    found: dict[tuple, dict[str, Curve]] = defaultdict(dict)
    for row in rows:
        if row["psnr_image_each"] is None or row["alone"]:
            continue
        key = strength_free(row)
        predictor, level = row["settings"].get("predictor") or {}, row["settings"].get("level")
        parts = (row["method"], predictor.get("name", ""), predictor.get("order", ""), *(("at", *level.values()) if isinstance(level, dict) else ()))
        label = " ".join(str(part) for part in parts if part != "")
        found[tuple(row[name] for name in CELL)].setdefault(key, Curve(row["method"], label)).add(row)
    return {cell: list(by_key.values()) for cell, by_key in found.items()}


def best(candidates: list[Curve], evaluations: float) -> Curve | None:
    """The curve that is nearest on the first set, among those that reach there on both."""
    scored = [(statistics.mean(there), i) for i, curve in enumerate(candidates)
              if (there := curve.at(evaluations, "choose")) is not None and curve.at(evaluations, "score") is not None]
    return candidates[max(scored)[1]] if scored else None


@dataclass(frozen=True)
class Difference:
    """Ours less theirs in dB, paired over prompts, with half the width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} dB (95 % interval {self.mean - self.half:+.2f} to {self.mean + self.half:+.2f})"


def paired(ours: list[float], theirs: list[float], seeds: int) -> Difference:
    """The pictures of one prompt are no independent draws, so they count once."""
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    return interval([statistics.mean(each[i:i + seeds]) for i in range(0, len(each), seeds)])


def interval(values: list[float]) -> Difference:
    freedom = len(values) - 1
    if freedom < 1:
        return Difference(values[0], math.inf)
    t = T975[freedom] if freedom < len(T975) else 1.96 + 2.5 / freedom
    return Difference(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


def counts(steps: int, low: float = RANGE[0], high: float = RANGE[1]) -> range:
    """Whole numbers of evaluations between two shares of the steps."""
    return range(math.ceil(low * steps - 1e-9), math.floor(high * steps + 1e-9) + 1)
