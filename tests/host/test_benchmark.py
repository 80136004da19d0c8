"""The benchmark's rows are sane: what is exact is identical, what is counted was computed, and nothing is measured twice."""
from dataclasses import asdict

import folder_paths
import pytest
import torch

import benchmarks._engine as engine_cost
from benchmarks import _campaign, _grid, _methods, _profiles, _verdict
from benchmarks._pictures import conditions
from benchmarks._rows import Rows
from pack.core.knob import knobs
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES

CELL = _grid.Cell("flux", "euler", 20, 1.0, _grid.SCORE, prompts=1)


@pytest.fixture(scope="module")
def bench():
    return _grid.Bench(CELL)


def by_name(name: str, steps: int = 20) -> list:
    return [method for method in _methods.methods(steps) if method.name == name]


def test_plain_sampling_at_full_length_is_identical(bench):
    row = bench.row(_methods.Plain(20))
    assert row["psnr_image_db"] == row["psnr_latent_db"] == 120 and row["rel_l2_max"] == 0 and row["evaluations"] == 20


def test_error_control_at_tolerance_0_is_identical(bench):
    row = bench.row(_methods.error_control(0.0, 20))
    assert row["rel_l2_each"] == [0.0, 0.0] and row["ssim"] == 1 and row["evaluations"] == row["computed_steps"] == 20


@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("name", list(_methods.HOST_NODES))
def test_the_hosts_caches_run_and_skip(name, cfg):
    row = _grid.Bench(_grid.Cell("flux", "euler", 20, cfg, prompts=1)).row(_methods.Host(name, 0.4, 20))
    assert 8 <= row["evaluations"] < 20 and row["psnr_image_db"] < 60


@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("order", _methods.MASK_ORDERS)
def test_a_mask_computes_as_many_steps_as_it_says_and_the_model_sees_no_more(cfg, alone, order):
    bench = _grid.Bench(_grid.Cell("flux", "euler", 20, cfg, prompts=1, alone=alone))
    with _grid.counted(bench.patcher) as seen:
        row = bench.row(_methods.mask(7, order, 20))
    assert row["evaluations"] == row["computed_steps"] == 7
    assert seen[0] == 7 * 2 * (1 if cfg == 1 else 2)


@pytest.mark.parametrize("steps", _grid.STEPS)
@pytest.mark.parametrize("warm_up", [1, 2, 3])
def test_a_mask_has_its_count_its_first_and_its_last_step(steps, warm_up):
    for count in range(warm_up + 1, steps + 1):
        computed = _methods.spread(steps, count, warm_up)
        assert len(set(computed)) == count and set(range(warm_up)) <= set(computed) and computed[-1] == steps - 1
        gaps = [b - a for a, b in zip(computed[warm_up - 1:], computed[warm_up:], strict=False)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("error control", "profile")])
def test_every_policy_is_measured_that_needs_no_profile_of_the_model(name):
    assert by_name(name)


@pytest.mark.parametrize("name", list(POLICIES))
def test_settings_of_the_benchmark_are_knobs_of_their_policies(name):
    known = {field.name for field in knobs(POLICIES[name])}
    if name in _methods.SETTINGS:
        series = _methods.SETTINGS[name]
        assert (len(series.strengths) >= 3 or not known) and all(known.issuperset(strength) for strength in series.strengths)
        assert not series.level.knobs and series.level.name in LEVELS     # with knobs it is told in another way, and finished rows are not found


@pytest.mark.parametrize("name, series", _methods.AT_LEVELS, ids=lambda value: value if isinstance(value, str) else value.family)
def test_policies_at_levels_with_knobs_are_rows_of_their_own_that_tell_them(name, series):
    known = {field.name for field in knobs(LEVELS[series.level.name])}
    assert {knob for knob, _ in series.level.knobs} == known and name in POLICIES
    for method in _methods.in_series(name, series, 20, quick=False):
        assert method.settings["level"] == {"name": series.level.name, **{knob: getattr(method.attached.level, knob) for knob in known}}
        assert method.attached.level == series.level.made(LEVELS)


