"""Looking back on the host's own samplers: nearer to the full run, and out of the way where it does not belong."""
import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import CONCRETE, STEPS, At, Never, attached, decisions, model, packed, plain, run, sample, sample_by, schedule, spied

from pack.core import attach
from pack.core.stepcache.solvers import SOLVERS
from testbed import tiny

NAMES = ["flux", "z_image"]
WITHOUT = ["heun", "euler_ancestral", "dpm_2", "res_multistep", "deis", "uni_pc", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm", "ipndm"]


def cached(look_back: bool, interval: int = 3, **more) -> dict:
    return {"policy": "interval", "policy_knobs": {"interval": interval}, "predictor": "hold", "level": "guided output",
            "level_knobs": {"look_back": look_back}, **more}


def decibels(latent: torch.Tensor, full: torch.Tensor) -> float:
    return -20 * math.log10(((latent - full).norm() / full.norm()).item())


def gain(name: str, **sampling) -> float:
    """By how much the final latent is nearer to the full run's with look back than without, the mean over seeds in dB."""
    gains, interval = [], sampling.pop("interval", 3)
    for seed in (21, 22):
        sampling["noise"] = tiny.noise(name, seed=seed)
        full = sample(model(name), name, **sampling)
        made_up, left = (run(model(name), name, cached=cached(look, interval), **sampling) for look in (True, False))
        assert decisions(made_up[1]) == decisions(left[1]) and decisions(left[1]).count(False) >= 4
        gains.append(decibels(made_up[0], full) - decibels(left[0], full))
    return sum(gains) / len(gains)


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize(("sampler", "least"), [("euler", 5.0), ("ddim", 5.0), ("dpmpp_2m", 1.5)])
@pytest.mark.parametrize("name", NAMES)
def test_the_final_latent_is_nearer_to_the_full_run(name, sampler, least, interval):
    assert gain(name, sampler=sampler, interval=interval, cfg=1.0, steps=20) > least


@pytest.mark.parametrize("sampler", SOLVERS)
def test_so_it_is_with_guidance_and_in_the_variance_exploding_form(sampler):
    assert gain("flux", sampler=sampler, cfg=3.0, steps=20) > 2.5
    assert gain("sd15_like", sampler=sampler, cfg=3.0, steps=20, scheduler="karras") > 2.5


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("name", NAMES)
def test_under_a_mask_it_is_nearer_too_and_what_is_kept_stays(name, sampler, cfg):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6] = 1
    sampling = {"sampler": sampler, "cfg": cfg, "steps": 20, "noise_mask": mask}
    full = sample(model(name), name, **sampling)
    (made_up, _), (left, _) = (run(model(name), name, cached=cached(look), **sampling) for look in (True, False))
    assert torch.isfinite(made_up).all() and decibels(made_up, full) > decibels(left, full) + 1.0
    assert torch.equal(made_up * (1 - mask), full * (1 - mask))


@pytest.mark.parametrize("sampler", SOLVERS)
def test_part_of_a_schedule_that_ends_above_zero_is_made_up_for(sampler):
    part = {"sampler": sampler, "steps": 24, "last_step": 13, "force_full_denoise": False, "cfg": 1.0}
    assert gain("flux", **part) > 1.5


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_skip_the_run_is_bit_identical_to_the_hosts(name, sampler):
    latent, report = run(model(name), name, sampler=sampler, cached=cached(True, policy=Never(), policy_knobs=None))
    assert torch.equal(latent, plain(name, sampler=sampler)) and report.estimated_error is None


# where it does not belong ----------------------------------------------------------------------------------------------
def caught(patcher, **more) -> tuple[object, list]:
    """The model with a step cache on it, and where its runs will be noted."""
    runs: list = []

    def look(executor, args, kwargs):
        found = args[2]["transformer_options"].get(attach.RUN)
        if found is not None and found not in runs:
            runs.append(found)

    return spied(attached(patcher, **more), WrappersMP.PREDICT_NOISE, look), runs


@pytest.mark.parametrize("sampler", WITHOUT)
def test_a_sampler_whose_step_is_not_known_is_left_alone(sampler):
    sampling = {"sampler": sampler, "cfg": 1.0}
    on, off = (run(model("flux"), "flux", cached=cached(look, 2), **sampling) for look in (True, False))
    assert torch.equal(on[0], off[0]) and not all(decisions(on[1]))
    assert on[1].estimated_error == off[1].estimated_error


def churned(look_back: bool, churn: float, **options) -> torch.Tensor:
    patcher = attached(model("flux"), **cached(look_back))
    noise = tiny.noise("flux")
    torch.manual_seed(5)        # of the churn
    with torch.inference_mode():
        return packed(comfy.sample.sample_custom(
            patcher, noise, 1.0, comfy.samplers.ksampler("euler", {"s_churn": churn, **options}), schedule("flux"), tiny.conditioning("flux", 11),
            tiny.conditioning("flux", 12), noise * 0, disable_pbar=True, seed=1))


