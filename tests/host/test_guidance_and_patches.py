"""What others hang on the model: guidance that skips layers, ControlNet, replaced blocks, wrappers."""
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from harness import (
    CONCRETE,
    EVERY_SECOND,
    QUICK,
    STEPS,
    Control,
    Never,
    attached,
    blocks,
    decisions,
    model,
    plain,
    relative,
    replay_errors,
    run,
    sample,
    schedule,
    spied,
)

from pack.core.attach import RUN
from pack.core.stepcache.error_budget import MOST_GUIDANCE, ErrorBudget
from pack.core.stepcache.levels import LEVELS
from testbed import tiny


def guided(double="1", single="", scale=2.0, start=0.0, end=1.0):
    """A flux with skip-layer guidance; Z-Image's blocks cannot be replaced."""
    return SkipLayerGuidanceDiT.execute(model("flux"), scale, start, end, double_layers=double, single_layers=single).result[0]


@pytest.mark.parametrize("level", CONCRETE)
def test_skip_layer_guidance_with_every_step_computed_is_that_of_the_host(level):
    host = sample(guided(), "flux")
    latent, report = run(guided(), "flux", cached={"policy": Never(), "level": level})
    assert torch.equal(latent, host) and report.evaluations == STEPS


@pytest.mark.parametrize(("double", "single"), [("1", ""), ("", "1"), ("0", ""), ("", "2"), ("0, 1", "0, 1, 2")],
                         ids=["second block", "single block", "first block", "last block", "all blocks"])
@pytest.mark.parametrize("level", CONCRETE)
def test_skip_layer_guidance_is_not_lost_on_skipped_steps(level, double, single):
    steered = guided(double, single)
    errors = replay_errors(attached(steered, policy=EVERY_SECOND, level=level), "flux")
    assert max(errors) < 1e-5
    with_it = relative(sample(steered, "flux"), plain("flux"))
    latent, report = run(steered, "flux", cached={"level": level})
    without, bare = run(model("flux"), "flux", cached={"level": level})
    assert decisions(report).count(False) == 4
    assert decisions(report) == decisions(bare)
    if LEVELS[level].serves != "transformer":       # where a pass counts without a block that its guidance leaves out, and runs where a range ends in one
        assert [e.share for e in report.each] == [e.share for e in bare.each], "passes of the guidance follow the decision of the main one"
    assert with_it > 0.02 and relative(latent, without) == pytest.approx(with_it, rel=0.3)


@pytest.mark.parametrize("level", CONCRETE)
def test_guidance_that_sets_in_late_starts_from_computed_evaluations(level):
    cached = {"level": level, "policy_knobs": {"interval": 4, "warm_up": 1}}
    latent, report = run(guided(start=0.5), "flux", cached=cached)
    unguided, _ = run(model("flux"), "flux", cached=cached)
    assert torch.isfinite(latent).all() and not all(decisions(report))
    assert relative(latent, sample(guided(start=0.5), "flux")) < 3 * relative(unguided, plain("flux"))


def test_guidance_that_ends_on_a_skipped_step_ends_there():
    """Skip-layer guidance ends at a sigma; a step skipped above guidance would carry it on."""
    steered = guided(start=0.0, end=0.5)
    latent, report = run(steered, "flux", cached={"level": "guided output", "policy_knobs": {"interval": 4, "warm_up": 1}})
    assert report.level == "model output" and "looks into guidance" in report.reason
    below, _ = run(steered, "flux", cached={"level": "model output", "policy_knobs": {"interval": 4, "warm_up": 1}})
    assert torch.equal(latent, below)


