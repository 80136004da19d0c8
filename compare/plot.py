"""The record of a run, drawn: what was computed and what skipped, expected and measured error, and sigma, evaluation by evaluation."""
import math
import textwrap

from PIL import Image

from ..core.report import Report
from .canvas import Canvas
from .sheet import GAP, TEXT, column, font, framed

WIDTH = 960
LEFT, RIGHT = 84, 940           # of the charts; the words for their scales stand left of them
STRIP, ERRORS, SIGMAS = 30, 190, 70    # heights
APART = 24                      # between two charts
COMPUTED, LEFT_OUT, GRID, SOFT = "#4f8fe0", "#34343c", "#303038", "#9a9aa4"
EXPECTED, MEASURED, SIGMA = "#e6b450", "#6fcf97", "#b79ae6"
FEW_MARKS = 60                  # evaluations up to which each has its dots


def plot(reports: list[tuple[str, Report]]) -> Image.Image:
    """One chart for each named report, over one another and with one scale of error."""
    if not reports:
        return framed(words(["No report is connected; connect the one that Run Report gives."]))
    errors = [error for _, report in reports for error in errors_of(report)]
    decades = (math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)) + 1e-9)) if errors else (-3, 0)
    decades = (max(decades[0], decades[1] - 6), max(decades[1], decades[0] + 1))     # an error of almost nothing may fall below the chart
    return framed(column([chart(name, report, decades) for name, report in reports]))


def errors_of(report: Report) -> list[float]:
    """All that a logarithm can show."""
    return [error for each in report.each for error in (each.predicted_error, each.hindcast_error) if error]


def chart(name: str, report: Report, decades: tuple[int, int]) -> Image.Image:
    title = textwrap.wrap(": ".join(part for part in (name, report.line()) if part), 116)
    if not report.each:
        return words([*title, *(["It has no evaluations to draw."] if report.state == "ran" else [])])
    head = 20 * len(title) + 8
    strip, errors = head, head + STRIP + GAP
    sigmas = errors + ERRORS + APART
    canvas = Canvas(WIDTH, sigmas + SIGMAS + 56)
    for number, line in enumerate(title):
        canvas.text(0, 20 * number, line)
    draw_strip(canvas, report, strip)
    draw_errors(canvas, report, errors, decades)
    draw_sigmas(canvas, report, sigmas)
    draw_numbers(canvas, report, sigmas + SIGMAS + 6)
    draw_legend(canvas, sigmas + SIGMAS + 32)
    return canvas.finished()


def words(lines: list[str]) -> Image.Image:
    canvas = Canvas(WIDTH, 20 * len(lines) + 8)
    for number, line in enumerate(lines):
        canvas.text(0, 20 * number, line)
    return canvas.finished()


def middle(report: Report, evaluation: int) -> float:
    """Where an evaluation stands, from left to right."""
    return LEFT + (evaluation + 0.5) * (RIGHT - LEFT) / len(report.each)


def draw_strip(canvas: Canvas, report: Report, top: int) -> None:
    """A cell for each evaluation, filled by the share of the blocks that ran."""
    canvas.text(LEFT - 10, top + STRIP / 2, "blocks", SOFT, "rm")
    wide = (RIGHT - LEFT) / len(report.each)
    gap = min(2.0, wide / 4)
    for number, each in enumerate(report.each):
        left = LEFT + number * wide
        canvas.box(left, top, left + wide - gap, top + STRIP, LEFT_OUT)
        ran = STRIP * each.share
        if ran >= 0.5:
            canvas.box(left, top + STRIP - ran, left + wide - gap, top + STRIP, COMPUTED)


def draw_errors(canvas: Canvas, report: Report, top: int, decades: tuple[int, int]) -> None:
    """Expected and measured error on a logarithmic scale; the expected one has a hollow dot where the skip was not taken."""
    low, high = decades
    for decade in range(low, high + 1):
        y = top + ERRORS * (high - decade) / (high - low)
        canvas.line([(LEFT, y), (RIGHT, y)], GRID)
        canvas.text(LEFT - 10, y, f"{10.0 ** (decade + 2):.10g}%", SOFT, "rm")

    def height(error: float) -> float:
        return top + ERRORS * min(max((high - math.log10(error)) / (high - low), 0.0), 1.0)

    if not errors_of(report):
        canvas.text((LEFT + RIGHT) / 2, top + ERRORS / 2, "no errors were expected or measured", SOFT, "mm")
    for kind, colour in (("predicted_error", EXPECTED), ("hindcast_error", MEASURED)):
        points = [(middle(report, number), height(error), each.computed) for number, each in enumerate(report.each) if (error := getattr(each, kind))]
        if len(points) > 1:
            canvas.line([point[:2] for point in points], colour, 1.5)
        for x, y, computed in points if len(report.each) <= FEW_MARKS or len(points) == 1 else ():
            canvas.dot(x, y, colour, hollow=computed and kind == "predicted_error")


def draw_sigmas(canvas: Canvas, report: Report, top: int) -> None:
    highest = max(each.sigma for each in report.each)
    canvas.line([(LEFT, top + SIGMAS), (RIGHT, top + SIGMAS)], GRID)
    canvas.text(LEFT - 10, top, f"{highest:.3g}", SOFT, "rm")
    canvas.text(LEFT - 10, top + SIGMAS / 2, "sigma", SOFT, "rm")
    canvas.text(LEFT - 10, top + SIGMAS, "0", SOFT, "rm")
    points = [(middle(report, number), top + SIGMAS * (1 - each.sigma / max(highest, 1e-9))) for number, each in enumerate(report.each)]
    if len(points) > 1:
        canvas.line(points, SIGMA, 1.5)
    else:
        canvas.dot(*points[0], SIGMA)


def draw_numbers(canvas: Canvas, report: Report, top: int) -> None:
    """Every evaluation's number, or every second, fifth, tenth ..., as there is room."""
    wide = (RIGHT - LEFT) / len(report.each)
    every = next((each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500) if each * wide >= 30), 1000)
    for number in range(0, len(report.each), every):
        canvas.text(middle(report, number), top, str(number + 1), SOFT, "ma", 13)


def draw_legend(canvas: Canvas, top: int) -> None:
    x = LEFT
    for colour, said in ((COMPUTED, "blocks computed"), (LEFT_OUT, "skipped"), (EXPECTED, "expected error of a skip (dot: taken, ring: not)"),
                         (MEASURED, "measured error"), (SIGMA, "sigma")):
        canvas.box(x, top + 3, x + 12, top + 15, colour)
        canvas.text(x + 18, top, said)
        x += 42 + font(TEXT).getlength(said)