def test_with_churn_euler_is_left_alone():
    assert torch.equal(churned(True, 0.5), churned(False, 0.5)) and not torch.equal(churned(True, 0.0), churned(False, 0.0))
    assert not torch.equal(churned(True, 0.5), churned(True, 0.0)), "there was churn"
    early = {"s_tmin": 0.9}
    assert torch.equal(churned(True, 0.5, **early), churned(False, 0.5, **early)), "also where it is only in part of the run"


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_a_sampler_that_is_set_to_add_noise_gets_one_skip_of_order_one_at_most(sampler, level):
    seen = {}
    for churn in (0.0, 0.5):
        patched, runs = caught(model("flux"), policy=At(tuple(range(100))), predictor="automatic", level=level, reports=(reports := []))
        torch.manual_seed(5)
        with torch.inference_mode():
            comfy.sample.sample_custom(
                patched, tiny.noise("flux"), 1.0, comfy.samplers.ksampler(sampler, {"s_churn": churn}), schedule("flux"), tiny.conditioning("flux", 11),
                tiny.conditioning("flux", 12), tiny.noise("flux") * 0, disable_pbar=True, seed=1)
        seen[churn] = "".join("s."[computed] for computed in decisions(reports[0])), reports[0].reason, runs[0].cache.store.depth
    assert "ss" in seen[0.0][0] and "noise" not in seen[0.0][1] and seen[0.0][2] == 3
    assert "s" in seen[0.5][0] and "ss" not in seen[0.5][0] and f"{sampler} is set to add noise" in seen[0.5][1] and seen[0.5][2] == 2


@pytest.mark.parametrize("level", CONCRETE)
def test_only_guided_output_looks_back(level):
    patched, runs = caught(model("flux"), level=level)
    sample(patched, "flux")
    assert len(runs) == 1 and (runs[0].cache.look_back is not None) == (level == "guided output")


def test_a_run_that_falls_back_to_model_output_looks_back_no_more():
    hooked = model("flux").clone()
    hooked.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    fallen, report = run(hooked, "flux", cached=cached(True))
    there, _ = run(hooked, "flux", cached=cached(True, level="model output", level_knobs=None))
    assert report.level == "model output" and torch.equal(fallen, there) and not all(decisions(report))
    patched, runs = caught(hooked, **cached(True))
    sample(patched, "flux")
    assert runs[0].cache.look_back is None


def test_a_sampler_that_evaluates_a_step_twice_under_its_name_is_left_alone():
    """Someone's own function may be called sample_euler; what is not the next step of the schedule is not made up for."""

    def twice(denoise, x, sigmas):
        for now, following in zip(sigmas, sigmas[1:], strict=False):
            d = (x - denoise(x, now)) / now
            ahead = x + (following - now) * d
            if following:
                d = (d + (ahead - denoise(ahead, following)) / following) / 2
            x = x + (following - now) * d
        return x

    some = {"policy": At(tuple(range(5, 20, 3))), "policy_knobs": None}
    on, off = (sample_by(twice, attached(model("flux"), **cached(look, **some)), "flux") for look in (True, False))
    assert torch.equal(on, off)


@pytest.mark.parametrize("again", [1, 4])
def test_a_schedule_that_repeats_a_sigma_is_sampled_as_the_host_does(again):
    """dpmpp_2m divides by zero there and gives no picture; that is the host's affair, and no reason to break off."""
    sigmas = schedule("flux")
    sigmas = torch.cat([sigmas[:again + 1], sigmas[again:]])
    noise = tiny.noise("flux")

    def sampled(patcher, sampler):
        with torch.inference_mode():
            return packed(comfy.sample.sample_custom(
                patcher, noise, 1.0, comfy.samplers.ksampler(sampler), sigmas, tiny.conditioning("flux", 11), tiny.conditioning("flux", 12), noise * 0,
                disable_pbar=True, seed=1))

    for sampler in SOLVERS:
        host, ours = sampled(model("flux"), sampler), sampled(attached(model("flux"), **cached(True, policy=Never(), policy_knobs=None)), sampler)
        assert torch.equal(host.nan_to_num(), ours.nan_to_num()) and torch.equal(host.isnan(), ours.isnan())
        skipped = sampled(attached(model("flux"), **cached(True)), sampler)
        assert torch.isfinite(skipped).all() or not torch.isfinite(host).all()


# the end ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [5, 6, 8])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_after_an_interrupt_nothing_is_left(sampler, stop):
    """In the middle of a group, before the computed step that ends it, and after one that made up for it."""
    patched, runs = caught(model("flux"), **cached(True))

    def interrupt(step, denoised, x, total):
        look_back = runs[-1].cache.look_back
        if step == stop:
            assert look_back.nodes and (look_back.skips or look_back.first_echo is not None), "there is something to leave behind"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, "flux", sampler=sampler, callback=interrupt)
    cache = runs[0].cache
    assert not cache.look_back.nodes and not cache.look_back.skips and cache.look_back.echo is cache.look_back.first_echo is None
    assert not any(h.stood_in or h.waiting for h in cache.streams.each.values()) and cache.store.bytes == 0
    assert attach.RUN not in patched.model_options["transformer_options"]
    fresh, _ = run(model("flux"), "flux", sampler=sampler, cached=cached(True))
    assert torch.equal(sample(patched, "flux", sampler=sampler), fresh) and len(runs) == 2


def test_a_change_in_mid_run_forgets_what_was_owed():
    """A latent of another width: what was skipped before it is not made up for after it."""
    seen: list = []

    def grows(denoise, x, sigmas):
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            if n == 6:
                x = torch.cat([x, x], -1)
            denoised = denoise(x, now)
            look_back = runs[-1].cache.look_back
            seen.append((len(look_back.nodes), len(look_back.skips), look_back.echo is not None))
            x = denoised + (x - denoised) * following / now
        return x

    patched, runs = caught(model("flux"), **cached(True, policy=At((4, 5, 8)), policy_knobs=None))
    assert torch.isfinite(sample_by(grows, patched, "flux")).all()
    assert seen[5] == (2, 2, False) and seen[6] == (1, 0, False) and seen[8] == (2, 1, False) and len(seen) == STEPS