def test_the_second_of_two_guidances_does_not_take_the_place_of_the_first_when_that_ends():
    both = SkipLayerGuidanceDiT.execute(guided("1", "", end=0.5), 2.0, 0.0, 1.0, double_layers="", single_layers="1").result[0]
    errors = replay_errors(attached(both, policy=EVERY_SECOND, level="model output"), "flux")
    assert max(errors) < 1e-5
    seen = set()
    watched = spied(attached(both, policy=EVERY_SECOND, level="model output"), WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: seen.update(
        row for row in args[5]["reprise.run"].cache.store.rings))
    sample(watched, "flux")
    assert {row.patches for row in seen if row.ordinal == 1} == {
        frozenset({("dit", ("double_block", 1))}), frozenset({("dit", ("single_block", 1))})}


def test_a_lora_keyframe_is_a_border_like_any_other():
    from comfy.hooks import HookGroup, HookKeyframe, HookKeyframeGroup, WeightHook

    from pack.core.attach import acting

    hook, group = WeightHook(), HookGroup()
    hook.hook_keyframe = HookKeyframeGroup()
    for strength, start in ((0.0, 1e9), (1.0, 0.4)):
        keyframe = HookKeyframe(strength)
        keyframe.start_t = start
        hook.hook_keyframe.add(keyframe)
    group.add(hook)
    told = [acting({"positive": [{"hooks": group}]}, sigma) for sigma in (0.9, 0.5, 0.4, 0.1)]
    assert told[0] == told[1] != told[2] == told[3]


def controlled(doubles=2, singles=3):
    control = Control(doubles, singles)
    both = {"control": control, "control_apply_to_uncond": False}
    return {"positive": tiny.conditioning("flux", 11, **both), "negative": tiny.conditioning("flux", 12, **both)}, control


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize(("doubles", "singles"), [(2, 0), (0, 3), (2, 3), (1, 1)])
def test_controlnet_is_not_added_twice_on_a_skip_of_blocks(doubles, singles, first):
    conditions, _ = controlled(doubles, singles)
    assert relative(sample(model("flux"), "flux", **conditions), plain("flux")) > 0.05, "the control does too little to be missed"
    patched = attached(model("flux"), policy=EVERY_SECOND, level="block range", level_knobs={"first_blocks": first})
    assert max(replay_errors(patched, "flux", **conditions)) < 1e-5


@pytest.mark.parametrize("level", CONCRETE)
def test_controlnet_runs_where_a_level_says_it_does(level):
    conditions, control = controlled()
    patched = attached(model("flux"), level=level, reports=(reports := []))
    sample(patched, "flux", **conditions)
    computed = decisions(reports[0]).count(True)
    assert computed == 8 and control.calls in ((computed, 2 * computed) if level == "guided output" else (STEPS, 2 * STEPS))
    exact = attached(model("flux"), policy=Never(), level=level)
    assert torch.equal(sample(exact, "flux", **conditions), sample(model("flux"), "flux", **conditions))


@pytest.mark.parametrize("percents", [(0.0, 0.5), (0.5, 1.0)], ids=["ends", "begins"])
@pytest.mark.parametrize("level", CONCRETE)
def test_a_controlnet_that_begins_or_ends_in_mid_run_is_not_predicted_across(level, percents):
    conditions, control = controlled()
    control.timestep_percent_range = percents
    _, report = run(model("flux"), "flux", cached={"level": level, "policy_knobs": {"interval": 5, "warm_up": 1}}, **conditions)
    border = model("flux").get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = torch.tensor([evaluation.sigma for evaluation in report.each])      # the host compares in single precision
    first = (sigmas < border if percents[0] == 0 else sigmas <= border).nonzero()[0].item()
    assert first % 5 and decisions(report)[first] and not all(decisions(report))


def replaced(kind: str, index: int, replace):
    patched = model("flux").clone()
    patched.set_model_patch_replace(replace, "dit", kind, index)
    return patched


