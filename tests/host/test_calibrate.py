"""Step Cache Calibrate: what it measures, what it leaves alone, and that Step Cache computes what the profile says."""
import math
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import ONE_PHASE, QUICK, assert_moves, attached, blocks, decisions, family, model, network, packed, plain, relative, sample, schedule, spied

from pack.core.attach import attach_step_cache, check_profile
from pack.core.run import Settings
from pack.core.step import Clock
from pack.core.stepcache.calibrate import Calibration, facts_of, listened, profiles_folder
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.levels.automatic import Automatic as AutomaticLevel
from pack.core.stepcache.policies.profile import FromProfile
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.predictors.automatic import Automatic as AutomaticPredictor
from pack.core.stepcache.profiles import Profile, read
from pack.core.stepcache.profiles.recording import Recording
from pack.nodes.step_cache_calibrate import StepCacheCalibrate
from testbed import tiny

STEPS = 12


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    return tmp_path


def empty(name: str = "flux", size: int = 8) -> dict:
    return {"samples": torch.full(tiny.noise(name, size=size).shape, 1e-6)}     # the host would give an empty one the channels of the full-size model


def execute(patcher=None, kind: str = "flux", sampler: str = "euler", steps: int = STEPS, cfg: float = 3.0, **more):
    """The node's profile and text."""
    patcher = patcher or model(kind)
    inputs = {"positive": tiny.conditioning(kind, 11), "negative": tiny.conditioning(kind, 12), "sampler": comfy.samplers.ksampler(sampler),
              "sigmas": schedule(kind, steps), "latent_image": empty(kind), "cfg": cfg, "name": "p", **more}
    with torch.inference_mode():
        called, text = StepCacheCalibrate.execute(patcher, **inputs).result
    return read(profiles_folder(), called), text


def refusal(*arguments, **more) -> str:
    with pytest.raises(ValueError) as caught:
        execute(*arguments, **more)
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 300
    assert not profiles_folder().exists()
    return str(caught.value)


def cached_run(target: str = "2x", reports=None, max_group: int = 5, **sampling):
    settings = Settings(FromProfile("p", target, max_group), AutomaticPredictor(), AutomaticLevel(), max_consecutive_skips=4)
    reports = [] if reports is None else reports
    latent = sample(attach_step_cache(model("flux"), settings, reports.append), "flux", **{"steps": STEPS, **sampling})
    return latent, reports[-1]


def evaluations(patcher, name: str = "flux", **sampling) -> list[tuple]:
    """(sigma, x, denoised after guidance) of every step, taken down by a wrapper of the test's own."""
    found = []

    def wrapper(executor, x, timestep, *rest):
        denoised = executor(x, timestep, *rest)
        found.append((float(timestep.flatten()[0]), x.clone(), denoised.clone()))
        return denoised

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.down", wrapper)
    sample(clone, name, **{"steps": STEPS, **sampling})
    return found


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", QUICK)
def test_a_run_that_is_listened_to_is_bit_identical_to_one_that_is_not(name, cfg):
    full = assert_moves(name, model(name), cfg=cfg)
    recording = Recording(family(name))
    listening = listened(model(name), recording, Clock(schedule(name).tolist(), True))
    before = [{**vars(block)} for block in blocks(name)]
    assert torch.equal(packed(sample(listening, name, cfg=cfg)), packed(full))
    assert [{**vars(block)} for block in blocks(name)] == before
    assert len(recording.derivatives) == STEPS
    if family(name).stacks:
        assert not recording.deaf and recording.growth.keys() == ({0} if cfg == 1.0 else {0, 1})


def test_nothing_is_left_on_the_model():
    options, wrappers = str(model("flux").model_options), str(model("flux").wrappers)
    before = {name for name, _ in network(model("flux")).named_modules()}, [{**vars(block)} for block in blocks("flux")]
    execute()
    assert (str(model("flux").model_options), str(model("flux").wrappers)) == (options, wrappers)
    assert ({name for name, _ in network(model("flux")).named_modules()}, [{**vars(block)} for block in blocks("flux")]) == before


