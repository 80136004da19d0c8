"""Scores and reports in words."""
from statistics import mean

from ..core.report import Evaluation, Report
from .metrics import EXACT, LEAST_PIQ, WINDOW, Scores

HEAD = f"{'':>4} {'sigma':>9}  {'run':<8} {'blocks':>7} {'expected':>9} {'measured':>9}"


def described(report: Report) -> str:
    """A report as a text of several lines: what it comes to, its settings, and every evaluation."""
    if not report.each:
        return report.line()
    rows = [row(number, each) for number, each in enumerate(report.each, 1)]
    return "\n".join([report.line(), setting(report), "", HEAD, *rows])


def setting(report: Report) -> str:
    parts = [f"{report.model}, {report.sampler}, {report.steps} steps", f"level {report.level}", f"cache {report.cache_bytes / 2 ** 20:.2f} MiB"]
    for name, value in report.settings.items():
        if isinstance(value, dict):
            knobs = ", ".join(f"{knob} {told}" for knob, told in value.items() if knob != "name")
            value = f"{value.get('name', '')} ({knobs})" if knobs else value.get("name", "")
        if name != "level":     # what the run was at in the end is told already
            parts.append(f"{name.replace('_', ' ')} {value}")
    return "; ".join(parts)


def row(number: int, each: Evaluation) -> str:
    run = "computed" if each.computed else "skipped"
    text = f"{number:>4} {each.sigma:>9.4f}  {run:<8} {each.share:>7.0%} {percent(each.predicted_error):>9} {percent(each.hindcast_error):>9}"
    return f"{text}  {each.why}".rstrip()


def percent(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def brief(report: Report) -> str:
    """A report in a few words, for a caption."""
    if report.state == "off":
        return "Step Cache off"
    return f"{report.evaluations:.4g} of {len(report.each)} evaluations, {report.seconds:.2f} s"


def measured(scores: Scores) -> str:
    parts = [f"PSNR {scores.psnr:.2f} dB" + (" (equal)" if scores.psnr >= EXACT else "")]
    parts += [f"{name} {score:.4f}" for name, score in (("SSIM", scores.ssim), ("HaarPSI", scores.haarpsi), ("MDSI", scores.mdsi)) if score is not None]
    return ", ".join(parts)


def summary(every: list[Scores]) -> list[str]:
    """A line for each picture, their mean and the worst, and what could not be measured."""
    lines = [measured(scores) for scores in every]
    if len(every) > 1:
        lines = [f"{number}: {line}" for number, line in enumerate(lines, 1)]
        worst = min(range(len(every)), key=lambda place: every[place].psnr)
        lines.append(f"mean: {measured(average(every))}; the worst is picture {worst + 1}")
    if any(scores.ssim is None for scores in every):
        lines.append(f"SSIM needs kornia, which ComfyUI's requirements bring, and pictures of at least {WINDOW} x {WINDOW} pixels.")
    if any(scores.haarpsi is None for scores in every):
        lines.append(f"HaarPSI and MDSI need piq (pip install piq) and pictures of at least {LEAST_PIQ} x {LEAST_PIQ} pixels.")
    return lines


def average(every: list[Scores]) -> Scores:
    """The mean of each score over the pictures; all of a batch have one size, so what is missing from one is missing from all."""
    columns = zip(*((scores.psnr, scores.ssim, scores.haarpsi, scores.mdsi) for scores in every), strict=True)
    return Scores(*(None if None in column else mean(column) for column in columns))
