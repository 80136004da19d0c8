"""Step Cache against plain sampling with as many evaluations.

    python3 dev.py bench step-cache --first      the default settings on every model of the test bed -> results/first.json
    python3 dev.py bench step-cache --presets    safe, balanced and fast, cfg 1 and 3 -> results/presets.json
    python3 dev.py bench step-cache --wall       seconds on a seeded 13.5 M model at 256 px -> results/wall.json

evaluations: blocks computed / blocks of a full evaluation, summed over the run. PSNR is against the full run of the same
length, the mean over 8 captions x 2 seeds, each sampled by itself. Plain sampling takes, picture by picture, as many steps
as the cache took evaluations, rounded up.
"""
import argparse
import json
import logging
import math
import statistics
import time
from pathlib import Path

from testbed import inprocess

inprocess.start()
from benchmarks._pictures import SUBJECTS, psnr, sample  # noqa: I001 - the host must be on the path first

from pack.core.attach import attach_step_cache
from pack.core.presets import preset_settings

RESULTS = Path(__file__).resolve().parent / "results"
STEPS, SAMPLER = 20, "euler"


def measure(subject, preset: str, cfg: float) -> dict:
    """One row: a preset on a model."""
    patcher, reports = subject.load(), []
    cached = attach_step_cache(patcher, preset_settings(preset), reports.append)
    with_cache, plain = [], []
    for caption, noise in subject.pictures():
        full = sample(patcher, caption, noise, STEPS, cfg, SAMPLER)
        with_cache.append(psnr(sample(cached, caption, noise, STEPS, cfg, SAMPLER), full))
        as_many = math.ceil(reports[-1].evaluations - 1e-6)
        plain.append(psnr(sample(patcher, caption, noise, as_many, cfg, SAMPLER), full))
    return {
        "model": subject.name, "evaluations": round(statistics.mean(r.evaluations for r in reports), 3), "baseline_evaluations": STEPS,
        "psnr_db": round(statistics.mean(with_cache), 2), "plain_psnr_db_at_same_evaluations": round(statistics.mean(plain), 2),
        "median_psnr_db": round(statistics.median(with_cache), 2), "plain_median_psnr_db": round(statistics.median(plain), 2),
        "worst_psnr_db": round(min(with_cache), 2), "preset": preset, "steps": STEPS, "cfg": cfg, "sampler": SAMPLER, "pictures": len(with_cache),
    }


def first() -> list[dict]:
    return [shown(measure(subject, "balanced", 1.0)) for subject in SUBJECTS]


def presets() -> list[dict]:
    return [shown(measure(subject, preset, cfg)) for cfg in (1.0, 3.0) for subject in SUBJECTS for preset in ("safe", "balanced", "fast")]


def wall(rounds: int = 7) -> list[dict]:
    """Full and cached runs in turn on one model; medians."""
    import torch

    from testbed import tiny

    patcher, reports = tiny.patcher("flux_13m", seed=0), []
    cached = attach_step_cache(patcher, preset_settings("balanced"), reports.append)
    noise = torch.randn((1, 16, 32, 32), generator=torch.Generator().manual_seed(0))
    seconds = {"full": [], "cached": []}
    for _ in range(rounds + 1):    # the first round warms up
        for name, model in (("full", patcher), ("cached", cached)):
            begun = time.perf_counter()
            sample(model, "red heart", noise, STEPS, 1.0, SAMPLER)
            seconds[name].append(time.perf_counter() - begun)
    full, fewer = (statistics.median(times[1:]) for times in seconds.values())
    saved = 1 - reports[-1].evaluations / STEPS
    row = {
        "model": "seeded FLUX", "parameters": sum(p.numel() for p in patcher.model.diffusion_model.parameters()), "px": 256, "steps": STEPS,
        "evaluations": reports[-1].evaluations, "seconds": round(fewer, 3), "baseline_seconds": round(full, 3),
        "share_of_evaluations_saved": round(saved, 4), "share_of_time_saved": round(1 - fewer / full, 4),
        "time_saved_per_evaluation_saved": round((1 - fewer / full) / saved, 4), "threads": torch.get_num_threads(),
    }
    print(json.dumps(row, indent=2))
    return [row]


def shown(row: dict) -> dict:
    print(f"{row['model']:24} {row['preset']:9} cfg {row['cfg']:g}: {row['evaluations']:6.2f} of {STEPS} evaluations, {row['psnr_db']:6.2f} dB"
          f" (plain sampling {row['plain_psnr_db_at_same_evaluations']:.2f}, worst picture {row['worst_psnr_db']:.2f})", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    for table in (first, presets, wall):
        which.add_argument(f"--{table.__name__}", dest="table", action="store_const", const=table)
    table = parser.parse_args().table
    logging.getLogger().setLevel(logging.ERROR)
    rows = table()
    path, text = RESULTS / f"{table.__name__}.json", json.dumps(rows, indent=2) + "\n"
    try:
        path.write_text(text)
        print(f"written to {path}")
    except OSError as error:
        print(f"{text}{path} cannot be written ({error.strerror}); the rows stand above")


if __name__ == "__main__":
    main()
