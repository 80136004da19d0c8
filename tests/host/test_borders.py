"""Where a run may not skip, and what nothing is predicted across: the ends of a run, masks, shapes, hooks, tokens, another expert."""
import copy
from dataclasses import replace

import comfy.context_windows
import comfy.hooks
import comfy.sample
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_flux import FluxKVCache
from harness import (
    CONCRETE,
    EVERY_SECOND,
    EVERYTHING,
    OF_BLOCKS,
    ONE_PHASE,
    QUICK,
    STEPS,
    At,
    attached,
    decisions,
    family,
    model,
    plain,
    relative,
    replay_errors,
    run,
    sample,
    sample_by,
    spied,
    whys,
    windowed,
)

from pack.core import families
from pack.core.attach import RUN
from pack.core.conditions import acting, move
from testbed import tiny

HERE = pytest.mark.parametrize("level", CONCRETE)
EACH = pytest.mark.parametrize("name", QUICK[:2])      # pictures


# the ends of a run -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("warm_up", [1, 2, 5])
@pytest.mark.parametrize("last", [1, 2, 4])
@HERE
@EACH
def test_as_many_evaluations_as_set_are_computed_at_either_end(name, level, warm_up, last):
    _, report = run(model(name), name, cached={"policy": EVERYTHING, "level": level, "level_knobs": ONE_PHASE.get(level), "warm_up": warm_up,
                                               "last_steps": last, "max_consecutive_skips": 50})
    assert decisions(report) == [n < warm_up or n >= STEPS - last for n in range(STEPS)]
    assert whys(report) == ["first step", *["warm-up"] * (warm_up - 1), *[""] * (STEPS - warm_up - last), *["last steps"] * (last - 1), "last step"]


