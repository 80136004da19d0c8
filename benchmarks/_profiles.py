"""A speed-up by way of a calibrated profile, at as many evaluations as error control takes.

The profile is made as the node makes it, on one noise per prompt of the set CHOOSE, for the speed-up that is then asked for; scored
are both on the set SCORE, as one batch. Error control's rows are those of the grid; between two of them it stands where they say.
"""
import statistics
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from tempfile import mkdtemp

import comfy.samplers
import folder_paths
import torch

from . import _methods
from ._curves import CELL, curves, interval, paired
from ._subjects import CHOOSE, SCORE, SUBJECTS
from ._verdict import OURS, Finding, named
from pack.core.run import Settings
from pack.core.stepcache.calibrate import Calibration, calibrate
from pack.core.stepcache.levels.automatic import Automatic as AutomaticLevel
from pack.core.stepcache.policies.profile import FromProfile
from pack.core.stepcache.predictors.automatic import Automatic as AutomaticPredictor
from pack.nodes.step_cache_calibrate import with_schedule

SHARES = (0.3, 0.4, 0.5)        # of the steps
REFINE = 12                     # trials for a better schedule


@cache
def own_folder() -> None:
    """Profiles go where no user keeps any."""
    folder_paths.set_user_directory(mkdtemp(prefix="reprise-profiles-"))


class Profiled(_methods.Own):
    """Policy profile at a speed-up; calibrates when it is first applied."""

    def __init__(self, cell, count: int):
        self.cell, self.speed_up = cell, cell.steps / count
        self.profile = f"{cell.name.replace('/', '-')}-{count}"
        policy = FromProfile(self.profile, f"{self.speed_up:.6g}x")
        super().__init__(_methods.PROFILE, Settings(policy, AutomaticPredictor(), AutomaticLevel(), max_consecutive_skips=0),
                         {"computed": count, "refine": REFINE}, count + 3 * REFINE)

    def applied(self, patcher, notify):
        self.calibrate(patcher)
        return super().applied(patcher, notify)

    def calibrate(self, patcher) -> None:
        own_folder()
        pictures, cell = SUBJECTS[self.cell.model].pictures(CHOOSE, self.cell.prompts), self.cell
        each = [pictures.one(i).conds for i in range(0, len(pictures.noise), pictures.seeds)]
        sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", cell.steps)
        calibration = Calibration(patcher, each[0][1], comfy.samplers.sampler_object(cell.sampler), sigmas, cell.cfg,
                                  {"samples": torch.zeros_like(pictures.noise[:1])})
        with torch.inference_mode():
            calibrate(calibration, [positive for positive, _ in each], 1, self.profile, self.speed_up, REFINE, with_schedule)


def methods(cell) -> list:
    return [Profiled(cell, round(share * cell.steps)) for share in SHARES]


def verdict(rows: Iterable[dict], grid: Iterable[dict]) -> list[Finding]:
    """The mean over the cells, each of which counts once; `grid` has error control's rows."""
    gains, lines, cells = defaultdict(list), [], curves(grid)
    for row in rows:
        cell = tuple(row[key] for key in CELL)
        ours = next((curve for curve in cells.get(cell, ()) if curve.method == OURS), None)
        here = ours and ours.at(row["evaluations"], SCORE)
        if not here:
            lines.append(f"{named(cell)}, {row['evaluations']:g} evaluations: {row['psnr_image_db']:.2f} dB, and error control was not measured so low")
            continue
        difference = paired(row["psnr_image_each"], here, row["seeds"])
        gains[cell].append(difference.mean)
        lines.append(f"{named(cell)}, {row['evaluations']:g} evaluations: {difference}")
    if not gains:
        return [Finding("2 a speed-up by profile against tolerance", None, "not measured; run --profiles", tuple(lines))]
    overall = interval([statistics.mean(values) for values in gains.values()])
    return [Finding("2 a speed-up by profile, at least as near as tolerance at as many evaluations", overall.mean >= 0, str(overall), tuple(lines))]
