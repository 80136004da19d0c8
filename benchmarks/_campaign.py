"""Filling a table: what is planned less what is there, cell by cell; then the files that are made from it."""
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from . import _grid, _pareto, _table, _verdict, _workers
from ._curves import strength_free
from ._grid import SUBJECTS, Cell
from ._rows import Rows, identity

log = logging.getLogger("benchmarks")
ROUNDING = 0.05     # dB


def fill(rows: Rows, cells: list[Cell], processes: int = 1, quick: bool = False, only: list[str] | None = None) -> None:
    """Measure what is missing or was made by another engine or model. Rows of a cell that left the plan are dropped."""
    tasks, costs = [], {}
    for cell in cells:
        methods = {identity(_grid.heading(cell, method)): method for method in _grid.planned(cell, quick)}
        if only is None:
            rows.keep_only({"model": SUBJECTS[cell.model].name, **{key: getattr(cell, key) for key in ("sampler", "steps", "cfg", "set", "alone", "prompts")}},
                           set(methods))
        wanted = {name: method for name, method in methods.items()
                  if (only is None or method.name in only) and not rows.fresh(_grid.heading(cell, method))}
        costs |= {name: cost(cell, method) for name, method in wanted.items()}
        if wanted:
            tasks.append({"cell": asdict(cell), "wanted": list(wanted), "quick": quick})
    rows.save()
    progress = _workers.Progress(sum(costs.values()), len(costs))
    source = _workers.spread(tasks, processes) if processes > 1 else one_after_the_other(tasks)
    try:
        for row in source:
            rows.add(row)
            progress.add(costs[identity(row)], f"{row['model']}/{row['sampler']}/{row['steps']}/{row['cfg']:g} {row['method']}")
    finally:    # Ctrl-C among the reasons
        source.close()
        rows.save()


def recheck(rows: Rows, cells: list[Cell]) -> list[str]:
    """Whether rows that another core/ made are what today's makes: one row of every curve in `cells` is measured anew.

    Where all of a method's come out the same, its rows are taken for today's, in all cells. Returns what came out otherwise.
    """
    moved, checked = [], set()
    for cell in cells:
        first: dict[str, object] = {}
        for method in _grid.planned(cell, False):
            row = rows.rows.get(identity(_grid.heading(cell, method)))
            if method.own and row is not None and not rows.fresh(_grid.heading(cell, method)) and row["computed_steps"] < cell.steps:
                first.setdefault(strength_free(row), method)
        for row in _grid.measured(cell, list(first.values())):
            before = rows.rows[identity(row)]
            checked.add(row["method"])
            print(f"{cell.name} {row['method']}: {row['evaluations']:g} evaluations, before {before['evaluations']:g}", flush=True)
            if differs(row, before):
                moved.append(f"{cell.name} {row['method']} {row['settings']}")
    keys = {subject.name: key for key, subject in SUBJECTS.items()}
    for row in list(rows):
        if row["method"] in checked and not any(f" {row['method']} {{" in line for line in moved):
            rows.put(row | {"made_by": _grid.made_by(keys[row["model"]], row["method"], True)})
    rows.save()
    return moved


def differs(row: dict, before: dict) -> bool:
    """By more than another processor's rounding does."""
    pictures = zip(row["psnr_image_each"] or [row["psnr_latent_db"]], before["psnr_image_each"] or [before["psnr_latent_db"]], strict=True)
    return row["evaluations"] != before["evaluations"] or any(abs(a - b) > ROUNDING for a, b in pictures)


def one_after_the_other(tasks: list[dict]) -> Iterator[dict]:
    for task in tasks:
        yield from _grid.answer(task)


def cost(cell: Cell, method) -> float:
    """Seconds, about, in units of one evaluation of FLUX's batch."""
    conds = 1 if cell.cfg == 1 else 2
    weight = {"flux": 1.0, "zimage": 1.45, "wan": 0.4}.get(cell.model, 1.0)
    return method.expected * conds * weight * (1.6 if cell.alone else 1.0) * cell.prompts / 8


def publish(rows: Rows, folder: Path, stem: str = "step-cache") -> list[_verdict.Finding]:
    """The Markdown table and the plot beside the rows, and what the rows say of the promises."""
    findings = _verdict.verdict(rows)
    stale = stale_rows(rows)
    if stale:
        log.warning("%d of %d rows were made by another core/, model or format; run the benchmark again for those", stale, len(rows))
    (folder / f"{stem}.md").write_text(_table.markdown(rows, findings, model_sizes(rows)), encoding="utf-8")
    _pareto.plot(rows).save(folder / f"{stem}.png", optimize=True)
    return findings


def model_sizes(rows: Rows) -> str:
    there = {row["model"] for row in rows}
    sizes = {subject.name: sum(p.numel() for p in _grid.model_of(key).model.diffusion_model.parameters())
             for key, subject in SUBJECTS.items() if subject.name in there}
    return ", ".join(f"{name} ({size / 1e6:.1f} M parameters)" for name, size in sizes.items())


def stale_rows(rows: Rows) -> int:
    """Rows whose numbers today's code might not make."""
    keys = {subject.name: key for key, subject in SUBJECTS.items()}
    return sum(row["made_by"] != _grid.made_by(keys[row["model"]], row["method"], "core" in row["made_by"]) for row in rows)
