"""UNets: what a skip runs, what it leaves alone, and that it repeats what was computed."""
import itertools
import logging
from dataclasses import dataclass, field

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
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

from pack.core.attach import RUN
from pack.core.families import FAMILIES, family_of
from pack.core.families.unet import costs
from pack.core.stepcache.corrections import CORRECTIONS
from pack.core.stepcache.levels import LEVELS
from testbed import tiny

PICTURES = ("sd15_like", "sdxl_like")
NAMES = [name for name in tiny.OF_FAMILY["unet"] if name != "sd15"]     # which has a full-size first level
UNET_LEVELS = [name for name, level in LEVELS.items() if getattr(level, "serves", None) == "unet"]
ANY_LEVELS = [name for name, level in LEVELS.items() if hasattr(level, "seam") and level.serves is None]
PLAIN = {"guided output": {"look_back": False}}     # a computed step repeats nothing when it makes up for the one before
BLOCKS = 9      # on either side
BRANCHES = (0, 1, 2, 4, 7, 11)     # the last is more than there are
VIDEO = {"svd_like": {"batch": 3}}
CASES = [("unet depth", {"branch": branch}) for branch in BRANCHES] + [("unet encoder", {})]
IDS = [f"{level} {knobs}" for level, knobs in CASES]
FEW = [CASES[0], CASES[3], CASES[-1]]


def blocks(patcher) -> list:
    """Input blocks, the middle one, output blocks."""
    net = network(patcher)
    return [*net.input_blocks, net.middle_block, *net.output_blocks]


def kept(level: str, knobs: dict) -> set[int]:
    """Places in `blocks` that a skip runs."""
    if level == "unet encoder":
        return set(range(BLOCKS + 1, 2 * BLOCKS + 1))
    shallow = min(knobs["branch"], BLOCKS - 2) + 1
    return set(range(shallow)) | set(range(2 * BLOCKS + 1 - shallow, 2 * BLOCKS + 1))


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


# ControlNet ----------------------------------------------------------------------------------------------------------
class Control(comfy.controlnet.ControlBase):
    """Fixed random residuals, with gaps, for every list that a ControlNet or a T2I adapter fills."""

    def __init__(self, lists=("input", "middle", "output"), factor=lambda call: {}):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = [(32, 8)] * 3 + [(32, 4)] + [(64, 4)] * 2 + [(64, 2)] + [(128, 2)] * 2
        made = [0.5 * torch.randn(1, width, size, size, generator=generator) for width, size in shapes]
        own = lambda: [None if n in (2, 5) else r.roll(n, 2) for n, r in enumerate(made)]
        # the host takes input residuals from the end, first block first, and output residuals from the end, last block's skip first
        self.residuals = {"input": own()[::-1], "middle": [made[-1].roll(1, 1)], "output": own()}
        self.residuals = {key: value if key in lists else [] for key, value in self.residuals.items()}
        self.calls, self.factor = 0, factor

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        factor = self.factor(self.calls)
        self.calls += 1
        scaled = lambda key, n, r: None if r is None else r.repeat(len(x_noisy), 1, 1, 1) * factor.get((key, n), factor.get(key, 1.0))
        return {key: [scaled(key, n, r) for n, r in enumerate(entries)] for key, entries in self.residuals.items()}

    def copy(self):
        return self


def controlled(name: str, control: Control) -> dict:
    both = {"control": control, "control_apply_to_uncond": False}
    return {"positive": tiny.conditioning(name, 11, **both), "negative": tiny.conditioning(name, 12, **both)}


@pytest.mark.parametrize(("name", "level", "knobs", "lists"), [
    *(("sd15_like", *case, ("input", "middle", "output")) for case in CASES), *(("sdxl_like", *case, ("middle", "output")) for case in FEW),
    *(("sd15_like", *case, ("input",)) for case in FEW)], ids=str)
