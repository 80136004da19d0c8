"""What a skip runs, what it costs, and where it may not be."""
import math

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import (
    CONCRETE,
    EVERYTHING,
    NAMES,
    ONE_PHASE,
    QUICK,
    STEPS,
    always,
    attached,
    blocks,
    counted,
    decisions,
    model,
    run,
    sample,
    sample_by,
    schedule,
)


@pytest.mark.parametrize("first", [1, 2, 3, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_runs_the_first_blocks_only(name, first):
    per_call = []

    def callback(step, denoised, x, total):
        per_call.append(dict(calls))
        calls.clear()

    with counted(blocks(name)) as calls:
        _, report = run(model(name), name, cached={"level": "block range", "level_knobs": {"first_blocks": first}}, cfg=1.0, callback=callback)
    total = len(blocks(name))
    some, every = {n: 1 for n in range(min(first, total - 1))}, {n: 1 for n in range(total)}
    assert per_call == [every if computed else some for computed in decisions(report)]
    assert decisions(report).count(False) >= 3


@pytest.mark.parametrize("name", [name for name in NAMES if always(name)])
def test_blocks_that_run_on_every_step_do(name):
    with counted(always(name)) as calls:
        run(model(name), name, cached={"level": "block range"}, cfg=1.0)
    assert set(calls) == set(range(len(always(name)))) and set(calls.values()) == {STEPS}


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_evaluations_are_the_blocks_that_ran_over_those_of_a_full_evaluation(name, level, split, monkeypatch):
    patched = attached(model(name), level=level, reports=(reports := []))
    monkeypatch.setattr(type(patched), "get_free_memory", lambda self, device: 0 if split else 1 << 50)
    every = [*blocks(name), *always(name)]
    with counted(every) as calls:
        sample(patched, name)
    (report,) = reports
    assert report.evaluations == pytest.approx(calls.total() / len(every) / (2 if split else 1))
    record = report.as_dict()
    assert record["baseline_evaluations"] == STEPS == record["computed_steps"] + record["skipped_steps"]
    assert record["skipped_steps"] == 4


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_the_first_and_the_last_step_are_always_computed_and_skips_in_a_row_are_bounded(name, level):
    _, report = run(model(name), name, cached={"policy": EVERYTHING, "level": level, "level_knobs": ONE_PHASE.get(level), "max_consecutive_skips": 3})
    assert decisions(report) == [True, False, False, False] * 2 + [True, False, False, True]


@pytest.mark.parametrize(("steps", "most"), [(12, 4), (28, 4), (36, 6), (50, 8)])
def test_skips_in_a_row_go_by_the_length_of_the_run_where_nobody_bounds_them(steps, most):
    _, report = run(model("flux"), "flux", steps=steps, cfg=1.0, cached={"policy": EVERYTHING, "level": "guided output", "max_consecutive_skips": 0})
    rows = "".join("." if computed else "s" for computed in decisions(report)).split(".")
    assert max(map(len, rows)) == most == report.settings["max_consecutive_skips"]


@pytest.mark.parametrize("level", CONCRETE)
def test_start_and_end_percent_keep_the_skips_inside(level):
    space = model("flux").get_model_object("model_sampling")
    start, end = space.percent_to_sigma(0.3), space.percent_to_sigma(0.8)
    limits = {"start_percent": 0.3, "end_percent": 0.8, "max_consecutive_skips": 50}
    _, report = run(model("flux"), "flux", cached={"policy": EVERYTHING, "level": level, "level_knobs": ONE_PHASE.get(level), **limits})
    assert decisions(report) == [not end <= evaluation.sigma <= start for evaluation in report.each]
    assert 3 <= decisions(report).count(False) <= 8


def restarts(denoise, x, sigmas):
    """Euler that goes up to the fifth sigma again from the ninth, as restart sampling does."""
    for now, following in [*zip(sigmas[:9], sigmas[1:9], strict=False), *zip(sigmas[4:], sigmas[5:], strict=False)]:
        d = (x - denoise(x, now)) / now
        x = x + (following - now) * d
    return x


@pytest.mark.parametrize("level", CONCRETE)
def test_a_rising_sigma_forgets_what_was_known(level):
    reports: list = []
    seen: list = []
    patched = attached(model("flux"), policy=EVERYTHING, level=level, level_knobs=ONE_PHASE.get(level), predictor="divided differences", reports=reports)

    def watched(denoise, x, sigmas):
        return restarts(lambda x, sigma: seen.append(sigma) or denoise(x, sigma), x, sigmas)

    latent = sample_by(watched, patched, "flux")
    assert torch.isfinite(latent).all()
    rise = next(n for n in range(1, len(seen)) if seen[n] > seen[n - 1])
    assert decisions(reports[0])[rise: rise + 3] == [True, True, False], "order 1 needs two computed steps after the rise"
    assert len(schedule("flux")) - 1 == STEPS


@pytest.mark.parametrize("name", QUICK)
def test_a_latent_with_values_that_are_no_numbers_is_told_as_such_and_not_by_an_error(name):
    calls = iter(range(100))

    def overflow(executor, *args, **kwargs):
        return executor(*args, **kwargs) * (math.nan if next(calls) == broken else 1.0)

    lines = {}
    for broken in (11, None):
        spoilt, calls = model(name).clone(), iter(range(100))
        spoilt.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.overflow", overflow)
        latent, report = run(spoilt, name, cached={"policy": "interval", "predictor": "automatic"})
        assert not all(decisions(report)) and bool(latent.isfinite().all()) == (broken is None) == (report.estimated_error is not None)
        lines[broken] = report.line()
    assert "the latent has values that are no numbers" in lines[11] and "estimated error" not in lines[11] and "no numbers" not in lines[None]
