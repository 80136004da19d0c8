"""What the table says of the promises that are made about error control. Reads rows alone; measures nothing.

    1  not below the best single setting of any policy or of plain sampling, from 12 evaluations on
    2  so many dB above the interval rule, plain sampling and the evenly spread mask, between 28 and 45 % of the steps
    3  one tolerance means the same thing everywhere: the relative L2 error of the final latent
    4  what the engine costs by itself
"""
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ._curves import Curve, Difference, best, between, counts, curves, interval, paired

OURS, NO_RIVALS = "error control", ("error control", "mask", "profile", "host EasyCache", "host LazyCache")
FROM, ALLOWED = 12, -1.0                        # evaluations; dB
SHARES = (0.28, 0.45)
MARGINS = {1.0: {"interval": 5.0, "plain": 11.0, "mask": 1.5}, 3.5: {"interval": 1.0, "mask": -1.0}}
MEDIAN, WORST = (0.4, 1.6), 3.0                 # of the error, in tolerances
ENGINE_SHARE, SKIP_SHARE = 0.02, 0.05
PEERS = ((28, 9.5, 48.0), (50, 12.0, 49.0), (50, 10.0, 45.0))    # steps, evaluations, dB


@dataclass(frozen=True)
class Finding:
    """One promise with its numbers; `kept` is None where the table does not say."""

    promise: str
    kept: bool | None
    numbers: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = {True: "PASS", False: "FAIL", None: "----"}[self.kept]
        return "\n".join([f"{mark}  {self.promise}: {self.numbers}", *(f"        {line}" for line in self.more)])


def verdict(rows: Iterable[dict]) -> list[Finding]:
    rows = list(rows)
    grid, findings = curves(rows), []
    findings += not_below_the_best(grid, seeds_of(rows))
    for cfg, margins in MARGINS.items():
        findings += [above(grid, cfg, rival, margin, seeds_of(rows)) for rival, margin in margins.items()]
    findings += tolerance_means_the_same(rows)
    return findings


def seeds_of(rows: list[dict]) -> int:
    return rows[0]["seeds"] if rows else 1


def named(cell: tuple) -> str:
    model, sampler, steps, cfg = cell
    return f"{model}, {sampler}, {steps} steps, cfg {cfg:g}"


def ours_of(found: list[Curve]) -> Curve | None:
    return next((curve for curve in found if curve.method == OURS), None)


def rivals(found: list[Curve], method: str | None = None) -> list[Curve]:
    """The curves of one method; without one, of plain sampling and of every policy, schedules from a profile set aside."""
    return [curve for curve in found if (curve.method == method if method else curve.method not in NO_RIVALS)]


def compare(found: list[Curve], against: list[Curve], evaluations: float, seeds: int) -> tuple[Difference, Curve] | None:
    """Ours less the best of `against`, at as many evaluations; None where one of the two has no setting about there."""
    ours, rival = ours_of(found), best(against, evaluations)
    if ours is None or rival is None or (here := ours.at(evaluations, "score")) is None:
        return None
    return paired(here, rival.at(evaluations, "score"), seeds), rival


def average(by_cell: dict[tuple, list[float]]) -> Difference | None:
    """Over the cells, each of which counts once, however many evaluations it was looked at."""
    means = [statistics.mean(values) for values in by_cell.values() if values]
    return interval(means) if means else None


def not_below_the_best(grid: dict, seeds: int) -> list[Finding]:
    gains, far_below, surely_below, silent, looked = defaultdict(list), [], [], 0, 0
    lost_to: Counter = Counter()
    for cell, found in grid.items():
        for evaluations in counts(cell[2]):
            if evaluations < FROM:
                continue
            looked += 1
            result = compare(found, rivals(found), evaluations, seeds)
            if result is None:
                silent += 1
                continue
            difference, rival = result
            gains[cell].append(difference.mean)
            if difference.mean < 0:
                lost_to[rival.label] += 1
            if difference.mean < ALLOWED:
                far_below.append(f"{named(cell)}, {evaluations} evaluations, {rival.label}: {difference}")
            if difference.mean + difference.half < ALLOWED:
                surely_below.append(far_below[-1])
    overall = average(gains)
    if overall is None:
        return [Finding("1 not below the best single setting", None, "no cell of the table has 12 or more evaluations")]
    each = tuple(f"{named(cell)}: {statistics.mean(values):+.2f} dB over {len(values)} counts" for cell, values in sorted(gains.items()))
    by_name = ", ".join(f"{name} {n}" for name, n in lost_to.most_common())
    lost = (f"below by mean at {lost_to.total()} of {looked - silent}: {by_name}",) if lost_to else ()
    unknown = (f"{silent} of {looked} places lie below the cheapest setting of ours or of every rival",) if silent else ()
    return [
        Finding("1 average, cells with 12 or more evaluations, not below the best single setting", overall.mean >= 0, str(overall), each + lost + unknown),
        Finding("1 no cell more than 1 dB below", not surely_below,
                f"{len(surely_below)} of {looked - silent} with the whole interval below -1 dB, {len(far_below)} by their mean", tuple(far_below)),
    ]


