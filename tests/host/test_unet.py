"""UNets: what a skip runs, what it leaves alone, and that it repeats what was computed."""
import itertools
from dataclasses import dataclass, field

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from harness import (
    EVERY_SECOND,
    STEPS,
    At,
    Never,
    attached,
    counted,
    decisions,
    model,
    network,
    relative,
    replay_errors,
    run,
    sample,
    sample_by,
    schedule,
    spied,
)
from torch.utils.flop_counter import FlopCounterMode
from unets import ANY_LEVELS, BLOCKS, CASES, FEW, IDS, NAMES, PICTURES, PLAIN, UNET_LEVELS, VIDEO, blocks, kept

from pack.core.attach import RUN
from pack.core.families import FAMILIES, family_of
from pack.core.families.unet import costs
from pack.core.stepcache.corrections import CORRECTIONS
from testbed import tiny


@pytest.mark.parametrize("name", tiny.OF_FAMILY["unet"])
def test_the_tiny_models_are_unets_of_the_host_whose_derivative_moves(name):
    assert family_of(network(model(name))) is FAMILIES["unet"]
    if name == "sd15":
        return
    assert len(network(model(name)).input_blocks) == len(network(model(name)).output_blocks) == BLOCKS
    seen: list = []
    sample(model(name), name, callback=lambda step, denoised, x, total: seen.append((x - denoised).clone()), **VIDEO.get(name, {}))
    derivatives = [d / sigma for d, sigma in zip(seen, schedule(name), strict=False)]
    moves = [relative(now, before) for before, now in zip(derivatives, derivatives[1:], strict=False)]
    assert all(torch.isfinite(d).all() for d in derivatives)
    assert max(moves) < 1 and (min(moves) > 5e-3 or name == "svd_like"), "a model that stands still proves nothing"


# off -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "policy"), [
    *itertools.product(UNET_LEVELS, [Never(), "error control", "interval", "centred interval", "key steps"]), *((level, Never()) for level in ANY_LEVELS)],
    ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_computed_steps_are_bit_identical_to_the_host(name, level, policy):
    off = {"error control": {"tolerance": 0.0}, "interval": {"interval": 1}, "centred interval": {"interval": 1}}.get(policy, {})
    cached = {"policy": policy, "policy_knobs": off, "level": level, "predictor": "automatic"} | ({"end_percent": 0.0} if policy == "key steps" else {})
    sampling = VIDEO.get(name, {}) | ({} if isinstance(policy, Never) else {"cfg": 1.0})
    latent, report = run(model(name), name, cached=cached, **sampling)
    assert torch.equal(latent, sample(model(name), name, **sampling))
    assert report.state == "ran" and all(decisions(report)) and report.evaluations == STEPS and report.level == level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("level", "knobs"), FEW)
@pytest.mark.parametrize("name", PICTURES)
def test_models_in_other_types_are_off_bit_for_bit_and_repeat_what_they_computed(name, level, knobs, dtype):
    patcher = tiny.patcher(name, dtype=dtype)
    off, _ = run(patcher, name, cfg=1.0, cached={"policy": Never(), "level": level, "level_knobs": knobs})
    assert patcher.model.get_dtype() == dtype and torch.equal(off, sample(patcher, name, cfg=1.0))
    assert max(replay_errors(attached(patcher, policy=EVERY_SECOND, level=level, level_knobs=knobs), name, cfg=1.0)) < 1e-6


# skips ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "knobs", "sampling"), [
    *((*case, {}) for case in CASES), *((level, PLAIN.get(level, {}), {"batch": 2}) for level in ANY_LEVELS),
    *((*case, sampling) for case in FEW for sampling in ({"cfg": 1.0}, {"batch": 3}, {"size": (10, 6)}))], ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_a_skip_with_the_same_input_repeats_the_computed_result(name, level, knobs, sampling):
    reports: list = []
    errors = replay_errors(attached(model(name), policy=EVERY_SECOND, level=level, level_knobs=knobs, reports=reports), name, **sampling)
    assert decisions(reports[0]) == [True, False] * 11 + [True, True] and reports[0].reason == ""
    assert max(errors) < 1e-6


