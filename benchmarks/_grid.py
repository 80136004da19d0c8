"""The cells of the table, and what one row measures.

A cell is a model, a sampler, a number of steps and a cfg; its pictures come in two sets of 8 prompts x 2 seeds. Settings
are chosen on the first set and scored on the second. A set is sampled as one batch, which shares the decisions, or one
picture at a time. The reference is the host's full run of the same pictures, sampled the same way.
"""
import ast
import hashlib
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import _methods, _profiles
from ._pictures import VAE, psnr, sample_under
from ._rows import identity
from ._subjects import CHOOSE, PEERS, SAMPLERS, SCORE, SEEDS, STEPS, SUBJECTS, Pictures
from pack.compare import metrics
from pack.core.families import family_of

ROOT = Path(__file__).resolve().parent.parent
CFGS = (1.0, 3.5)
FORMAT = 1                              # of a row: another number, and every row is measured anew


@dataclass(frozen=True)
class Cell:
    model: str      # a key of SUBJECTS
    sampler: str
    steps: int
    cfg: float
    set: str = SCORE
    prompts: int = 8
    alone: bool = False     # one picture at a time
    profiled: bool = False  # by way of a profile

    @property
    def name(self) -> str:
        return f"{self.model}/{self.sampler}/{self.steps}/{self.cfg:g}"

    def matches(self, patterns: list[str] | None) -> bool:
        return not patterns or any(fnmatch(self.name, pattern) for pattern in patterns)


def cells(models: list[str], patterns: list[str] | None = None) -> list[Cell]:
    """The grid; the two sets of a cell stand side by side, so that an unfinished table has whole cells."""
    grid = [Cell(model, sampler, steps, cfg, which) for steps in STEPS for sampler in SAMPLERS for cfg in CFGS
            for model in models if sampler in SUBJECTS[model].samplers and steps in SUBJECTS[model].steps for which in (CHOOSE, SCORE)]
    return [cell for cell in grid if cell.matches(patterns)]


def alone_cells(models: list[str], patterns: list[str] | None = None) -> list[Cell]:
    """The second table: as users sample."""
    grid = [Cell("flux", "euler", 28, cfg, SCORE, alone=True) for cfg in CFGS]
    return [cell for cell in grid if cell.model in models and cell.matches(patterns)]


def peer_cells() -> list[Cell]:
    """The pictures on which other step caches were measured, at cfg 1."""
    return [Cell("flux", "euler", steps, 1.0, PEERS, alone=alone) for steps in (28, 50) for alone in (False, True)]


def profile_cells(models: list[str], patterns: list[str] | None = None) -> list[Cell]:
    grid = [Cell(model, sampler, steps, cfg, profiled=True) for steps in STEPS[:2] for model in models if SUBJECTS[model].decodes
            for sampler in SAMPLERS for cfg in CFGS]
    return [cell for cell in grid if cell.matches(patterns)]


def quick_cells(models: list[str]) -> list[Cell]:
    few = (("flux", "euler", 20, 1.0), ("flux", "dpmpp_2m", 28, 3.5), ("zimage", "euler", 20, 1.0), ("wan", "euler", 20, 1.0))
    return [Cell(*cell, which, prompts=4) for cell in few if cell[0] in models for which in (CHOOSE, SCORE)]


# what only these methods ask, the numbers of the others do not depend on: predictors that are set need no scores to choose by
JUDGING = ("error_budget.py", "handed_on.py", "hindcast.py", "policies/error_control.py")
CALIBRATING = ("calibrate.py", *(f"profiles/{path.name}" for path in (ROOT / "core" / "stepcache" / "profiles").glob("*.py")))
ASKED_BY = {f"core/stepcache/{name}": (_methods.ERROR_CONTROL, _methods.PROFILE) for name in JUDGING}
ASKED_BY |= {f"core/stepcache/{name}": (_methods.PROFILE,) for name in CALIBRATING}
ELSEWHERE = ("core/reference/", "core/quant/")      # no run without references, on a full model, asks these
ASKED = ("_triton", "combine", "drift")     # of kernels/
WORDS = 4       # a string of so many is a sentence


@cache
def engine(method: str) -> str:
    """A hash of what makes a method's numbers: the code of core/ and kernels/ without comments, docstrings and what is told to the user."""
    digest = hashlib.sha256()
    for file in sorted(path for part in ("core", "kernels") for path in (ROOT / part).rglob("*.py") if "gguf" not in path.parts):
        name = file.relative_to(ROOT).as_posix()
        if method in ASKED_BY.get(name, (method,)) and not name.startswith(ELSEWHERE) and (file.parent.name != "kernels" or file.stem in ASKED):
            digest.update(f"{name}\n{ast.dump(Unsaid().visit(ast.parse(file.read_text(encoding='utf-8'))))}\n".encode())
    return digest.hexdigest()[:12]


class Unsaid(ast.NodeTransformer):
    """Takes the sentences out of a program."""

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) and len(node.value.split()) >= WORDS else node

    def visit_JoinedStr(self, node):
        return ast.Constant("")

    def documented(self, node):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    visit_Module = visit_ClassDef = visit_FunctionDef = documented


@cache
def model_of(name: str):
    return SUBJECTS[name].load()


@cache
def fingerprint(name: str) -> str:
    return SUBJECTS[name].fingerprint()


def made_by(model: str, method: str, own: bool) -> str:
    """What a row's numbers depend on; the engine matters to methods of our own alone."""
    return f"format {FORMAT}, model {fingerprint(model)}" + (f", core {engine(method)}" if own else "")