@pytest.mark.parametrize(("kind", "index"), [("double_block", 0), ("double_block", 1), ("single_block", 1), ("single_block", 2)])
@pytest.mark.parametrize("level", CONCRETE)
def test_a_foreign_patch_of_a_block_is_honoured(kind, index, level):
    def louder(args, extra):
        out = extra["original_block"](args)
        calls.append(1)
        return {**out, "img": out["img"] + out["img"].roll(1, -1)}

    calls: list = []
    patched = replaced(kind, index, louder)
    host = sample(patched, "flux")
    assert relative(host, plain("flux")) > 0.05
    latent, report = run(patched, "flux", cached={"policy": Never(), "level": level})
    assert torch.equal(latent, host)
    calls.clear()
    latent, report = run(patched, "flux", cached={"level": level})
    assert calls and decisions(report).count(False) == 4 and report.reason == ""
    assert relative(latent, host) < 0.5 * relative(latent, plain("flux"))
    assert patched.model_options["transformer_options"]["patches_replace"]["dit"] == {(kind, index): louder}


def test_a_patch_that_goes_around_the_last_block_makes_block_range_compute_and_say_so():
    around = replaced("single_block", 2, lambda args, extra: {"img": args["img"]})
    latent, report = run(around, "flux", cached={"level": "block range"})
    assert torch.equal(latent, sample(around, "flux"))
    assert all(decisions(report)) and report.evaluations == STEPS
    assert "last block" in report.reason and report.reason in report.line()


def test_a_patch_that_sets_in_late_and_goes_around_the_last_block_makes_block_range_compute_and_say_so():
    def late(args, extra):
        if args["transformer_options"]["sigmas"][0] < 0.7:
            return {"img": args["img"]}
        return extra["original_block"](args)

    latent, report = run(replaced("single_block", 2, late), "flux", cached={"level": "block range"})
    assert torch.isfinite(latent).all()
    assert "last block" in report.reason
    assert decisions(report)[-4:] == [True] * 4


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_a_foreign_function_wrapper_and_attention_stay_in_place(name, level):
    seen = {"wrapper": 0, "attention": 0}

    def function_wrapper(apply_model, parts):
        seen["wrapper"] += 1
        return apply_model(parts["input"], parts["timestep"], **parts["c"])

    def attention(original, *args, **kwargs):
        seen["attention"] += 1
        return original(*args, **kwargs)

    patched = model(name).clone()
    patched.set_model_unet_function_wrapper(function_wrapper)
    patched.model_options["transformer_options"]["optimized_attention_override"] = attention
    cached = attached(patched, level=level)
    assert cached.model_options["model_function_wrapper"] is function_wrapper
    assert cached.model_options["transformer_options"]["optimized_attention_override"] is attention
    assert torch.equal(sample(cached, name), run(model(name), name, cached={"level": level})[0])
    assert seen["wrapper"] and seen["attention"]


def tiled(patched):
    """A model evaluated in two tiles, one after the other, as tiled diffusion does it."""
    def function_wrapper(apply_model, parts):
        return torch.cat([apply_model(tile.contiguous(), parts["timestep"], **parts["c"]) for tile in parts["input"].chunk(2, -1)], -1)

    clone = patched.clone()
    clone.set_model_unet_function_wrapper(function_wrapper)
    return clone


@pytest.mark.parametrize("level", CONCRETE)
def test_tiles_of_a_picture_do_not_share_a_history(level):
    errors = replay_errors(attached(tiled(model("flux")), policy=EVERY_SECOND, level=level), "flux", size=(8, 16))
    assert max(errors) < 1e-6


@pytest.mark.parametrize("level", CONCRETE)
def test_a_call_that_is_not_understood_is_computed_and_counted_as_computed(level):
    def hides_its_conditions(apply_model, parts):
        options = {key: value for key, value in parts["c"]["transformer_options"].items() if key != "uuids"}
        return apply_model(parts["input"], parts["timestep"], **{**parts["c"], "transformer_options": options})

    patched = model("flux").clone()
    patched.set_model_unet_function_wrapper(hides_its_conditions)
    latent, report = run(patched, "flux", cached={"level": level})
    if level != "guided output":    # which needs to understand nothing
        assert torch.equal(latent, plain("flux"))
        assert all(decisions(report)) and report.evaluations == STEPS