def test_the_profile_tells_what_it_was_made_for(user):
    profile, text = execute(seeds=2, positive_2=tiny.conditioning("flux", 13))
    facts = profile.facts
    assert (facts.family, facts.model, facts.sampler, facts.steps, facts.cfg, facts.shape, facts.precision) == (
        "flux", "Flux", "euler", STEPS, 3.0, (16, 8, 8), "float32")
    assert facts.sigmas == pytest.approx(schedule("flux").tolist()) and profile.pictures == 4 and profile.pack == "0.1.0" and profile.looks_back
    assert sorted(path.name for path in (user / "reprise" / "profiles").iterdir()) == ["p.json", "p.safetensors"]
    assert "TeaCache coefficients, fitted on the modulated input" in text and "MagCache curve, negative condition" in text and "2x: 6 computed steps" in text
    assert [check.computed for check in profile.checks] == [4, 6] and all(0 < check.measured < 1 for check in profile.checks)


def test_overlaps_are_those_of_the_derivatives_after_guidance():
    profile, _ = execute()
    steps = evaluations(model("flux"), noise=torch.randn((1, 16, 8, 8), generator=torch.manual_seed(0)))
    d = torch.stack([((x - denoised) / sigma).flatten() for sigma, x, denoised in steps]).double()
    assert torch.allclose(profile.overlaps, d @ d.T / steps[-1][2].double().square().sum(), rtol=1e-4, atol=1e-8)
    change = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(d, d[1:], strict=False)]
    assert profile.each["output"] == (None, *map(pytest.approx, change))
    scale = [(d_n.norm() / denoised.double().norm()).item() for d_n, (_, _, denoised) in zip(d, steps, strict=True)]
    assert profile.each["scale"] == tuple(map(pytest.approx, scale))