def heading(cell: Cell, method) -> dict:
    """What tells a row from the others, and `made_by`, on which its numbers depend."""
    return {
        "model": SUBJECTS[cell.model].name, "sampler": cell.sampler, "steps": cell.steps, "cfg": cell.cfg, "set": cell.set, "alone": cell.alone,
        "method": method.name, "settings": method.settings, "prompts": cell.prompts, "seeds": SEEDS,
        "made_by": made_by(cell.model, method.name, method.own),
    }


@contextmanager
def counted(patcher):
    """Adds up the rows that the first block sees: what was really computed, whoever decided it."""
    network, seen = patcher.model.diffusion_model, [0]
    family = family_of(network)
    first = family.blocks(network)[0][1] if family else network
    hook = first.register_forward_pre_hook(lambda module, args, kwargs: seen.__setitem__(0, seen[0] + batch_of(args, kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def batch_of(args, kwargs) -> int:
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).shape[0]


class Bench:
    """One cell: its pictures and their full run, which every row is compared with."""

    def __init__(self, cell: Cell):
        self.cell, self.subject = cell, SUBJECTS[cell.model]
        self.patcher = model_of(cell.model)
        self.pictures = self.subject.pictures(cell.set, cell.prompts)
        self.runs = [self.pictures.one(i) for i in range(len(self.pictures.noise))] if cell.alone else [self.pictures]
        sample_under(self.patcher, self.runs[0].conds, self.runs[0].noise, 2, cell.cfg, cell.sampler)     # what only a first run pays
        begun = time.perf_counter()
        self.full = torch.cat([self.sample(self.patcher, run, cell.steps) for run in self.runs])
        self.seconds = time.perf_counter() - begun

    def sample(self, patcher, pictures: Pictures, steps: int) -> Tensor:
        return sample_under(patcher, pictures.conds, pictures.noise, steps, self.cell.cfg, self.cell.sampler)

    def row(self, method) -> dict | None:
        """The row, or None where the step cache says that it does not act."""
        reports, latents, evaluations = [], [], []
        patcher, steps = method.applied(self.patcher, reports.append), method.steps or self.cell.steps
        conds = 1 if self.cell.cfg == 1 else 2
        begun = time.perf_counter()
        for run in self.runs:
            with counted(self.patcher) as seen:
                latents.append(self.sample(patcher, run, steps))
            evaluations.append(seen[0] / (conds * len(run.noise)))
        seconds = time.perf_counter() - begun
        computed = evaluations
        if method.own:
            if reports[0].state == "off":
                _methods.warn(f"{self.subject.name}: {reports[0].reason}")
                return None
            evaluations, computed = [report.evaluations for report in reports], [report.computed for report in reports]
        row = heading(self.cell, method) | {
            "evaluations": round(statistics.mean(evaluations), 4), "computed_steps": round(statistics.mean(computed), 4),
            **self.errors(torch.cat(latents), "tolerance" in method.settings), "wall_ratio": round(seconds / self.seconds, 4),
        }
        if self.cell.alone:
            row["evaluations_each"] = [round(count, 4) for count in evaluations]
        return row

    def errors(self, latents: Tensor, told: bool) -> dict:
        """`told`: the error of every single latent, which is what a tolerance is about."""
        far = [relative_l2(a, b) for a, b in zip(latents, self.full, strict=True)]
        pictures = [psnr(a[None], b[None]) for a, b in zip(latents, self.full, strict=True)] if self.subject.decodes else None
        return {
            "psnr_latent_db": round(statistics.mean(psnr_latent(a, b) for a, b in zip(latents, self.full, strict=True)), 3),
            "psnr_image_db": round(statistics.mean(pictures), 3) if pictures else None,
            "ssim": significant(similarity(latents, self.full)) if pictures else None,
            "rel_l2_median": significant(statistics.median(far)), "rel_l2_max": significant(max(far)),
            "psnr_image_each": [round(decibel, 2) for decibel in pictures] if pictures else None,
        } | ({"rel_l2_each": [significant(x) for x in far]} if told else {})


def significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def relative_l2(latent: Tensor, reference: Tensor) -> float:
    return ((latent - reference).norm() / reference.norm().clamp_min(1e-12)).item()


def psnr_latent(latent: Tensor, reference: Tensor) -> float:
    """dB; the peak is the range of the reference."""
    error = (latent - reference).square().mean().item()
    return metrics.EXACT if error < 1e-12 else 20 * math.log10((reference.max() - reference.min()).item()) - 10 * math.log10(error)


def similarity(latents: Tensor, references: Tensor) -> float | None:
    """SSIM of the decoded pictures, mean over the batch."""
    return metrics.ssim(*(VAE.decode(batch).movedim(-1, 1) for batch in (latents, references)))


def planned(cell: Cell, quick: bool) -> list:
    """The methods of a cell; of those that sample one picture at a time, error control alone. A policy that can skip nothing here is left out."""
    if cell.profiled:
        return _profiles.methods(cell)
    if cell.set == PEERS:
        return _methods.far_ladder(cell.steps)
    if cell.alone:
        return [_methods.error_control(tolerance, cell.steps) for tolerance in _methods.TOLERANCES_ALONE]
    family = family_of(model_of(cell.model).model.diffusion_model)
    return [method for method in _methods.methods(cell.steps, quick) if not (family and method.refused(family.name, cell.steps, cell.sampler))]


def measured(cell: Cell, wanted: list) -> Iterator[dict]:
    """One row per method, as they get ready."""
    bench = Bench(cell)
    for method in wanted:
        row = bench.row(method)
        if row is not None:
            yield row


def answer(task: dict) -> Iterator[dict]:
    """A worker's work: the rows of a cell whose identities the task names."""
    cell = Cell(**task["cell"])
    wanted = set(task["wanted"])
    yield from measured(cell, [method for method in planned(cell, task["quick"]) if identity(heading(cell, method)) in wanted])