@pytest.mark.parametrize(("level", "knobs"), FEW)
def test_a_skip_of_a_video_repeats_the_computed_result(level, knobs):
    errors = replay_errors(attached(model("svd_like"), policy=EVERY_SECOND, level=level, level_knobs=knobs), "svd_like", batch=3)
    assert max(errors) < 1e-5       # its sigmas begin at 700, where fp32 keeps little of what is left below


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize("level", [*UNET_LEVELS, *ANY_LEVELS])
def test_a_model_that_predicts_v_is_served_too(level, zsnr):
    patcher = ModelSamplingDiscrete().patch(model("sdxl_like"), "v_prediction", zsnr)[0]
    off, _ = run(patcher, "sdxl_like", cached={"policy": Never(), "level": level})
    assert torch.equal(off, sample(patcher, "sdxl_like"))
    patched = attached(patcher, policy=EVERY_SECOND, level=level, level_knobs=PLAIN.get(level, {}))
    errors = replay_errors(patched, "sdxl_like", sigmas=schedule("sdxl_like", patcher=patcher))
    assert max(errors) < (1e-6 if level in UNET_LEVELS else 1e-3 if zsnr else 1e-5)     # x - sigma d in fp32, at a sigma of up to 4500


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2", "ddim"])
@pytest.mark.parametrize("level", [*UNET_LEVELS, *ANY_LEVELS])
def test_samplers_skip_and_stay_near_the_full_run(level, sampler):
    host = sample(model("sd15_like"), "sd15_like", sampler=sampler, cfg=1.0)
    latent, report = run(model("sd15_like"), "sd15_like", cached={"level": level, "predictor": "automatic"}, sampler=sampler, cfg=1.0)
    assert not all(decisions(report)) and decisions(report)[-1]
    assert 1e-5 < relative(latent, host) < 0.15


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
@pytest.mark.parametrize("name", PICTURES)
def test_a_skip_runs_the_blocks_that_are_promised_and_no_other(name, level, knobs):
    per_call = []

    def callback(step, denoised, x, total):
        per_call.append(dict(calls))
        calls.clear()

    with counted(blocks(model(name))) as calls:
        _, report = run(model(name), name, cached={"level": level, "level_knobs": knobs}, cfg=1.0, callback=callback)
    every, some = dict.fromkeys(range(2 * BLOCKS + 1), 1), dict.fromkeys(sorted(kept(level, knobs)), 1)
    assert per_call == [every if computed else some for computed in decisions(report)]
    assert decisions(report).count(False) == 4


@pytest.mark.parametrize("level", UNET_LEVELS)
@pytest.mark.parametrize("name", PICTURES)
def test_a_skip_sees_the_present_step_where_guided_output_only_extrapolates(name, level):
    latent, _ = run(model(name), name, cached={"level": level})
    held, _ = run(model(name), name, cached={"level": "guided output"})
    assert relative(latent, held) > 1e-4 and relative(latent, sample(model(name), name)) > 1e-4


