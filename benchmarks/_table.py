"""The table as Markdown: dB at equal evaluations for every cell, what error control does to single pictures, and every row."""
import statistics
from collections import defaultdict
from collections.abc import Iterable

from ._curves import RANGE, best, curves
from ._verdict import OURS, Finding, named, rivals

SHARES = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.60)
HEADS = ("method", "settings", "evaluations", "computed", "latent dB", "picture dB", "SSIM", "rel. L2", "time")

INTRODUCTION = """# Step Cache, measured

Made by `python3 dev.py bench step-cache`; the rows are in step-cache.json, the plot in step-cache.png.

Every number compares a run with the host's full run of the same length, sampler and seed. Conditions: fp32, CPU, one thread, 128 px, scheduler simple,
each set of {prompts} prompts x {seeds} seeds sampled as one batch, which shares the decisions. Settings are chosen on one set and scored on another.

* evaluations: blocks computed over blocks of a full evaluation, summed over the run; for plain sampling and the host's caches, calls of the model
  per picture and condition
* picture dB: PSNR per picture, then the mean; decoded by the linear VAE, peak 1
* latent dB: the same for latents; the peak is the range of the full run's latent
* SSIM with windows of 11 pixels; rel. L2 of the final latent, the median over the pictures; time as a share of the full run's wall time

Models: {models}.
"""


def markdown(rows: Iterable[dict], findings: list[Finding], models: str) -> str:
    rows = list(rows)
    if not rows:
        return "# Step Cache, measured\n\nNothing is measured yet.\n"
    parts = [INTRODUCTION.format(prompts=rows[0]["prompts"], seeds=rows[0]["seeds"], models=models)]
    parts += ["## Promises\n", "```", *(str(finding) for finding in findings), "```\n"]
    parts += ["## Picture dB at equal evaluations, on the prompts that nothing was chosen on\n", *equal_evaluations(rows)]
    parts += alone(rows)
    parts += ["## Every row, on the same prompts\n", *every_row(rows)]
    return "\n".join(parts)


def grid(heads: Iterable[str], body: Iterable[Iterable]) -> list[str]:
    lines = [heads, ["---"] * len(tuple(heads)), *body]
    return ["| " + " | ".join(str(field) for field in line) + " |" for line in lines] + [""]


def equal_evaluations(rows: list[dict]) -> list[str]:
    parts = []
    for cell, found in sorted(curves(rows).items()):
        counts = sorted({round(share * cell[2]) for share in SHARES if RANGE[0] <= share <= RANGE[1]})
        names = [OURS, "plain", "mask", *sorted({curve.method for curve in found}.difference((OURS, "plain", "mask")))]
        body = []
        for name in names:
            at = [(best(rivals(found, name), count), count) for count in counts]
            body.append([name, *(f"{statistics.mean(curve.at(count, 'score')):.1f}" if curve else "" for curve, count in at)])
        parts += [f"{named(cell)}\n", *grid(["evaluations", *counts], body)]
    return parts


def alone(rows: list[dict]) -> list[str]:
    chosen = [row for row in rows if row["alone"]]
    if not chosen:
        return []
    body = [[named(tuple(row[key] for key in ("model", "sampler", "steps", "cfg"))), row["settings"].get("tolerance", ""),
             spread(row["evaluations_each"], 1), spread(row["psnr_image_each"], 1), spread(row["rel_l2_each"], 4)] for row in chosen]
    heads = ("one picture at a time", "tolerance", "evaluations", "picture dB", "rel. L2")
    return ["## One picture at a time, as users sample: mean, standard deviation, least and most\n", *grid(heads, body)]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def every_row(rows: list[dict]) -> list[str]:
    by_cell = defaultdict(list)
    for row in rows:
        if row["set"] == "score" and not row["alone"]:
            by_cell[tuple(row[key] for key in ("model", "sampler", "steps", "cfg"))].append(row)
    parts = []
    for cell, found in sorted(by_cell.items()):
        found.sort(key=lambda row: (row["method"] != OURS, row["method"], row["evaluations"]))
        parts += [f"{named(cell)}\n", *grid(HEADS, map(fields, found))]
    return parts


def fields(row: dict) -> list[str]:
    def shown(key: str, digits: int) -> str:
        return "" if row[key] is None else f"{row[key]:.{digits}f}"

    return [row["method"], told(row["settings"]), shown("evaluations", 2), f"{row['computed_steps']:g}", shown("psnr_latent_db", 2),
            shown("psnr_image_db", 2), shown("ssim", 4), f"{row['rel_l2_median']:g}", shown("wall_ratio", 2)]


def told(settings: dict) -> str:
    def value(of) -> str:
        return " ".join(str(part) for part in of.values()) if isinstance(of, dict) else str(of)

    return ", ".join(f"{key} {value(of)}" for key, of in settings.items())