def test_a_warm_up_counts_evaluations_and_the_end_counts_steps():
    """Heun evaluates twice per step."""
    _, report = run(model("flux"), "flux", sampler="heun", cached={"policy": EVERYTHING, "warm_up": 3, "last_steps": 2, "max_consecutive_skips": 50})
    assert decisions(report) == [n < 3 or n >= 2 * STEPS - 1 - 4 for n in range(2 * STEPS - 1)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@HERE
@EACH
def test_short_runs_are_served_on_demand(name, level, steps):
    latent, report = run(model(name), name, steps=steps, cached={"policy": EVERYTHING, "level": level, "level_knobs": ONE_PHASE.get(level), "few_steps": True})
    assert report.state == "ran" and len(report.each) == steps
    assert decisions(report).count(False) == {1: 0, 2: 0, 4: 2, 8: 5}[steps]     # four in a row at most
    assert torch.equal(latent, sample(model(name), name, steps=steps)) == (steps < 3)
    _, off = run(model(name), name, steps=steps, cached={"policy": EVERYTHING, "level": level})
    assert off.state == "off"


def patient(monkeypatch, name):
    """The model's family is not to be skipped on its first two evaluations."""
    known = family(name)
    monkeypatch.setitem(families.FAMILIES, known.name, replace(known, warm_up=2))


@pytest.mark.parametrize("level", CONCRETE)
@EACH
def test_two_experts_are_two_runs_that_know_nothing_of_each_other(name, level, monkeypatch):
    """As Wan 2.2 is sampled: one model down to a sigma, another from there on; two evaluations of each come first."""
    patient(monkeypatch, name)
    high, low = tiny.patcher(name, seed=3), tiny.patcher(name, seed=4)
    reports: list = []

    def both(before, after):
        upper = sample(before, name, steps=24, last_step=12)
        return upper, sample(after, name, steps=24, start_step=12, disable_noise=True, noise=torch.zeros_like(upper), latent=upper)

    def after_alone(latent):
        return sample(attached(low, policy=EVERYTHING, predictor="automatic", level=level), name, steps=24, start_step=12, disable_noise=True,
                      noise=torch.zeros_like(latent), latent=latent)

    cached = {"policy": EVERYTHING, "predictor": "automatic", "level": level, "reports": reports}
    upper, latent = both(attached(high, **cached), attached(low, **cached))
    assert [decisions(report)[:3] for report in reports] == [[True, True, False]] * 2
    assert all(whys(report)[:2] == ["first step", "warm-up"] and decisions(report)[-1] for report in reports)
    assert torch.equal(latent, after_alone(upper)), "the second run is what it is without the first"
    assert not torch.equal(latent, both(high, low)[1])


def test_a_family_that_wants_more_than_the_user_gets_it_and_less_does_not_take_away(monkeypatch):
    for asked, wanted in ((1, 2), (2, 2), (4, 4)):
        with monkeypatch.context() as patch:
            patient(patch, "flux")
            _, report = run(model("flux"), "flux", cached={"policy": EVERYTHING, "warm_up": asked})
        assert decisions(report).index(False) == wanted


@pytest.mark.parametrize("sampler", ["euler_ancestral", "er_sde", "lcm", "dpmpp_2m_sde", "dpmpp_2m_cfg_pp", "one nobody knows"])
@HERE
def test_samplers_that_add_noise_or_are_unknown_get_one_skip_of_order_one_at_most(level, sampler):
    reports, orders = [], []

    def look(executor, args, kwargs):
        orders.append({c.history - 1 for c in args[2]["transformer_options"][RUN].cache.streams.candidates})

    patched = spied(model("flux"), WrappersMP.PREDICT_NOISE, look)
    patched = attached(patched, policy=EVERYTHING, predictor="automatic", level=level, reports=reports)
    if sampler == "one nobody knows":
        def euler(denoise, x, sigmas):
            for now, following in zip(sigmas, sigmas[1:], strict=False):
                first = denoise(x, now)
                x = first + (x - first) * following / now
            return x
        latent = sample_by(euler, patched, "flux", label=sampler)
    else:
        latent = sample(patched, "flux", sampler=sampler)
    (report,) = reports
    assert torch.isfinite(latent).all() and max(map(max, orders)) == 1
    seen = decisions(report)
    assert not all(seen) and not any(a == b is False for a, b in zip(seen, seen[1:], strict=False)) and "one skip" in report.reason


# shapes and types ------------------------------------------------------------------------------------------------------
def changing(change, at=6):
    """A sampler of Euler steps that changes x once."""
    def function(denoise, x, sigmas):
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            x = change(x) if n == at else x
            first = denoise(x, now)
            x = first + (x - first) * following / now
        return x.float()
    return function


BIGGER = lambda x: torch.nn.functional.interpolate(x, scale_factor=1.5)


@pytest.mark.parametrize("change", [BIGGER, torch.Tensor.half, torch.Tensor.bfloat16], ids=["bigger", "fp16", "bf16"])
@HERE
@EACH
def test_a_latent_of_another_shape_or_type_starts_afresh(name, level, change):
    reports: list = []
    patched = attached(model(name), policy=EVERYTHING, level=level, max_consecutive_skips=50, reports=reports)
    latent = sample_by(changing(change), patched, name)
    (report,) = reports
    assert torch.isfinite(latent).all() and len(report.each) == STEPS
    assert whys(report)[6] == "the latent changes its shape or type" and decisions(report)[6]
    assert [n for n, why in enumerate(whys(report)) if "latent" in why] == [6]
    assert not decisions(report)[5] and not decisions(report)[7]


# conditions and hooks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("edge", ["start_percent", "end_percent"])
@pytest.mark.parametrize("percent", [0.2, 0.25, 0.5, 0.75])
@EACH
def test_conditions_begin_and_end_in_the_very_evaluation_in_which_the_hosts_do(name, percent, edge):
    """Where sigma meets the border the host compares in single precision."""
    timed = tiny.conditioning(name, 13)
    timed[0][1][edge] = percent
    told, rows = [], []

    def before(executor, args, kwargs):
        told.append(acting({"positive": executor.class_obj.conds["positive"]}, float(args[1][0])))

    patched = spied(model(name), WrappersMP.PREDICT_NOISE, before)
    patched = spied(patched, WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: rows[-1].extend(args[5]["uuids"]))
    patched = spied(patched, WrappersMP.CALC_COND_BATCH, lambda executor, args, kwargs: rows.append([]))
    sample(patched, name, positive=tiny.conditioning(name, 11) + timed, cfg=1.0, steps=20)
    assert [len(flags) for flags in told] == [2] * 20 and [sum(flags) for flags in told] == [len(row) for row in rows]
    assert {len(row) for row in rows} == {1, 2}


def lora(name) -> dict:
    """One that changes the first linear layer of a block."""
    key = {"flux": "double_blocks.0.img_mod.lin", "z_image": "layers.0.feed_forward.w1"}[name]
    out, width = dict(model(name).model.diffusion_model.named_parameters())[f"{key}.weight"].shape
    generator = torch.Generator().manual_seed(8)
    return {f"diffusion_model.{key}.lora_up.weight": torch.randn(out, 4, generator=generator) * 0.2,
            f"diffusion_model.{key}.lora_down.weight": torch.randn(4, width, generator=generator) * 0.2}


def hooked(name, *keyframes) -> list:
    """A prompt with a LoRA whose strength has keyframes (strength, start, guaranteed steps)."""
    hooks = comfy.hooks.create_hook_lora(lora(name), 1.0, 1.0)
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start, steps in keyframes:
        group.add(comfy.hooks.HookKeyframe(strength, start, steps))
    hooks.set_keyframes_on_hooks(group)
    return tiny.conditioning(name, 11, hooks=hooks)


KEYFRAMES = {
    "one change": ((0.0, 0.0, 1), (1.0, 0.5, 1)),
    "the same strength again": ((0.5, 0.0, 1), (0.5, 0.5, 1)),
    "guaranteed for longer": ((0.0, 0.0, 1), (1.0, 0.2, 5), (0.3, 0.25, 1)),
    "two at once": ((0.0, 0.0, 1), (0.7, 0.5, 1), (0.2, 0.5, 1)),
}


@pytest.mark.parametrize("keyframes", KEYFRAMES.values(), ids=KEYFRAMES)
@EACH
def test_the_strength_of_a_hook_is_told_before_the_host_sets_it(name, keyframes):
    """Against the host's own, evaluation by evaluation, with nothing skipped."""
    told, set_, positive = [], [], hooked(name, *keyframes)

    def before(executor, args, kwargs):
        (hook,) = executor.class_obj.conds["positive"][0]["hooks"].hooks
        told.append(move(copy.copy(hook.hook_keyframe), float(args[1][0]), args[2]["transformer_options"]["sample_sigmas"]).strength)

    def after(executor, args, kwargs):
        (hook,) = args[1][0][0]["hooks"].hooks
        set_.append(hook)

    strengths = []

    def during(executor, args, kwargs):
        strengths.append(set_[-1].hook_keyframe.strength)

    patched = spied(spied(spied(model(name), WrappersMP.PREDICT_NOISE, before), WrappersMP.CALC_COND_BATCH, after), WrappersMP.APPLY_MODEL, during)
    sample(patched, name, positive=positive, cfg=1.0)
    assert told == strengths and len(told) == STEPS


@pytest.mark.parametrize(("keyframes", "borders"), [("one change", 1), ("the same strength again", 0), ("guaranteed for longer", 2)])
@HERE
@EACH
def test_nothing_is_predicted_across_another_strength_of_a_hook(name, level, keyframes, borders):
    positive = hooked(name, *KEYFRAMES[keyframes])
    host = sample(model(name), name, positive=positive)
    assert relative(host, plain(name)) > 0.005, "the LoRA does too little to be missed"
    latent, report = run(model(name), name, cached={"policy": EVERYTHING, "level": level, "max_consecutive_skips": 2}, positive=positive)
    found = [n for n, why in enumerate(whys(report)) if why == "conditions start or end"]
    assert len(found) == borders and all(decisions(report)[n] for n in found) and not all(decisions(report))
    assert relative(latent, host) < 0.3


@HERE
@EACH
def test_prompts_with_a_lora_of_their_own_and_without_keep_apart(name, level):
    """The host evaluates prompts of unlike hooks one by one."""
    both = hooked(name, (1.0, 0.0, 1)) + tiny.conditioning(name, 11)
    assert relative(sample(model(name), name, positive=both), plain(name)) > 0.005, "the LoRA does too little to be missed"
    rows: list = []
    patched = spied(attached(model(name), policy=EVERY_SECOND, level=level, reports=(reports := [])), WrappersMP.APPLY_MODEL,
                    lambda executor, args, kwargs: rows.append(len(args[5]["uuids"])))
    assert max(replay_errors(patched, name, positive=both, negative=tiny.conditioning(name, 14))) < 1e-6
    assert decisions(reports[0]).count(False) == 11 and min(rows) < 3


# tokens ----------------------------------------------------------------------------------------------------------------
@HERE
def test_windows_that_move_from_step_to_step_are_never_predicted_from_others(level):
    patcher = windowed(model("flux"), 3, "standard_uniform")
    windows: list = []
    look = lambda executor, args, kwargs: windows.append(tuple(args[4]["transformer_options"]["context_window"].index_list))
    patched = spied(attached(patcher, policy=EVERY_SECOND, level=level, reports=(reports := [])), WrappersMP.CALC_COND_BATCH, look)
    errors = replay_errors(patched, "flux", size=(8, 28))
    assert len(set(windows)) > 6, "the windows stand still, so the test would prove nothing"
    assert max(errors) < 1e-6 and decisions(reports[0]).count(False) > 0


def test_a_window_that_was_not_there_when_last_computed_is_computed():
    """What is kept of one window says nothing of another that comes in its place."""
    patcher, each = windowed(model("flux"), 3, "standard_uniform"), []
    patched = attached(patcher, policy=At(tuple(range(1, 24, 2))), level="model output", reports=(reports := []))
    patched = spied(patched, WrappersMP.PREDICT_NOISE, lambda executor, args, kwargs: each.append([]))
    patched = spied(patched, WrappersMP.CALC_COND_BATCH, lambda executor, args, kwargs: each[-1].append(
        tuple(args[4]["transformer_options"]["context_window"].index_list)))
    sample(patched, "flux", size=(8, 28), steps=24)
    known, wanted = set(), []
    for n, windows in enumerate(each):
        new = [window for window in windows if window not in known]
        wanted.append(len(new) / len(windows) if n % 2 and n < 23 else 1.0)
        known = known | set(new) if wanted[-1] < 1 else set(windows)
    assert [evaluation.share for evaluation in reports[0].each] == pytest.approx(wanted)
    assert any(0 < share < 1 for share in wanted), "no window moves between a computed step and a skip, so the test would prove nothing"


@HERE
@pytest.mark.parametrize(("name", "method"), [("flux", "index"), ("flux2", "index"), ("flux2", "index_timestep_zero")])
def test_a_kv_cache_that_shortens_the_stream_after_its_first_call_is_served(level, name, method):
    """The host's FluxKVCache drops the reference tokens once their keys and values are known."""
    reference = {"reference_latents": [tiny.noise(name, seed=9)], "reference_latents_method": method}
    conditions = {"positive": tiny.conditioning(name, 11, **reference), "negative": tiny.conditioning(name, 12, **reference)}
    node = lambda: FluxKVCache.execute(model(name)).result[0]
    host = sample(node(), name, **conditions)
    latent, report = run(node(), name, cached={"policy": At((1, 3, 5)), "level": level}, **conditions)
    seen = decisions(report)
    assert seen[1] == (level in OF_BLOCKS), "the tokens of the second evaluation are fewer, so there is nothing to skip to"
    assert not seen[3] and not seen[5] and relative(latent, host) < 0.2
    assert relative(sample(node(), name, **conditions), host) == 0
    assert max(replay_errors(attached(node(), policy=At(tuple(range(3, 24, 2))), level=level), name, **conditions)[1:]) < 1e-6


@EACH
def test_a_prompt_of_another_length_later_on_is_another_row(name):
    """Text is joined to the image in some models: the stream of a second prompt has other tokens."""
    late = tiny.conditioning(name, 13, tokens=40)
    late[0][1].update(start_percent=0.5)
    early = tiny.conditioning(name, 11)
    early[0][1].update(end_percent=0.5)
    _, report = run(model(name), name, cached={"policy": EVERYTHING, "level": "block range"}, positive=early + late)
    assert whys(report).count("conditions start or end") >= 1 and not all(decisions(report))