def test_controlnet_is_neither_lost_nor_added_twice_on_a_skip(name, level, knobs, lists, caplog):
    conditions = controlled(name, Control(lists))
    host = sample(model(name), name, cfg=1.0, **conditions)
    assert relative(host, sample(model(name), name, cfg=1.0)) > 0.02, "the control does too little to be missed"
    exact, _ = run(model(name), name, cfg=1.0, cached={"policy": Never(), "level": level, "level_knobs": knobs}, **conditions)
    assert torch.equal(exact, host)
    with caplog.at_level(logging.WARNING):
        patched = attached(model(name), policy=EVERY_SECOND, level=level, level_knobs=knobs)
        assert max(replay_errors(patched, name, **conditions)) < 1e-6
    assert "control could not be applied" not in caplog.text


def doubled_on(odd: bool, **keys) -> Control:
    return Control(factor=lambda call: {key if n is None else (key, n): 2.0 for key, numbers in keys.items() for n in numbers} if call % 2 or not odd else {})


@pytest.mark.parametrize("branch", [0, 1, 4])
def test_residuals_of_shallow_blocks_are_those_of_now_and_those_of_deep_ones_those_that_are_kept(branch):
    """Output residual n goes to the skip connection of input block n: shallow below the branch."""
    name, patched = "sd15_like", attached(model("sd15_like"), policy=EVERY_SECOND, level="unet depth", level_knobs={"branch": branch})
    shallow, deep = tuple(range(branch + 1)), tuple(range(branch + 1, BLOCKS))

    def seconds(patcher, control):
        seen: list = []

        def twice(denoise, x, sigmas):
            for now, following in zip(sigmas, sigmas[1:], strict=False):
                first = denoise(x, now).clone()
                seen.append(denoise(x, now).clone())
                x = first + (x - first) * following / now
            return x

        sample_by(twice, patcher, name, cfg=1.0, **controlled(name, control))
        return torch.stack(seen[:-1])

    changed = seconds(patched, doubled_on(True, output=shallow))
    assert relative(changed, seconds(model(name), doubled_on(True, output=shallow))) < 1e-6
    assert relative(changed, seconds(model(name), Control())) > 1e-4
    unchanged = seconds(patched, doubled_on(True, output=deep, middle=(None,)))
    assert relative(unchanged, seconds(model(name), Control())) < 1e-6


# patches of others ---------------------------------------------------------------------------------------------------
def watched(name: str, seen: list):
    """Patches of every kind that note where they fire."""
    def look(kind, streams):
        def patch(*arguments):
            seen.append((kind, arguments[-1]["block"]))
            return arguments[0] if streams == 1 else arguments[:2]
        return patch

    patched = model(name).clone()
    patched.set_model_input_block_patch(look("input_block_patch", 1))
    patched.set_model_input_block_patch_after_skip(look("input_block_patch_after_skip", 1))
    patched.set_model_output_block_patch(look("output_block_patch", 2))
    return patched


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_patches_of_others_fire_where_their_block_runs_and_nowhere_else(level, knobs):
    seen: list = []
    per_call = []
    patched = attached(watched("sd15_like", seen), level=level, level_knobs=knobs, reports=(reports := []))

    def callback(step, denoised, x, total):
        per_call.append(list(seen))
        seen.clear()

    sample(patched, "sd15_like", cfg=1.0, callback=callback)
    ways = [("input", n) for n in range(BLOCKS)] + [("middle", 0)] + [("output", n) for n in range(BLOCKS)]

    def wanted(places):
        inputs = [(kind, ways[n]) for n in places if n < BLOCKS for kind in ("input_block_patch", "input_block_patch_after_skip")]
        return inputs + [("output_block_patch", ways[n]) for n in places if n > BLOCKS]

    assert per_call == [wanted(range(2 * BLOCKS + 1)) if computed else wanted(sorted(kept(level, knobs))) for computed in decisions(reports[0])]
    assert decisions(reports[0]).count(False) == 4


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
@pytest.mark.parametrize("name", PICTURES[:1])
def test_freeu_acts_once_on_both_kinds_of_step(name, level, knobs):
    """It writes into h and gives another skip connection."""
    patched = FreeU_V2.execute(model(name), 1.3, 1.4, 0.9, 0.2).result[0]
    host = sample(patched, name, cfg=1.0)
    assert relative(host, sample(model(name), name, cfg=1.0)) > 5e-3
    assert torch.equal(run(patched, name, cfg=1.0, cached={"policy": Never(), "level": level, "level_knobs": knobs})[0], host)
    assert max(replay_errors(attached(patched, policy=EVERY_SECOND, level=level, level_knobs=knobs), name, cfg=1.0)) < 1e-6