@pytest.mark.parametrize("first", [True, False], ids=["ours last", "ours first"])
@pytest.mark.parametrize("level", CONCRETE)
def test_the_order_of_wrappers_does_not_matter(level, first):
    kinds = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    patched, calls = model("flux") if first else attached(model("flux"), level=level), []
    for kind in kinds:
        patched = spied(patched, kind, lambda executor, args, kwargs, kind=kind: calls.append(kind))
    patched = attached(patched, level=level) if first else patched
    assert torch.equal(sample(patched, "flux"), run(model("flux"), "flux", cached={"level": level})[0])
    assert set(calls) == set(kinds)


def test_the_blocks_of_a_model_are_the_ones_that_are_told():
    assert len(blocks("flux")) == 5 and len(blocks("z_image")) == 4


# guiders with a guidance of their own ------------------------------------------------------------------------------------
class Stranger(comfy.samplers.CFGGuider):
    """Guides by a strength that it does not tell."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        both = [self.conds["positive"], self.conds["negative"]]
        one, other = comfy.samplers.calc_cond_batch(self.inner_model, both, x, timestep, model_options)
        return other + 3.0 * (one - other)


def basic(patcher):
    guider = nodes_custom_sampler.Guider_Basic(patcher)
    guider.set_conds(tiny.conditioning("flux", 11))
    return guider


def by_scale(patcher, cfg: float = 2.0, kind=comfy.samplers.CFGGuider):
    guider = kind(patcher)
    guider.set_conds(tiny.conditioning("flux", 11), tiny.conditioning("flux", 12))
    guider.set_cfg(cfg)
    return guider


def dual(patcher, cfg1: float, cfg2: float, nested: bool = False):
    guider = nodes_custom_sampler.Guider_DualCFG(patcher)
    guider.set_conds(*(tiny.conditioning("flux", seed) for seed in (11, 13, 12)))
    guider.set_cfg(cfg1, cfg2, nested=nested)
    return guider


def perp_neg(patcher, cfg: float):
    guider = Guider_PerpNeg(patcher)
    guider.set_conds(*(tiny.conditioning("flux", seed) for seed in (11, 12, 13)))
    guider.set_cfg(cfg, 1.0)
    return guider


@pytest.mark.parametrize(("made", "strength"), [
    (basic, 1.0), (by_scale, 2.0), (lambda patcher: by_scale(patcher, 1.0), 1.0), (lambda patcher: dual(patcher, 2.5, 1.0), 2.5),
    (lambda patcher: dual(patcher, 1.5, 3.0, True), 3.0), (lambda patcher: perp_neg(patcher, 2.0), 2.0),
    (lambda patcher: by_scale(patcher, 1.0, Stranger), MOST_GUIDANCE),
], ids=["basic", "cfg", "cfg 1", "dual", "dual nested", "perp neg", "stranger"])
def test_guidance_counts_by_the_largest_scale_of_its_guider_and_by_the_most_where_it_names_none(made, strength):
    budgets = []

    def look(executor, args, kwargs):
        budgets.append(args[2]["transformer_options"][RUN].cache.budget)

    guider = made(attached(spied(model("flux"), WrappersMP.PREDICT_NOISE, look), "error control", reports=(reports := [])))
    noise = tiny.noise("flux")
    with torch.inference_mode():
        latent = guider.sample(noise, noise * 0, comfy.samplers.sampler_object("euler"), schedule("flux"), disable_pbar=True, seed=1)
    expected = ErrorBudget(strength)
    assert torch.isfinite(latent).all() and reports[0].state == "ran"
    assert (budgets[0].handed_on, budgets[0].falls, budgets[0].guided) == (expected.handed_on, expected.falls, strength > 1)
