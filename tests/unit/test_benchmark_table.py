"""The step cache's table: choosing and scoring, pairing, promises, and the files it is kept in. Rows are made up here."""
import json
import math
import random
import sys

import pytest

from benchmarks import _meter, _pareto, _table, _verdict, _workers
from benchmarks._curves import between, counts, curves, interval, paired
from benchmarks._rows import Rows, identity


def row(method="error control", evaluations=12.0, decibel=50.0, which="score", *, settings=None, steps=28, cfg=1.0, far=0.03, alone=False, **more):
    """A row with four pictures, whose dB lie about the mean."""
    settings = settings or ({"tolerance": 0.03} if method == "error control" else {"n": evaluations})
    return {
        "model": "m", "sampler": "euler", "steps": steps, "cfg": cfg, "set": which, "alone": alone, "method": method, "settings": settings, "prompts": 2,
        "seeds": 2, "made_by": "format 1, model x", "evaluations": evaluations, "computed_steps": evaluations, "psnr_latent_db": decibel + 5,
        "psnr_image_db": decibel, "ssim": 0.9, "rel_l2_median": far, "rel_l2_max": far, "psnr_image_each": [decibel - 2, decibel - 1, decibel + 1, decibel + 2],
        "rel_l2_each": [far] * 4, "wall_ratio": 0.5, "evaluations_each": [evaluations] * 4, **more,
    }


def both(*args, **kwargs) -> list[dict]:
    return [row(*args, which=which, **kwargs) for which in ("choose", "score")]


def line(method: str, decibel_at: dict[float, float], **more) -> list[dict]:
    return [made for evaluations, decibel in decibel_at.items()
            for made in both(method, evaluations, decibel, settings={"tolerance": evaluations} if method == "error control" else None, **more)]


def by_promise(rows) -> dict[str, _verdict.Finding]:
    return {finding.promise: finding for finding in _verdict.verdict(rows)}


def finding(rows, *words: str) -> _verdict.Finding:
    (found,) = [finding for promise, finding in by_promise(rows).items() if all(word in promise for word in words)]
    return found


# curves ----------------------------------------------------------------------------------------------------------------
def test_between_two_settings_decibel_is_linear_in_the_logarithm_of_evaluations():
    assert between([(8, [40.0, 20.0]), (16, [50.0, 40.0])], 8 * math.sqrt(2)) == pytest.approx([45.0, 30.0])


def test_beyond_its_dearest_setting_a_curve_stays_and_below_its_cheapest_it_says_nothing():
    points = [(8, [40.0]), (16, [50.0])]
    assert between(points, 20) == [50.0] and between(points, 16) == [50.0] and between(points, 8) == [40.0]
    assert between(points, 7.9) is None and between([], 8) is None


def test_a_setting_is_chosen_on_one_set_and_scored_on_the_other():
    """Here the better setting of the first set is the worse one of the second, and the score shows it."""
    rows = [row("a", 10, 50, "choose", settings={"n": 1}), row("a", 10, 40, "choose", settings={"n": 2}),
            row("a", 10, 30, "score", settings={"n": 1}), row("a", 10, 60, "score", settings={"n": 2})]
    (curve,) = curves(rows)["m", "euler", 28, 1.0]
    assert sum(curve.at(10, "score")) / 4 == pytest.approx(30)


def test_settings_with_other_predictors_are_other_curves():
    rows = [made for order in (1, 2) for made in both("a", settings={"n": 1, "predictor": {"name": "p", "order": order}, "level": "l"})]
    assert sorted(curve.label for curve in curves(rows)["m", "euler", 28, 1.0]) == ["a p 1", "a p 2"]


def test_levels_with_other_knobs_are_other_curves():
    levels = ("l", {"name": "l", "k": 0.5}, {"name": "l", "k": 0.7}, {"name": "m", "k": 0.5})
    rows = [made for level in levels for n in (1, 2) for made in both("a", settings={"n": n, "predictor": {"name": "p"}, "level": level})]
    found = curves(rows)["m", "euler", 28, 1.0]
    assert sorted(curve.label for curve in found) == ["a p", "a p at l 0.5", "a p at l 0.7", "a p at m 0.5"]
    assert all(len(curve.points["score"]) == 2 for curve in found)