@pytest.mark.parametrize("model", list(_grid.SUBJECTS))
def test_a_model_is_measured_at_its_own_ranges_of_blocks_alone_and_they_fit_it(model):
    planned = _grid.planned(_grid.Cell(model, "euler", 20, 1.0), False)
    at_levels = [method for method in planned if isinstance(method.settings.get("level"), dict)]
    assert 2 < len(at_levels) <= 4 and len({method.attached.level for method in at_levels}) == 2
    bench = _grid.Bench(_grid.Cell(model, "euler", 20, 1.0, prompts=1))
    for method in at_levels:
        reports = []
        bench.sample(method.applied(bench.patcher, reports.append), bench.pictures, 20)
        [report] = reports
        assert report.level == method.attached.level.name and any(0 < each.share < 1 for each in report.each), report.reason


def test_a_policy_without_settings_runs_at_its_defaults_and_says_so(monkeypatch, caplog):
    monkeypatch.delitem(_methods.SETTINGS, "interval")
    _methods.warn.cache_clear()
    (method,) = [method for method in by_name("interval") if method.settings["level"] == "automatic"]
    assert method.attached.policy == POLICIES["interval"]() and "SETTINGS" in caplog.text


def test_a_policy_that_can_skip_nothing_on_a_model_is_left_out_there(monkeypatch):
    monkeypatch.setattr(POLICIES["interval"], "refuses", lambda self, family, steps, sampler: "no" if family == "flux" else "", raising=False)
    there = {model: {method.name for method in _grid.planned(_grid.Cell(model, "euler", 20, 1.0), False)} for model in ("flux", "zimage")}
    assert "interval" not in there["flux"] and "interval" in there["zimage"] and "error control" in there["flux"]


def test_no_two_methods_of_a_cell_share_a_row():
    for steps in _grid.STEPS:
        chosen = _methods.methods(steps)
        assert len({_campaign.identity(_grid.heading(CELL, method)) for method in chosen}) == len(chosen)


def test_the_two_sets_have_no_picture_in_common():
    for subject in _grid.SUBJECTS.values():
        choose, score = (subject.pictures(which, 8) for which in (_grid.CHOOSE, _grid.SCORE))
        texts = [{row.numpy().tobytes() for row in pictures.conds[0][0][0]} for pictures in (choose, score)]
        noises = [{row.numpy().tobytes() for row in pictures.noise} for pictures in (choose, score)]
        assert not texts[0] & texts[1] and not noises[0] & noises[1] and len(noises[0]) == 16 and len(texts[0]) == 8, subject.name


def test_a_picture_sampled_by_itself_is_that_of_the_batch():
    batch, alone = (_grid.Bench(_grid.Cell("flux", "euler", 20, 1.0, prompts=1, alone=alone)) for alone in (False, True))
    torch.testing.assert_close(batch.full, alone.full, rtol=1e-4, atol=1e-4)


def test_a_model_without_pictures_is_measured_by_its_latents():
    row = _grid.Bench(_grid.Cell("wan", "euler", 20, 1.0, prompts=1)).row(_methods.Plain(12))
    assert row["psnr_image_db"] is None and row["ssim"] is None and 0 < row["rel_l2_median"] and row["evaluations"] == 12


@pytest.fixture
def few(monkeypatch):
    """A grid of one cell and four methods."""
    chosen = [_methods.Plain(20), _methods.Plain(8), _methods.error_control(0.03, 20), _methods.mask(8, 1, 20)]
    monkeypatch.setattr(_methods, "methods", lambda steps, quick=False: chosen)
    return [_grid.Cell(**asdict(CELL) | {"set": which}) for which in (_grid.CHOOSE, _grid.SCORE)]


def measured(monkeypatch) -> list:
    """The methods that are really run, from here on."""
    run, row = [], _grid.Bench.row
    monkeypatch.setattr(_grid.Bench, "row", lambda self, method: (run.append(method.name), row(self, method))[1])
    return run


def test_a_stopped_table_goes_on_and_a_new_engine_measures_its_own_rows_alone(few, monkeypatch, tmp_path):
    rows, run = Rows(tmp_path / "step-cache.json"), measured(monkeypatch)
    _campaign.fill(rows, few, only=["plain"])
    assert run == ["plain"] * 4
    run.clear()
    _campaign.fill(Rows(rows.path), few)
    assert sorted(run) == ["error control", "error control", "mask", "mask"]
    run.clear()
    _campaign.fill(Rows(rows.path), few)
    assert run == []
    monkeypatch.setattr(_grid, "engine", lambda method: "another")
    assert _campaign.stale_rows(Rows(rows.path)) == 4
    _campaign.fill(Rows(rows.path), few)
    assert sorted(run) == ["error control", "error control", "mask", "mask"] and _campaign.stale_rows(Rows(rows.path)) == 0