def above(grid: dict, cfg: float, rival: str, margin: float, seeds: int) -> Finding:
    gains, order = defaultdict(list), Counter()
    for cell, found in grid.items():
        if cell[3] != cfg:
            continue
        for evaluations in counts(cell[2], *SHARES):
            if result := compare(found, rivals(found, rival), evaluations, seeds):
                gains[cell].append(result[0].mean)
                order[result[1].label] += 1
    promise = f"2 cfg {cfg:g}, 28 to 45 % of the steps, against {rival}, at least {margin:+g} dB"
    overall = average(gains)
    if overall is None:
        return Finding(promise, None, "the table has no such rows")
    each = tuple(f"{named(cell)}: {statistics.mean(values):+.2f} dB over {len(values)} counts" for cell, values in sorted(gains.items()))
    return Finding(promise, overall.mean >= margin, str(overall), (*each, "chosen: " + ", ".join(f"{name} {n}" for name, n in order.most_common())))


def tolerance_means_the_same(rows: list[dict]) -> list[Finding]:
    """Over both sets: nothing is chosen here."""
    ratios, counted = defaultdict(list), defaultdict(dict)
    for row in rows:
        if row["method"] == OURS and row["computed_steps"] < row["steps"] and not row["alone"]:
            cell = tuple(row[name] for name in ("model", "sampler", "steps", "cfg"))
            counted[cell, row["set"]][row["settings"]["tolerance"]] = row["evaluations"]
            ratios[cell, row["settings"]["tolerance"]] += [far / row["settings"]["tolerance"] for far in row["rel_l2_each"]]
    if not ratios:
        return [Finding("3 one tolerance means the same thing", None, "the table has no row of error control that skipped")]
    medians = {key: statistics.median(values) for key, values in ratios.items()}
    outside = {key: value for key, value in medians.items() if not MEDIAN[0] <= value <= MEDIAN[1]}
    beyond = {key: max(values) for key, values in ratios.items() if max(values) > WORST}

    # above some tolerance nothing more is skipped, whatever is allowed, and the error stays behind
    idle = {(cell, tolerance) for (cell, _), at in counted.items() for tolerance, count in at.items()
            if count == min(at.values()) and min(smaller for smaller, other in at.items() if other == count) < tolerance}

    def lines(found: dict) -> tuple[str, ...]:
        return tuple(f"{named(cell)}, tolerance {tolerance:g}: {value:.2f}" + (", no more skips than at a smaller one" if (cell, tolerance) in idle else "")
                     for (cell, tolerance), value in sorted(found.items()))

    return [
        Finding(f"3 median error of a cell between {MEDIAN[0]} and {MEDIAN[1]} tolerances", not outside,
                f"{len(outside)} of {len(medians)} outside; they run from {min(medians.values()):.2f} to {max(medians.values()):.2f}, "
                f"in the middle {statistics.median(medians.values()):.2f}; {len(idle.intersection(outside))} of those outside skip no more than "
                "at a smaller tolerance", lines(outside)),
        Finding(f"3 no picture beyond {WORST:g} tolerances", not beyond,
                f"{len(beyond)} of {len(medians)} have one; the worst is {max(max(values) for values in ratios.values()):.2f}", lines(beyond)),
    ]


def peers(rows: Iterable[dict]) -> list[Finding]:
    """The pictures of the peers' table: mean dB at so many evaluations, one picture at a time and as a batch."""
    rows, findings = [row for row in rows if row["method"] == OURS], []
    for steps, evaluations, least in PEERS:
        for alone in (True, False):
            points = [(row["evaluations"], [row["psnr_image_db"]]) for row in front(rows, steps, alone)]
            found = between(points, evaluations)
            how = "one at a time" if alone else "as one batch"
            promise = f"{steps} steps, {evaluations:g} evaluations, {how}, at least {least:g} dB"
            findings.append(Finding(promise, None, "the table has nothing about there") if found is None
                            else Finding(promise, found[0] >= least, f"{found[0]:.2f} dB"))
    return findings


def front(rows: list[dict], steps: int, alone: bool) -> list[dict]:
    """The rows that no other beats with as many evaluations or fewer; here there is one set of pictures, as in the peers' table."""
    kept: list[dict] = []
    for row in sorted((r for r in rows if r["steps"] == steps and r["alone"] is alone), key=lambda r: (r["evaluations"], -r["psnr_image_db"])):
        if not kept or row["psnr_image_db"] > kept[-1]["psnr_image_db"]:
            kept.append(row)
    return kept


def engine(rows: Iterable[dict]) -> list[Finding]:
    """What the engine costs, from the rows of --engine."""
    findings = []
    for row in rows:
        findings.append(Finding(f"4 {row['level']}: engine in a computed evaluation, at most {ENGINE_SHARE:.0%} of it", row["engine_share"] <= ENGINE_SHARE,
                                f"{row['engine_ms']:.3f} of {row['evaluation_ms']:.2f} ms, {row['engine_share']:.2%}"))
        allowed = row["skip_block_share"] + SKIP_SHARE
        findings.append(Finding(f"4 {row['level']}: a skip, at most its blocks and {SKIP_SHARE:.0%} of an evaluation", row["skip_time_share"] <= allowed,
                                f"{row['skip_time_share']:.2%} of an evaluation, {allowed:.2%} allowed"))
    return findings or [Finding("4 what the engine costs", None, "not measured; run --engine")]
