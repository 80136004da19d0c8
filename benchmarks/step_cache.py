"""Step Cache against plain sampling and every other rule, at equal evaluations.

    python3 dev.py bench step-cache              the whole grid, hours -> results/step-cache.json, .md and .png; a stopped one goes on
        --models flux,zimage,wan  --cells 'flux/euler/28/*' [...]  --methods 'error control,mask'    a part of it
        --threads 2                              so many processes of one thread each
        --quick                                  a small part, 3 minutes on two idle cores -> results/quick/
    python3 dev.py bench step-cache --recheck    after a change of core/: rows of --cells anew, one per curve; where they are as before, all hold
    python3 dev.py bench step-cache --verdict    what the rows that are there say of the promises
    python3 dev.py bench step-cache --peers      error control on the pictures of the peers' table -> results/peers.json
    python3 dev.py bench step-cache --profiles   error control against calibrated profiles -> results/profiles.json
    python3 dev.py bench step-cache --engine     what the engine itself costs, CPU -> results/engine.json
    python3 dev.py bench step-cache --gpu        the same at the size of FLUX.1-dev, random weights, CUDA -> results/engine-gpu.json

    python3 dev.py bench step-cache --first      the default settings on every model of the test bed -> results/first.json
    python3 dev.py bench step-cache --presets    safe, balanced and fast, cfg 1 and 3 -> results/presets.json
    python3 dev.py bench step-cache --wall       seconds on a seeded 13.5 M model at 256 px -> results/wall.json

In the last three, evaluations: blocks computed / blocks of a full evaluation, summed over the run. PSNR is against the full run of the same
length, the mean over 8 captions x 2 seeds, each sampled by itself. Plain sampling takes, picture by picture, as many steps
as the cache took evaluations, rounded up.
"""
import argparse
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path

from testbed import inprocess

ON_A_GPU = {"--gpu", "--first", "--presets", "--wall"}    # all else is measured on the CPU, wherever it runs
inprocess.start(cpu=not ON_A_GPU.intersection(sys.argv))
from benchmarks import _campaign, _engine, _grid, _profiles, _verdict, _workers  # noqa: I001 - the host must be on the path first
from benchmarks._pictures import SUBJECTS, psnr, sample
from benchmarks._rows import Rows

import torch
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


def grid(options) -> None:
    """The table, or a part of it."""
    folder = RESULTS / "quick" if options.quick else RESULTS
    rows = Rows(folder / "step-cache.json")
    if options.quick:
        cells = _grid.quick_cells(options.models)
    else:
        cells = _grid.cells(options.models, options.cells) + _grid.alone_cells(options.models, options.cells)
    if not cells:
        raise SystemExit(f"no cell of the grid is called {' or '.join(options.cells)}; a name is model/sampler/steps/cfg, for example flux/euler/28/1")
    _campaign.fill(rows, cells, options.threads, options.quick, options.methods)
    findings = _campaign.publish(rows, folder)
    print(*findings, f"written to {folder}: step-cache.json, step-cache.md, step-cache.png", sep="\n")


def verdict(options) -> None:
    rows = Rows(RESULTS / "step-cache.json")
    if stale := _campaign.stale_rows(rows):
        print(f"{stale} of {len(rows)} rows were made by another core/, model or format")
    print(*_verdict.verdict(rows), *_profiles.verdict(Rows(RESULTS / "profiles.json"), rows),
          *_verdict.peers(Rows(RESULTS / "peers.json")), *_verdict.engine(written("engine.json")), sep="\n")


def recheck(options) -> None:
    rows = Rows(RESULTS / "step-cache.json")
    cells = [cell for cell in _grid.cells(options.models, options.cells or ["*/20/*"]) if cell.set == _grid.CHOOSE]
    moved = _campaign.recheck(rows, cells)
    print(f"{len(moved)} curves came out otherwise", *moved, f"{_campaign.stale_rows(rows)} of {len(rows)} rows are stale", sep="\n")


def peers(options) -> None:
    rows = Rows(RESULTS / "peers.json")
    _campaign.fill(rows, _grid.peer_cells(), options.threads)
    print(*_verdict.peers(rows), f"written to {rows.path}", sep="\n")


def profiles(options) -> None:
    rows = Rows(RESULTS / "profiles.json")
    _campaign.fill(rows, _grid.profile_cells(options.models, options.cells), options.threads)
    print(*_profiles.verdict(rows, Rows(RESULTS / "step-cache.json")), f"written to {rows.path}", sep="\n")


def engine(options) -> None:
    rows = _engine.on_cpu()
    write("engine", rows)
    print(*_verdict.engine(rows), sep="\n")


def gpu(options) -> None:
    write("engine-gpu", _engine.on_gpu())


def worker(options) -> None:
    _workers.serve(_grid.answer)


def written(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text()) if (RESULTS / name).is_file() else []


def write(stem: str, rows: list[dict]) -> None:
    path, text = RESULTS / f"{stem}.json", json.dumps(rows, indent=2) + "\n"
    try:
        path.write_text(text)
        print(f"written to {path}")
    except OSError as error:
        print(f"{text}{path} cannot be written ({error.strerror}); the rows stand above")


def names(known):
    """A type for argparse: names of `known`, separated by commas."""
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return chosen
    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    for table in (first, presets, wall):
        which.add_argument(f"--{table.__name__}", dest="table", action="store_const", const=table)
    for command in (verdict, recheck, peers, profiles, engine, gpu):
        which.add_argument(f"--{command.__name__}", dest="command", action="store_const", const=command)
    which.add_argument("--worker", dest="command", action="store_const", const=worker, help=argparse.SUPPRESS)
    which.add_argument("--quick", action="store_true", help="a small part of the grid, 3 minutes on two idle cores")
    parser.add_argument("--models", type=names(list(_grid.SUBJECTS)), default=list(_grid.SUBJECTS), metavar="A,B", help=f"of {', '.join(_grid.SUBJECTS)}")
    parser.add_argument("--cells", nargs="+", metavar="PATTERN", help="cells of the grid by name, model/sampler/steps/cfg; * stands for anything")
    parser.add_argument("--methods", type=lambda text: text.split(","), metavar="A,B", help="methods by name")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="processes of one thread each (2)")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("benchmarks").setLevel(logging.WARNING)
    if options.command in (None, recheck, peers, profiles, worker):
        torch.set_num_threads(1)
    if options.table:
        write(options.table.__name__, options.table())
    else:
        (options.command or grid)(options)


if __name__ == "__main__":
    main()