def test_a_setting_that_costs_more_and_is_worth_less_is_no_part_of_a_curve():
    (curve,) = curves(line("a", {8: 40, 10: 30, 12: 50}))["m", "euler", 28, 1.0]
    assert [json.loads(settings)["n"] for settings in curve.kept()] == [8, 12]


def test_the_seeds_of_a_prompt_count_as_one_draw():
    """Two prompts that differ by 1 and by 3 dB: mean 2, interval by Student with one degree of freedom."""
    difference = paired([1.0, 1.0, 3.0, 3.0], [0.0] * 4, seeds=2)
    assert difference.mean == 2 and difference.half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))


@pytest.mark.parametrize("many", [2, 8, 16, 200])
def test_ninety_five_of_a_hundred_intervals_hold_the_truth(many):
    draw = random.Random(many)
    held = sum(abs(found.mean) <= found.half for found in (interval([draw.gauss(0, 1) for _ in range(many)]) for _ in range(1000)))
    assert 0.92 < held / 1000 < 0.98


def test_counts_are_the_whole_numbers_between_two_shares():
    assert list(counts(20)) == [5, 6, 7, 8, 9, 10, 11, 12] and list(counts(50, 0.28, 0.45)) == list(range(14, 23))


# promises --------------------------------------------------------------------------------------------------------------
GOOD = line("error control", {7: 48, 17: 62}) + line("plain", {7: 30, 17: 40}) + line("interval", {7: 38, 17: 50}) + line("mask", {7: 44, 17: 55})


def test_a_good_table_keeps_every_promise_that_it_speaks_of():
    for text in ("1 average", "1 no cell", "cfg 1, 28 to 45 % of the steps, against interval", "against plain", "cfg 1, 28 to 45 % of the steps, against mask"):
        assert finding(GOOD, text).kept is True, text
    assert finding(GOOD, "cfg 3.5", "interval").kept is None


@pytest.mark.parametrize("rival, kept", [({7: 48, 17: 61.9}, True), ({7: 48.5, 17: 62.5}, False)])
def test_error_control_must_not_lie_below_the_best_policy(rival, kept):
    found = finding(GOOD + line("better", rival), "1 average")
    assert found.kept is kept
    assert ("better" in str(found)) is not kept


def test_a_mask_is_no_policy_for_the_first_promise():
    assert finding([made for made in GOOD if made["method"] != "mask"] + line("mask", {7: 90, 17: 95}), "1 average").kept is True


def test_a_cell_is_more_than_a_decibel_below_only_with_its_whole_interval():
    wide = [made | {"psnr_image_each": [60.0, 60.0, 68.0, 68.0], "psnr_image_db": 64.0} for made in both("far", 12, 64)]
    far, sure = finding(GOOD + wide, "1 no cell"), finding(GOOD + line("far", {12: 66}), "1 no cell")
    assert far.kept is True and "0 of" in far.numbers and far.more
    assert sure.kept is False


@pytest.mark.parametrize("rival, least", [("interval", 5.0), ("plain", 11.0), ("mask", 1.5)])
def test_the_margins_at_cfg_1_are_as_promised(rival, least):
    rest = [made for made in GOOD if made["method"] != rival]
    for short, kept in ((0.1, False), (-0.1, True)):
        theirs = line(rival, {7: 48 - least + short, 17: 62 - least + short})
        assert finding(rest + theirs, "cfg 1, 28", f"against {rival}").kept is kept


@pytest.mark.parametrize("far, spoilt", [(0.03, None), (0.011, "median"), (0.05, "median"), (0.012, None), (0.0481, "median"), (0.0479, None)])
def test_the_median_error_lies_within_its_bounds_around_the_tolerance(far, spoilt):
    rows = both(far=far)
    assert finding(rows, "3 median").kept is (spoilt is None)