@pytest.mark.parametrize(("end", "after_skip"), [(1.0, False), (0.4, True)])
@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_a_downscaled_middle_is_kept_and_put_back_downscaled(level, knobs, end, after_skip):
    patched = PatchModelAddDownscale.execute(model("sd15_like"), 3, 2.0, 0.0, end, after_skip, "bicubic", "bicubic").result[0]
    sampling = {"size": 16, "cfg": 1.0}
    assert relative(sample(patched, "sd15_like", **sampling), sample(model("sd15_like"), "sd15_like", **sampling)) > 1e-3
    assert max(replay_errors(attached(patched, policy=EVERY_SECOND, level=level, level_knobs=knobs), "sd15_like", **sampling)) < 1e-6
    latent, report = run(patched, "sd15_like", **sampling, cached={
        "level": level, "level_knobs": knobs, "policy_knobs": {"interval": 4, "warm_up": 1}})
    assert torch.isfinite(latent).all() and not all(decisions(report))


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_attention_has_the_same_number_on_both_kinds_of_step(level, knobs):
    numbers: dict = {}

    def look(q, context, value, extra):
        numbers.setdefault(extra["block"], set()).add(extra["transformer_index"])
        return q, context, value

    patched = model("sd15_like").clone()
    patched.set_model_attn1_patch(look)
    sample(attached(patched, level=level, level_knobs=knobs), "sd15_like", cfg=1.0)
    assert len(numbers) >= 10 and all(len(seen) == 1 for seen in numbers.values())


@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_patch_that_counts_its_blocks_makes_the_level_compute_and_say_so(level):
    patched = model("sd15_like").clone()
    patched.set_model_patch(lambda parts: {"h": parts["h"] * 1.1}, "middle_block_after_patch")
    host = sample(patched, "sd15_like")
    latent, report = run(patched, "sd15_like", cached={"level": level})
    assert torch.equal(latent, host) and all(decisions(report)) and report.evaluations == STEPS
    assert "behind the middle block" in report.reason


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_network_that_does_not_ask_for_the_kept_feature_is_computed_and_that_is_said(level, late):
    """A wrapper below ours that drops all patches."""
    calls: list = []

    def bare(executor, *args, **kwargs):
        calls.append(1)
        if late and len(calls) < 4:
            return executor(*args, **kwargs)
        return executor(*args[:5], {**args[5], "patches": {}}, **kwargs)

    patched = attached(model("sd15_like"), level=level, reports=(reports := []))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.bare", bare)
    latent = sample(patched, "sd15_like", cfg=1.0)
    assert torch.equal(latent, sample(model("sd15_like"), "sd15_like", cfg=1.0))
    assert all(decisions(reports[0])) and reports[0].evaluations == STEPS and "did not pass its output blocks" in reports[0].reason


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


def test_a_policy_that_must_see_first_blocks_computes_a_unet_and_says_so():
    latent, report = run(model("sd15_like"), "sd15_like", cached={"policy": "first block", "policy_knobs": {"threshold": 1.0}})
    assert torch.equal(latent, sample(model("sd15_like"), "sd15_like")) and all(decisions(report))
    assert "cannot see its first blocks" in report.reason


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
