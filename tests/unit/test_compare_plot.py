"""The plot of a run: every report can be drawn, and what is drawn is what the report says."""
import numpy
import pytest
from PIL import Image

from pack.compare.plot import APART, COMPUTED, ERRORS, LEFT, MEASURED, RIGHT, STRIP, WIDTH, plot
from pack.compare.sheet import GAP
from pack.compare.words import described
from pack.core.report import Evaluation, Report


def run(evaluations: int, errors: bool = True, **more) -> Report:
    each = []
    for number in range(evaluations):
        computed = number % 2 == 0
        told = (0.02, 0.03 if computed else None) if errors and number > 1 else (None, None)
        each.append(Evaluation(1 - number / evaluations, computed, 1.0 if computed else 0.1, *told, why="first steps" if number < 2 else ""))
    return Report(model="flux", sampler="euler", steps=evaluations, policy="interval", level="block range", each=each, **more)


HOSTILE = {
    "none at all": [],
    "no evaluations": [("A", Report())],
    "off": [("A", Report(state="off", reason="the run has 4 steps; " * 20))],
    "one": [("A", run(1))],
    "two hundred": [("A", run(200))],
    "no errors": [("A", run(20, errors=False))],
    "errors of nothing": [("A", Report(each=[Evaluation(1.0, True, 1.0, 0.0, 0.0)] * 3))],
    "errors beyond all": [("A", Report(each=[Evaluation(1.0, True, 1.0, 1e300, 1e-300), Evaluation(1.0, True, 1.0, float("inf"), float("nan"))]))],
    "sigmas of nothing": [("A", Report(each=[Evaluation(0.0, True, 1.0)] * 3))],
    "words beyond latin": [("步骤 é", Report(state="off", reason="节点"))],
    "two": [("A", run(20)), ("B", Report(state="off", reason="why not"))],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_report_can_be_drawn_with_words_in_it(name):
    picture = plot(HOSTILE[name])
    assert picture.width == WIDTH + 2 * GAP and picture.height < 2000 and picture.mode == "RGB"
    assert len(numpy.unique(numpy.asarray(picture).reshape(-1, 3), axis=0)) > 3, "nothing is on the paper"


def pixels(picture: Image.Image, colour: str) -> numpy.ndarray:
    """Where a colour stands, [N, (y, x)], in the coordinates of the first chart."""
    wanted = [int(colour[place:place + 2], 16) for place in (1, 3, 5)]
    return numpy.argwhere((numpy.asarray(picture) == wanted).all(-1)) - GAP


HEAD = 28   # one line of title, which a short reason keeps it to


@pytest.mark.parametrize("count", [1, 9, 50, 200])
def test_the_strip_has_a_full_cell_for_each_computed_evaluation(count):
    y = HEAD + 2    # near the top, where a cell that ran a tenth of its blocks is empty
    drawn = {x for row, x in pixels(plot([("A", run(count, errors=False, reason="short"))]), COMPUTED) if row == y}
    cells = {int((x + 0.5 - LEFT) / ((RIGHT - LEFT) / count)) for x in drawn}
    assert cells == set(range(0, count, 2))


def test_a_cell_is_filled_by_the_share_of_blocks_that_ran():
    report = Report(each=[Evaluation(1.0, True, 1.0), Evaluation(0.5, False, 0.5), Evaluation(0.2, False, 0.0)])
    found = pixels(plot([("A", report)]), COMPUTED)
    wide = (RIGHT - LEFT) / 3
    heights = [len({y for y, x in found if abs(x - (LEFT + (number + 0.5) * wide)) < 5 and y < HEAD + STRIP + 1}) for number in range(3)]
    assert heights == [STRIP, STRIP // 2, 0]


def test_errors_stand_on_a_logarithmic_scale_that_two_reports_share():
    def measured(*errors):
        return Report(each=[Evaluation(1.0, True, 1.0, None, error) for error in errors], reason="short")

    def heights(reports):
        found = pixels(plot(reports), MEASURED)
        found = found[(found[:, 0] > HEAD + STRIP) & (found[:, 0] < HEAD + STRIP + GAP + ERRORS + APART / 2)]
        return [numpy.mean([y for y, x in found if abs(x - (LEFT + (number + 0.5) * (RIGHT - LEFT) / 3)) <= 2]) for number in range(3)]

    high, middle, low = heights([("A", measured(0.1, 0.01, 0.001))])
    assert low - middle == pytest.approx(middle - high, abs=1.5) and low - middle > ERRORS / 4
    wider = heights([("A", measured(0.1, 0.01, 0.001)), ("B", measured(1.0, 0.1, 0.00001))])
    assert wider[2] - wider[1] == pytest.approx(wider[1] - wider[0], abs=1.5) and wider[2] - wider[1] < 0.7 * (low - middle)


def test_a_report_in_words_has_a_line_for_each_evaluation_and_the_settings():
    report = run(6, settings={"preset": "custom", "policy": {"name": "interval", "interval": 2}, "level": {"name": "automatic"}}, cache_bytes=3 << 20)
    text = described(report)
    head, setting, _, _, *rows = text.splitlines()
    assert head == report.line() and "flux, euler, 6 steps" in setting and "policy interval (interval 2)" in setting
    assert "level block range" in setting and "automatic" not in setting and "3.00 MiB" in setting
    assert len(rows) == 6 and rows[0].split() == ["1", "1.0000", "computed", "100%", "first", "steps"]
    assert rows[3].split() == ["4", "0.5000", "skipped", "10%", "2.00%"] and rows[4].split() == ["5", "0.3333", "computed", "100%", "2.00%", "3.00%"]


def test_a_run_that_was_off_is_told_by_its_reason_alone():
    assert described(Report(state="off", reason="why not")) == "Step Cache is off: why not"