def test_curves_are_those_of_the_blocks_by_another_way():
    """MagCache's ratios, the first block's residual and the modulated input, from hooks on the modules."""
    streams: dict[str, list] = {"in": [], "first": [], "out": [], "modulated": []}
    net = network(model("flux"))
    hooks = [
        net.double_blocks[0].register_forward_pre_hook(lambda m, args, kwargs: streams["in"].append(kwargs["img"].clone()), with_kwargs=True),
        net.double_blocks[0].register_forward_hook(lambda m, args, out: streams["first"].append(out[0].clone())),
        net.double_blocks[0].img_attn.qkv.register_forward_pre_hook(lambda m, args: streams["modulated"].append(args[0].clone())),
        net.single_blocks[-1].register_forward_hook(lambda m, args, out: streams["out"].append(out.clone())),
    ]
    try:
        sample(model("flux"), "flux", cfg=1.0, noise=torch.randn((1, 16, 8, 8), generator=torch.manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    tokens = streams["in"][0].shape[1]
    added = [(out[:, -tokens:] - x).norm(dim=-1) for out, x in zip(streams["out"], streams["in"], strict=True)]
    ratios = [(b / a).mean().item() for a, b in zip(added, added[1:], strict=False)]
    first = [out - x for out, x in zip(streams["first"], streams["in"], strict=True)]
    profile, _ = execute(cfg=1.0)
    assert profile.magcache == ((1.0, *map(pytest.approx, ratios)),)

    def change(tensors):
        return None, *(pytest.approx(((b - a).abs().mean() / a.abs().mean()).item(), rel=1e-3) for a, b in zip(tensors, tensors[1:], strict=False))

    assert profile.each["first block"] == change(first) and profile.each["modulated input"] == change(streams["modulated"])


@pytest.mark.parametrize("target", ["1.5x", "2x", "2.4x", "3x", "0.02", "0.2"])
def test_a_run_computes_exactly_the_steps_of_its_plan(target):
    profile, _ = execute()
    plans = profile.plans(4, [n > 0 for n in range(STEPS)], True)
    latent, report = cached_run(target)
    if target.endswith("x"):
        plan = plans[int(STEPS / float(target[:-1]) + 0.5)]
    else:
        plan = next(plan for _, plan in sorted(plans.items()) if profile.expected(plan) <= float(target))
    assert tuple(n for n, computed in enumerate(decisions(report)) if computed) == plan.computed and not report.reason
    assert report.policy == "profile" and report.settings["policy"] == {"name": "profile", "profile": "p", "target": target, "max_group": 5}


def test_a_check_is_what_a_run_with_that_plan_comes_to():
    profile, _ = execute()
    noise = torch.randn((1, 16, 8, 8), generator=torch.manual_seed(0))
    latent, report = cached_run("2x", noise=noise)
    full = sample(model("flux"), "flux", noise=noise)
    check = next(check for check in profile.checks if check.computed == report.computed)
    assert check.measured == pytest.approx(((latent - full).norm() / full.norm()).item(), rel=1e-3)


def test_trials_never_make_a_schedule_worse_and_what_they_find_is_used():
    before, _ = execute(seeds=2)
    after, text = execute(seeds=2, refine=12)
    assert after.refined, "no neighbour measured better, and this test proves nothing"
    for plan in after.refined:
        count = len(plan.computed)
        assert plan.measured < next(check.measured for check in after.checks if check.computed == count)
        assert plan.computed != before.plans(4, [True] * STEPS, True)[count].computed
        _, report = cached_run(f"{STEPS / count}x")
        assert tuple(n for n, computed in enumerate(decisions(report)) if computed) == plan.computed
    assert "bettered by trials" in text and after.checks == before.checks


DIFFERENT = {
    "cfg": {"cfg": 2.0}, "steps": {"steps": STEPS + 1}, "sampler": {"sampler": "dpmpp_2m"}, "sigmas": {"scheduler": "normal"}, "resolution": {"size": 16},
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_a_run_that_differs_is_computed_in_full_and_the_field_is_named(field):
    execute()
    latent, report = cached_run(**DIFFERENT[field])
    assert all(decisions(report)) and f"does not fit by its {field}: " in report.reason and "so everything is computed" in report.reason
    assert torch.equal(latent, sample(model("flux"), "flux", **{"steps": STEPS, **DIFFERENT[field]}))


def test_a_model_in_another_precision_is_told_before_the_run():
    execute()
    settings = Settings(FromProfile("p"), AutomaticPredictor(), AutomaticLevel())
    check_profile(model("flux"), settings)
    with pytest.raises(ValueError, match="does not fit by its precision: it was made for float32 and the run has bfloat16"):
        check_profile(tiny.patcher("flux", dtype=torch.bfloat16), settings)
    with pytest.raises(ValueError, match="does not fit by its family"):
        check_profile(model("z_image"), settings)
    with pytest.raises(ValueError, match="there is no profile 'q'; known: p"):
        check_profile(model("flux"), Settings(FromProfile("q"), AutomaticPredictor(), AutomaticLevel()))


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("level", [name for name, level in LEVELS.items() if getattr(level, "serves", None) != "unet"])
def test_a_profile_works_with_every_predictor_at_every_level(predictor, level):
    execute()
    settings = Settings(FromProfile("p", "2x"), PREDICTORS[predictor](), LEVELS[level](**ONE_PHASE.get(level, {})))
    reports = []
    latent = sample(attach_step_cache(model("flux"), settings, reports.append), "flux")
    assert decisions(reports[0]).count(True) == STEPS // 2 and 0 < relative(latent, plain("flux")) < 0.2


def test_a_missing_profile_lets_the_run_go_on_in_full():
    _, report = cached_run()
    assert all(decisions(report)) and "there is no profile 'p'" in report.reason


@pytest.mark.parametrize("at", [3, STEPS + 5])
def test_an_interrupt_leaves_no_file(at):
    calls = iter(range(10_000))

    def interrupt(executor, args, kwargs):
        if next(calls) == at:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(spied(model("flux"), WrappersMP.PREDICT_NOISE, interrupt))
    assert not profiles_folder().exists() or not list(profiles_folder().iterdir())


def test_the_progress_bar_comes_to_its_end(monkeypatch):
    seen = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: seen.append((value, total)))
    execute(seeds=2)
    assert seen[-1] == (2 * STEPS * 3, 2 * STEPS * 3) and [value for value, _ in seen] == sorted(value for value, _ in seen)


def test_what_cannot_be_calibrated_is_refused_in_one_sentence():
    assert "a Step Cache on it" in refusal(attached(model("flux")))
    assert "evaluate each step once" in refusal(sampler="heun")
    assert "below 9" in refusal(steps=8)
    assert "do not fall" in refusal(sigmas=torch.tensor([1.0, *[0.5] * 12, 0.0]))
    assert "name is '../p'" in refusal(name="../p")
    easy = model("flux").clone()
    easy.model_options["transformer_options"]["easycache"] = object()
    assert "EasyCache is on the same model" in refusal(easy)
    with pytest.raises(ValueError, match="takes one latent"):
        Calibration(model("flux"), [], comfy.samplers.ksampler("euler"), schedule("flux"), 1.0, {"samples": torch.zeros(1, 16, 8)})


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_model_whose_output_is_no_number_is_told_in_one_sentence(cfg):
    calls = iter(range(10_000))

    def overflow(executor, *args, **kwargs):
        return executor(*args, **kwargs) * (math.nan if next(calls) == 4 else 1.0)

    broken = model("flux").clone()
    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.overflow", overflow)
    assert "output at step 4 has values that are no numbers" in refusal(broken, cfg=cfg)


@pytest.mark.parametrize(("sampler", "options", "steady"), [("euler", {"s_churn": 0.0}, True), ("euler", {"s_churn": 0.5}, False), ("heun", {}, True)])
@pytest.mark.parametrize(("steps", "longest"), [(9, 4), (28, 4), (30, 5), (40, 5), (100, 5)])
def test_plans_have_as_many_skips_in_a_row_as_a_run_of_that_length_allows(steps, longest, sampler, options, steady):
    calibration = Calibration(model("flux"), [], comfy.samplers.ksampler(sampler, options), schedule("flux", steps), 1.0, empty())
    assert calibration.limits == (longest if steady else 1, [0 < n < steps - 1 for n in range(steps)])
    assert calibration.looks_back == (steady and sampler == "euler"), "with churn a computed step cannot make up for anything"


def test_the_steps_in_the_text_are_those_that_a_run_computes():
    _, text = execute(steps=40, cfg=1.0)
    for target in ("3x", "4x"):
        reports: list = []
        settings = Settings(FromProfile("p", target), AutomaticPredictor(), AutomaticLevel(), max_consecutive_skips=0)
        sample(attach_step_cache(model("flux"), settings, reports.append), "flux", steps=40, cfg=1.0)
        computed = ", ".join(str(n) for n, one in enumerate(decisions(reports[0])) if one)
        assert f"\n{target}: {reports[0].computed} computed steps, {computed}, expected" in text


def test_options_of_a_sampler_are_facts_and_no_part_of_its_name():
    made = facts_of(model("flux"), comfy.samplers.ksampler("dpmpp_2m", {"s_noise": 1.0}), schedule("flux").tolist(), (16, 8, 8), 1.0)
    assert made.sampler == "dpmpp_2m with s_noise 1.0" and made.sampler_function == "dpmpp_2m" == replace(made, sampler="dpmpp_2m").sampler_function
    names = made.sampler, "dpmpp_2m", "euler with s_noise 1.0", "euler"
    gains = [Profile(replace(made, sampler=name), True, torch.eye(STEPS), 1).steps(True)[1] for name in names]
    assert gains[0] == gains[1] != gains[2] == gains[3]


def test_a_sampler_that_adds_noise_gets_single_skips():
    profile, _ = execute(sampler="euler_ancestral")
    assert profile.checks and not profile.looks_back
    _, report = cached_run("3x", sampler="euler_ancestral")
    computed = decisions(report)
    assert not any(not a and not b for a, b in zip(computed, computed[1:], strict=False)) and "no fewer than" in report.reason


@pytest.mark.parametrize("name", [name for name in QUICK if name not in ("flux", "ltxav")])
def test_every_family_can_be_calibrated(name):
    profile, text = execute(kind=name, cfg=1.0)
    assert profile.checks and profile.facts.family == family(name).name and f"2x: {STEPS // 2} computed steps" in text
    assert len(profile.magcache) == (1 if family(name).stacks else 0)


def test_the_node_s_schema_is_valid_and_every_input_tells_what_it_is_for():
    schema = StepCacheCalibrate.GET_SCHEMA()
    schema.validate()
    assert all(entry.tooltip for entry in schema.inputs) and all(output.tooltip for output in schema.outputs) and schema.is_output_node