def test_an_interrupt_keeps_the_rows_that_are_there(few, monkeypatch, tmp_path):
    rows, row = Rows(tmp_path / "step-cache.json"), _grid.Bench.row

    def interrupted(self, method):
        if method.name != "plain":
            raise KeyboardInterrupt
        return row(self, method)

    monkeypatch.setattr(_grid.Bench, "row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _campaign.fill(rows, few)
    assert [made["method"] for made in Rows(rows.path)] == ["plain", "plain"]


def test_the_files_are_made_from_the_rows_and_the_verdict_reads_them(few, tmp_path):
    rows = Rows(tmp_path / "step-cache.json")
    _campaign.fill(rows, few)
    findings = _campaign.publish(rows, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "tiny_flux_trained128 (3.4 M parameters)" in (tmp_path / "step-cache.md").read_text()
    assert {finding.promise[0] for finding in findings} == {"1", "2", "3"} and any(finding.kept is not None for finding in findings)
    assert findings == _verdict.verdict(Rows(rows.path))


def test_the_engine_hash_sees_code_and_neither_comments_nor_sentences(monkeypatch, tmp_path):
    (tmp_path / "core").mkdir()
    file = tmp_path / "core" / "a.py"
    monkeypatch.setattr(_grid, "ROOT", tmp_path)
    found = []
    for text in ('x = "one two"\n', '"""Told."""\nx = "one two"  # why\n', 'x = "one"\n', 'x = "this is a sentence"\n', 'x = f"and {so} is this"\n'):
        file.write_text(text)
        found.append(_grid.engine.__wrapped__("interval"))
    assert found[0] == found[1] != found[2] != found[3] == found[4]


def test_what_error_control_alone_asks_makes_no_row_of_another_method_stale(monkeypatch, tmp_path):
    (folder := tmp_path / "core" / "stepcache").mkdir(parents=True)
    monkeypatch.setattr(_grid, "ROOT", tmp_path)
    for file, by_both in (("error_budget.py", False), ("cache.py", True)):
        found = []
        for text in ("x = 1\n", "x = 2\n"):
            (folder / file).write_text(text)
            found.append({method: _grid.engine.__wrapped__(method) for method in ("interval", "error control")})
        changed = {method for method in found[0] if found[0][method] != found[1][method]}
        assert changed == ({"interval", "error control"} if by_both else {"error control"})
    assert all((_grid.Path(_methods.__file__).parent.parent / file).is_file() for file in _grid.ASKED_BY)


@pytest.mark.parametrize("arguments, told", [
    (["--cells", "flux/euler/29/*"], "no cell of the grid is called flux/euler/29"), (["--models", "sdxl"], ""), (["--peers", "--engine"], ""),
])
def test_what_does_not_exist_is_refused(monkeypatch, capsys, arguments, told):
    from benchmarks import step_cache

    monkeypatch.setattr("sys.argv", ["step-cache", *arguments])
    with pytest.raises(SystemExit) as ended:
        step_cache.main()
    assert told in str(ended.value) and (told or "error" in capsys.readouterr().err)


# what the engine costs -------------------------------------------------------------------------------------------------
def test_the_engines_cost_is_measured_at_every_level_of_flux():
    sizes = {"hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 3, "context_in_dim": 64, "vec_in_dim": 64}
    patcher = engine_cost.flux_of(sizes, torch.device("cpu"), torch.float32)
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    scene = engine_cost.Scene("small", patcher, conditions(["red heart"]), noise, 10, 10, engine_cost.time.thread_time)
    rows = {row["level"]: row for row in engine_cost.rows(scene)}
    assert set(rows) == {name for name, level in LEVELS.items() if getattr(level, "serves", "unet") != "unet"}, "those of UNets are measured elsewhere"
    for row in rows.values():
        skipped = 4 - (row["level"] == "front or rear range")     # the step where its phase changes is computed
        assert row["engine_ms"] > 0 < row["evaluation_ms"] and row["computed_evaluations"] == 10 and row["skipped_evaluations"] == skipped, row
        assert row["skip_engine_ms"] > 0 and row["cache_mib"] > 0
    assert rows["guided output"]["skip_block_share"] == rows["model output"]["skip_block_share"] == 0
    assert rows["block range"]["skip_block_share"] == 0.25


def test_levels_of_unets_are_measured_on_a_unet_and_no_level_on_a_model_where_another_takes_its_place():
    scene = engine_cost.unet_scene(10, steps=10, size=8)
    rows = {row["level"]: row for row in engine_cost.rows(scene)}
    assert set(rows) == {name for name, level in LEVELS.items() if getattr(level, "serves", None) == "unet"} and len(rows) > 1
    for row in rows.values():
        assert row["model"] == "seeded SDXL" and 0 < row["skip_block_share"] < 1 and row["skipped_evaluations"] == 4
    with pytest.raises(ValueError, match="level 'block range' fell back to 'guided output' on seeded SDXL"):
        engine_cost.measure(scene, LEVELS["block range"]())


def test_without_a_gpu_its_measurement_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        engine_cost.on_gpu()


# profiles --------------------------------------------------------------------------------------------------------------
def test_a_profile_is_made_of_one_set_and_scored_at_its_count_on_the_other(monkeypatch):
    monkeypatch.setattr(_profiles, "REFINE", 0)
    before = folder_paths.get_user_directory()
    try:
        cell = _grid.Cell("flux", "euler", 20, 1.0, prompts=1, profiled=True)
        methods = _grid.planned(cell, False)
        assert [method.settings["computed"] for method in methods] == [6, 8, 10]
        row = _grid.Bench(cell).row(methods[1])
        assert row["evaluations"] == 8 and row["psnr_image_db"] > 30 and folder_paths.get_user_directory() != before
    finally:
        folder_paths.set_user_directory(before)


def test_a_profile_is_compared_with_error_control_at_as_many_evaluations():
    def rows(method: str, decibel: float, *counts, **settings):
        return [{"model": "m", "sampler": "euler", "steps": 20, "cfg": 1.0, "set": which, "alone": False, "method": method, "evaluations": float(count),
                 "settings": settings | {"n": count}, "psnr_image_db": decibel + count, "psnr_image_each": [decibel + count] * 4, "seeds": 2}
                for count in counts for which in ("choose", "score")]

    grid = rows("error control", 30.0, 8, 10)
    for gain, kept in ((1.0, True), (-1.0, False)):
        [finding] = _profiles.verdict([row for row in rows("profile", 30.0 + gain, 8, 10) if row["set"] == "score"], grid)
        assert finding.kept is kept and f"{gain:+.2f} dB" in finding.numbers and len(finding.more) == 2
    [finding] = _profiles.verdict([row for row in rows("profile", 30.0, 5) if row["set"] == "score"], grid)
    assert finding.kept is None and _profiles.verdict([], grid)[0].kept is None


@pytest.fixture
def aged(tmp_path, monkeypatch):
    """A table of two masks and two intervals, in two cells, that an older core/ made; and the cell that is measured anew."""
    chosen = [_methods.mask(7, 1, 20), _methods.mask(9, 1, 20), *by_name("interval")[:2]]
    monkeypatch.setattr(_grid, "planned", lambda cell, quick: chosen)
    rows, cell = Rows(tmp_path / "rows.json"), _grid.Cell("flux", "euler", 20, 1.0, _grid.CHOOSE, prompts=1)
    for row in _grid.measured(cell, chosen):
        for cfg in (1.0, 3.5):
            rows.put(row | {"cfg": cfg, "made_by": "core of yesterday"})
    return rows, cell


def test_rows_hold_after_a_change_of_the_core_where_one_of_every_curve_comes_out_the_same(aged):
    rows, cell = aged
    assert _campaign.stale_rows(rows) == len(rows) == 8
    assert _campaign.recheck(rows, [cell]) == [] and _campaign.stale_rows(rows) == 0
    assert _campaign.stale_rows(Rows(rows.path)) == 0


@pytest.mark.parametrize("change", [{"evaluations": 8.0}, {"psnr_image_each": [1.0, 1.0]}])
def test_rows_of_a_method_that_comes_out_otherwise_stay_old_and_those_of_another_hold(aged, change):
    rows, cell = aged
    for row in list(rows):
        if row["method"] == "mask":
            rows.put(row | change)
    (moved,) = _campaign.recheck(rows, [cell])
    assert "mask" in moved
    assert {row["method"] for row in rows if row["made_by"] == "core of yesterday"} == {"mask"}