def test_one_picture_beyond_three_tolerances_breaks_the_promise():
    rows = both() + both(settings={"tolerance": 0.02}, far=0.02)
    assert finding(rows, "3 no picture").kept is True
    rows[1]["rel_l2_each"] = [0.03, 0.03, 0.03, 0.0901]
    found = finding(rows, "3 no picture")
    assert found.kept is False and "tolerance 0.03" in str(found) and "tolerance 0.02" not in str(found)


def test_a_tolerance_that_skips_no_more_than_a_smaller_one_is_told_of():
    rows = both(far=0.03) + both(settings={"tolerance": 0.3}, far=0.03)
    found = finding(rows, "3 median")
    assert found.kept is False and "1 of those outside" in found.numbers and any("tolerance 0.3" in line and "no more skips" in line for line in found.more)


def test_a_run_without_a_skip_says_nothing_of_its_tolerance():
    assert finding(both(evaluations=28.0, far=0.0), "3 one tolerance").kept is None


def test_the_peers_table_is_read_between_its_tolerances():
    rows = [row(evaluations=n, decibel=d, alone=True, settings={"tolerance": n}) for n, d in ((9, 47.5), (10, 49.5))]
    (found,) = [finding for finding in _verdict.peers(rows) if finding.promise.startswith("28 steps") and "one at a time" in finding.promise]
    assert found.kept is True and 48.4 < float(found.numbers.split()[0]) < 48.7
    assert all(finding.kept is None for finding in _verdict.peers(rows) if finding is not found and finding != found)


@pytest.mark.parametrize("engine, skip, kept", [(0.019, 0.16, [True, True]), (0.021, 0.16, [False, True]), (0.019, 0.17, [True, False])])
def test_the_engine_may_cost_two_percent_and_a_skip_five_more_than_its_blocks(engine, skip, kept):
    measured = {"level": "l", "engine_share": engine, "engine_ms": 1.0, "evaluation_ms": 50.0, "skip_block_share": 0.1111, "skip_time_share": skip}
    assert [finding.kept for finding in _verdict.engine([measured])] == kept