@pytest.mark.parametrize(("level", "branch", "place"), [("unet depth", 0, 8), ("unet depth", 4, 4), ("unet encoder", None, 0), ("unet encoder", None, 6)])
def test_what_goes_into_an_output_block_is_what_the_predictor_says(level, branch, place):
    """Order 1, evaluations 3 and 4 skipped after 1 and 2:  H' = H_2 + (n - 2) (H_2 - H_1)."""
    seen: list = []
    layer = network(model("sd15_like")).output_blocks[place][0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        run(model("sd15_like"), "sd15_like", cfg=1.0, cached={
            "policy": At((3, 4)), "predictor": "divided differences", "level": level, "level_knobs": {} if branch is None else {"branch": branch}})
    finally:
        hook.remove()
    # what the depth level predicts comes from below; the encoder level predicts the skip connections, and all that goes into the first block
    part = slice(deep_width(place)) if level == "unet depth" else slice(deep_width(place) if place else 0, None)
    one, two, three, four = (value[:, part] for value in seen[1:5])
    assert relative(two, one) > 1e-3
    assert torch.allclose(three, 2 * two - one, atol=1e-4) and torch.allclose(four, 3 * two - 2 * one, atol=1e-4)


def deep_width(place: int) -> int:
    """Channels that come to an output block from below."""
    if place == 0:
        return network(model("sd15_like")).input_blocks[-1][0].out_channels
    return network(model("sd15_like")).output_blocks[place - 1][0].out_channels


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("level", UNET_LEVELS)
def test_corrections_work_on_features_and_stay_small(level, correction):
    cached = {"level": level, "predictor": "automatic", "policy_knobs": {"interval": 3}}
    host = sample(model("sd15_like"), "sd15_like", steps=20, batch=2)
    without, plainly = run(model("sd15_like"), "sd15_like", steps=20, batch=2, cached=cached)
    latent, report = run(model("sd15_like"), "sd15_like", steps=20, batch=2, cached={**cached, "correction": CORRECTIONS[correction]()})
    assert relative(latent, host) < 4 * relative(without, host) and report.cache_bytes < 1.2 * plainly.cache_bytes
    nothing_to_do = correction == "none" or (correction == "channel affine" and level == "unet encoder")    # which keeps its parts in one row
    assert (relative(latent, without) < 1e-6) == nothing_to_do


# cost ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PICTURES)
def test_the_cost_of_blocks_is_that_of_their_floating_point_operations(name):
    net, size = network(model(name)), 32
    pieces = [*blocks(model(name)), [net.out]]
    context = torch.randn(1, 7, 16)
    with torch.inference_mode(), FlopCounterMode(depth=3, display=False) as counter:
        net(torch.randn(1, 4, size, size), torch.tensor([500.0]), context, y=None if net.num_classes is None else torch.randn(1, 16 + 6 * 256),
            transformer_options={"optimized_attention_override": lambda attention, *args, **kwargs: attention_basic(*args, **kwargs)})
    paths = {id(module): f"UNetModel.{path}" for path, module in net.named_modules()}
    seen = [sum(sum(counter.get_flop_counts()[paths[id(layer)]].values()) for layer in piece) / 2 for piece in pieces]
    told = costs(net, size * size)
    assert [*told.inputs, told.middle, *told.outputs, told.last] == pytest.approx(seen, rel=0.08)


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_evaluations_are_the_cost_of_the_blocks_that_ran_over_that_of_a_full_evaluation(level, knobs, split, monkeypatch):
    patched = attached(model("sd15_like"), level=level, level_knobs=knobs, reports=(reports := []))
    monkeypatch.setattr(type(patched), "get_free_memory", lambda self, device: 0 if split else 1 << 50)
    sample(patched, "sd15_like")
    told = costs(network(model("sd15_like")), 64)
    each = [*told.inputs, told.middle, *told.outputs]
    share = (sum(each[place] for place in kept(level, knobs)) + told.last) / (sum(each) + told.last)
    (report,) = reports
    assert report.evaluations == pytest.approx(8 + 4 * share) and 0 < share < 1
    assert [evaluation.share for evaluation in report.each] == [1.0 if computed else pytest.approx(share) for computed in decisions(report)]


def test_every_kept_tensor_is_counted():
    picture = {"cfg": 1.0, "cached": {"policy": Never(), "predictor": "hold"}}
    _, shallow = run(model("sd15_like"), "sd15_like", **picture | {"cached": {**picture["cached"], "level": "unet depth"}})
    assert shallow.cache_bytes == 4 * deep_width(8) * 64
    _, encoder = run(model("sd15_like"), "sd15_like", **picture | {"cached": {**picture["cached"], "level": "unet encoder"}})
    skips = [(32, 64)] * 3 + [(32, 16)] + [(64, 16)] * 2 + [(64, 4)] + [(128, 4)] * 2
    kept_bytes = 4 * (sum(width * pixels for width, pixels in skips) + 128 * 4)
    assert encoder.cache_bytes == kept_bytes
    noisy = {**picture["cached"], "level": "unet encoder", "level_knobs": {"noise": 0.01}}
    assert run(model("sd15_like"), "sd15_like", **picture | {"cached": noisy})[1].cache_bytes == kept_bytes + 4 * 4 * 64


# nothing left behind -------------------------------------------------------------------------------------------------
def shape_of(patcher) -> tuple:
    """Everything of the network that a level could leave changed."""
    net = network(patcher)
    modules = dict(net.named_modules())
    return list(modules), [id(module) for module in modules.values()], [set(vars(module)) for module in modules.values()], list(net._modules)


@pytest.mark.parametrize(("level", "knobs"), FEW)
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_stays_behind_after_a_run_that_skips(name, level, knobs):
    host = sample(model(name), name)        # the host leaves marks of its own when it first loads a model
    before = shape_of(model(name))
    patched = attached(model(name), level=level, level_knobs=knobs)
    assert not torch.equal(sample(patched, name), host)
    assert shape_of(model(name)) == before and RUN not in patched.model_options["transformer_options"]


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
@pytest.mark.parametrize("on_skip", [False, True], ids=["computed", "skipped"])
@pytest.mark.parametrize(("level", "knobs"), FEW)
def test_a_run_that_is_cut_short_in_a_block_leaves_nothing(level, knobs, on_skip, error):
    name = "sdxl_like"
    wanted, _ = run(model(name), name, cfg=1.0, cached={"level": level, "level_knobs": knobs})
    before, calls = shape_of(model(name)), []
    patched = attached(model(name), level=level, level_knobs=knobs, reports=(reports := []))

    def stop(*_):
        calls.append(1)
        if len(calls) == (4 if on_skip else 5):     # the fourth evaluation is the first skip
            raise error("stop here")

    hook = network(model(name)).output_blocks[-1][0].in_layers[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(error):
            sample(patched, name, cfg=1.0)
    finally:
        hook.remove()
    assert shape_of(model(name)) == before
    assert len(reports[0].each) == len(calls) - 1 and "cut short" in reports[0].reason
    assert torch.equal(sample(patched, name, cfg=1.0), wanted) and len(reports[1].each) == STEPS


@pytest.mark.parametrize("level", UNET_LEVELS)
def test_the_patches_of_the_caller_are_not_written_into(level):
    calls: list = []

    def above(executor, *args, **kwargs):
        patches = args[5]["patches"]
        before = {name: list(entries) for name, entries in patches.items()}
        result = executor(*args, **kwargs)
        calls.append(args[5]["patches"] is patches and patches == before)
        return result

    patched = FreeU_V2.execute(model("sd15_like"), 1.3, 1.4, 0.9, 0.2).result[0]
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.above", above)
    sample(attached(patched, level=level), "sd15_like", cfg=1.0)
    assert calls == [True] * STEPS


# conditions ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "knobs"), FEW)
@pytest.mark.parametrize("name", PICTURES)
def test_batched_or_split_makes_the_same_latents_and_decisions(name, level, knobs, monkeypatch):
    patched = attached(model(name), level=level, level_knobs=knobs, predictor="automatic", reports=(reports := []))
    latents = []
    for plan in (lambda n: True, lambda n: False, lambda n: n % 3 > 0):
        looks: list = []
        with monkeypatch.context() as patch:
            patch.setattr(type(patched), "get_free_memory", lambda self, device, looks=looks, plan=plan: (1 << 50) * plan(looks.append(1) or len(looks)))
            latents.append(sample(patched, name))
    for latent, report in zip(latents[1:], reports[1:], strict=True):
        assert decisions(report) == decisions(reports[0]) and not all(decisions(report))
        assert relative(latent, latents[0]) < 1e-5
    assert relative(latents[0], sample(model(name), name)) > 1e-4


@pytest.mark.parametrize("level", UNET_LEVELS)
@pytest.mark.parametrize("name", PICTURES)
def test_runs_of_one_model_do_not_know_of_each_other(name, level):
    sizes = ({"cfg": 1.0}, {"size": (8, 12)}, {"batch": 2, "cfg": 1.0}, {"steps": 15, "cfg": 1.0}, {"cfg": 1.0})
    patched = attached(model(name), level=level, predictor="automatic")
    for sampling in sizes:
        assert torch.equal(sample(patched, name, **sampling), run(model(name), name, cached={"level": level, "predictor": "automatic"}, **sampling)[0])


# prior noise ---------------------------------------------------------------------------------------------------------
@dataclass
class Walk:
    """A sampler that goes the same way whatever it is told, and notes what it is told."""

    seen: list = field(default_factory=list)

    def __call__(self, denoise, x, sigmas):
        begin = x.clone()
        for now in sigmas[:-1]:
            self.seen.append(denoise(begin * (1 + now ** 2) ** 0.5 / (1 + sigmas[0] ** 2) ** 0.5, now).clone())
        return self.seen[-1]


@pytest.mark.parametrize("noise", [0.003, 0.05])
def test_prior_noise_is_added_to_what_skips_of_the_second_half_look_at(noise):
    """The encoder is not asked on a skip, so eps is the same and the latent is all that differs."""
    plainly, noisily, reports = Walk(), Walk(), []
    patched = {a: attached(model("sd15_like"), level="unet encoder", level_knobs={"noise": a}, reports=reports) for a in (0.0, noise)}
    sample_by(plainly, patched[0.0], "sd15_like", cfg=1.0)
    sample_by(noisily, patched[noise], "sd15_like", cfg=1.0)
    sigmas, begin = schedule("sd15_like").tolist(), tiny.noise("sd15_like")
    assert decisions(reports[0]) == decisions(reports[1])
    hit = [n for n, computed in enumerate(decisions(reports[0])) if not computed and n >= STEPS // 2]
    assert len(hit) >= 2 and any(not computed for computed in decisions(reports[0])[:STEPS // 2])
    for n, (without, with_it) in enumerate(zip(plainly.seen, noisily.seen, strict=True)):
        if n in hit:
            first = begin * (1 + sigmas[0] ** 2) ** 0.5     # the host begins with x = noise sqrt(1 + sigma^2)
            z = first / (1 + sigmas[0] ** 2) ** 0.5
            assert torch.allclose(with_it - without, noise * z * (1 + sigmas[n] ** 2) ** 0.5, atol=1e-5)
        else:
            assert torch.equal(with_it, without)


# where a level does not fit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "level"), [("sd15_like", "block range"), ("sdxl_like", "block range"), *[("flux", level) for level in UNET_LEVELS],
                                            *[("z_image", level) for level in UNET_LEVELS]])
def test_a_level_that_is_not_for_the_model_becomes_guided_output_and_says_so(name, level):
    latent, report = run(model(name), name, cached={"level": level})
    wanted, other = run(model(name), name, cached={"level": "guided output"})
    assert torch.equal(latent, wanted) and decisions(report) == decisions(other) and not all(decisions(report))
    assert report.level == "guided output" and f"level '{level}' is for a" in report.reason and report.reason in report.line()
    assert "this model is a UNet" in report.reason or "this model is a transformer" in report.reason


def test_a_policy_that_must_see_first_blocks_computes_a_unet_and_says_so():
    latent, report = run(model("sd15_like"), "sd15_like", cached={"policy": "first block", "policy_knobs": {"threshold": 1.0}})
    assert torch.equal(latent, sample(model("sd15_like"), "sd15_like")) and all(decisions(report))
    assert report.reason == "policy 'first block' must see the first blocks of a transformer and this model is a UNet, so everything is computed"


@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_call_that_is_not_understood_is_computed(level):
    def hide(executor, *args, **kwargs):
        options = {key: value for key, value in args[5].items() if key != "uuids"}
        return executor(*args[:5], options, *args[6:], **kwargs)

    patched = model("sd15_like").clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.hide", hide)
    latent, report = run(patched, "sd15_like", cached={"level": level})
    assert torch.equal(latent, sample(model("sd15_like"), "sd15_like")) and report.evaluations == STEPS


@pytest.mark.parametrize(("policy", "steps", "computed"), [
    ("key steps", 50, {0, 1, 2, 3, 5, 10, 15, 25, 35, 49}),
    ("centred interval", 50, {0, 5, 9, 13, 17, 21, 26, 31, 37, 43, 49})])
@pytest.mark.parametrize("level", UNET_LEVELS)
def test_the_published_schedules_compute_the_published_steps(level, policy, steps, computed):
    latent, report = run(model("sd15_like"), "sd15_like", steps=steps, scheduler="normal", cfg=1.0,
                         cached={"policy": policy, "level": level, "max_consecutive_skips": 20})
    assert {n for n, was in enumerate(decisions(report)) if was} == computed
    assert torch.isfinite(latent).all()


def test_wrappers_see_the_call_as_the_host_makes_it():
    seen: list = []
    patched = spied(attached(model("sd15_like"), level="unet depth"), WrappersMP.DIFFUSION_MODEL, lambda executor, args, kwargs: seen.append(
        (len(args), *sorted(kwargs))))
    sample(patched, "sd15_like")
    assert len(set(seen)) == 1 and seen[0] == (6,)