# files -----------------------------------------------------------------------------------------------------------------
def test_rows_survive_on_disk_and_a_new_one_takes_the_place_of_the_old(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    rows.add(row(decibel=50))
    rows.add(row("plain"))
    rows.add(row(decibel=51))
    rows.save()
    assert [made["psnr_image_db"] for made in Rows(rows.path)] == [51, 50.0] and json.loads(rows.path.read_text())


def test_a_row_made_by_another_engine_is_not_fresh(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    rows.add(row())
    assert rows.fresh(row()) and not rows.fresh(row() | {"made_by": "format 1, model x, core y"}) and not rows.fresh(row(steps=20))


def test_rows_that_left_the_plan_go_and_those_of_other_cells_stay(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    wanted, other, gone = row(), row(steps=20), row(settings={"tolerance": 0.9})
    for made in (wanted, other, gone):
        rows.add(made)
    rows.keep_only({"steps": 28}, {identity(wanted)})
    assert list(rows) == [wanted, other]


def test_the_markdown_has_every_cell_and_every_row():
    text = _table.markdown(GOOD + [row(alone=True), row("host EasyCache", settings={"reuse_threshold": 0.2})], _verdict.verdict(GOOD), "m (1 M)")
    for part in ("m, euler, 28 steps, cfg 1", "| error control | ", "reuse_threshold 0.2", "PASS", "One picture at a time", "12.0 ± 0.0"):
        assert part in text, part
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1, block


def test_the_plot_has_a_panel_per_cell_with_error_control_in_it():
    sheet = _pareto.plot(GOOD + line("error control", {7: 48, 17: 62}, steps=20))
    red = tuple(int(_pareto.COLOURS["error control"][i:i + 2], 16) for i in (1, 3, 5))
    panels = [sheet.crop((x, 60, x + _pareto.PANEL[0], 60 + _pareto.PANEL[1])) for x in (0, _pareto.PANEL[0])]
    assert all(red in {colour for _, colour in panel.getcolors(1 << 20)} for panel in panels)


# processes -------------------------------------------------------------------------------------------------------------
ECHO = """
import sys, json
for line in sys.stdin:
    for i in range(2):
        print(json.dumps([json.loads(line), i]), flush=True)
    print("null", flush=True)
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_comes_back_row_by_row(monkeypatch, processes):
    monkeypatch.setattr(_workers, "COMMAND", [sys.executable, "-c", ECHO])
    assert sorted(_workers.spread(list(range(5)), processes)) == [[task, i] for task in range(5) for i in range(2)]


def test_a_worker_that_dies_is_told_of(monkeypatch):
    monkeypatch.setattr(_workers, "COMMAND", [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"])
    with pytest.raises(_workers.Broken, match="code 3"):
        list(_workers.spread([1, 2], 1))


def test_workers_end_with_the_one_who_asked(monkeypatch):
    monkeypatch.setattr(_workers, "COMMAND", [sys.executable, "-c", ECHO])
    started = []
    monkeypatch.setattr(_workers.Worker, "__init__", lambda self, *args, make=_workers.Worker.__init__: (make(self, *args), started.append(self.process))[0])
    rows = _workers.spread([1, 2, 3], 2)
    next(rows)
    rows.close()
    assert started and all(process.poll() is not None for process in started)


def test_progress_tells_how_much_time_is_left():
    progress = _workers.Progress(total=10, rows=2)
    progress.done, progress.count = 2.5, 1
    assert "1 of 2 rows, 00:00:30 left" in progress.line("x", progress.begun + 10)


# the meter -------------------------------------------------------------------------------------------------------------
def test_time_goes_to_the_owner_of_the_frame_that_runs(tmp_path, monkeypatch):
    """A clock that only the code under test moves: the engine 1 + 4, the host 2, a library that the engine calls 8."""
    passed: list[int] = []
    monkeypatch.setattr(_meter, "perf_counter", lambda: sum(passed))
    source = {
        "engine": "def work(passes, host, library):\n    passes(1)\n    host(passes)\n    library(passes)\n    passes(4)\n",
        "host": "def call(passes):\n    passes(2)\n", "library": "def call(passes):\n    passes(8)\n",
    }
    spaces: dict[str, dict] = {}
    for name, text in source.items():
        exec(compile(text, str(tmp_path / name / "file.py"), "exec"), spaces.setdefault(name, {}))     # noqa: S102 - the owner is told by the file
    waited = []
    with _meter.Meter(tmp_path / "host", lambda: waited.append(1), (tmp_path / "engine",)) as meter:
        spaces["engine"]["work"](passed.append, spaces["host"]["call"], spaces["library"]["call"])
    assert sys.getprofile() is None
    assert meter.spent == {_meter.ENGINE: 13, _meter.HOST: 2}
    assert len(waited) == 4     # into the engine, out to the host, back, and out at the end


def test_what_a_frame_leaves_behind_is_freed_on_its_owners_account(tmp_path, monkeypatch):
    passed: list[int] = []
    monkeypatch.setattr(_meter, "perf_counter", lambda: sum(passed))

    source = {"engine": "def work(passes, host, left):\n    host(left)\n    passes(1)\n", "host": "def call(left):\n    mine = left()\n",
              "library": "class Left:\n    def __del__(self):\n        passes(16)\n"}
    spaces: dict[str, dict] = {"library": {"passes": passed.append}}
    for name, text in source.items():
        exec(compile(text, str(tmp_path / name / "file.py"), "exec"), spaces.setdefault(name, {}))     # noqa: S102 - the owner is told by the file
    with _meter.Meter(tmp_path / "host", engine=(tmp_path / "engine",)) as meter:
        spaces["engine"]["work"](passed.append, spaces["host"]["call"], spaces["library"]["Left"])
    assert meter.spent == {_meter.ENGINE: 1, _meter.HOST: 16}
