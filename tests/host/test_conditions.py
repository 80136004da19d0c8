"""Conditions: batched or split, several of them, with areas, in windows, in batches. Each keeps to its own history."""
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import CONCRETE, EVERY_SECOND, QUICK, attached, decisions, model, plain, relative, replay_errors, run, sample, spied, windowed

from pack.core.store import Row
from testbed import tiny

GATED = [("interval", level) for level in CONCRETE] + [("first block", "block range")]
KNOBS = {"interval": {}, "first block": {"threshold": 0.3}}


def memory(monkeypatch, patcher, plan):
    """`plan(n)` tells whether the host finds room for all conditions at once on its n-th look."""
    looks = []

    def free(self, device):
        looks.append(1)
        return 1 << 50 if plan(len(looks)) else 0

    monkeypatch.setattr(type(patcher), "get_free_memory", free)


def two_areas(name: str, seed: int = 11) -> list:
    """Two prompts for the left and the right half, and a third for everything."""
    left, right, all_over = (tiny.conditioning(name, seed + n) for n in range(3))
    left[0][1].update(area=(8, 4, 0, 0), strength=1.0)
    right[0][1].update(area=(8, 4, 0, 4), strength=0.8)
    return left + right + all_over


@pytest.mark.parametrize(("policy", "level"), GATED)
@pytest.mark.parametrize("name", QUICK)
def test_batched_or_split_makes_the_same_latents_and_decisions(name, policy, level, monkeypatch):
    patched = attached(model(name), policy=policy, policy_knobs=KNOBS[policy], level=level, reports=(reports := []))
    latents = []
    for plan in (lambda n: True, lambda n: False, lambda n: n % 3 > 0, lambda n: n > 9, lambda n: n <= 7):
        with monkeypatch.context() as patch:
            memory(patch, patched, plan)
            latents.append(sample(patched, name))
    for latent, report in zip(latents[1:], reports[1:], strict=True):
        assert decisions(report) == decisions(reports[0]) and not all(decisions(report))
        assert torch.allclose(latent, latents[0], rtol=1e-4, atol=1e-4)
    assert relative(latents[0], plain(name)) > 1e-3, "the cache changes nothing here, so equal latents would prove nothing"


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("sampling", [{"cfg": 1.0}, {"batch": 4}, {"batch": 4, "cfg": 1.0}], ids=["cfg 1", "batch 4", "batch 4, cfg 1"])
@pytest.mark.parametrize("name", QUICK)
def test_without_guidance_and_in_batches_a_skip_repeats_the_computed_result(name, sampling, level):
    reports: list = []
    assert max(replay_errors(attached(model(name), policy=EVERY_SECOND, level=level, reports=reports), name, **sampling)) < 1e-6
    assert decisions(reports[0]).count(False) == 11


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_pictures_of_a_batch_are_those_of_runs_of_their_own(name, level):
    noise = tiny.noise(name, batch=2)
    together, _ = run(model(name), name, cached={"level": level}, noise=noise)
    alone = torch.cat([run(model(name), name, cached={"level": level}, noise=part)[0] for part in noise.split(1)])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_prompts_for_areas_keep_apart(name, level, split, monkeypatch):
    seen: set = set()
    shared: list = []

    def look(executor, args, kwargs):
        options = args[5] if len(args) > 5 else kwargs["transformer_options"]
        pairs = list(zip(options["uuids"], options["cond_or_uncond"], strict=True))
        seen.update(pairs)
        shared.append(len({uuid for uuid, _ in seen}) < len(seen))

    patched = spied(attached(model(name), policy=EVERY_SECOND, level=level), WrappersMP.APPLY_MODEL, look)
    memory(monkeypatch, patched, lambda n: not split)
    errors = replay_errors(patched, name, positive=two_areas(name), negative=tiny.conditioning(name, 14))
    assert max(errors) < 1e-6
    assert any(shared), "positive and negative share no uuid here, so the test would prove nothing"


@pytest.mark.parametrize("method", ["offset", "index"])
@pytest.mark.parametrize("level", CONCRETE)
def test_reference_latents_are_part_of_the_stream(level, method):
    """FLUX Kontext: reference tokens follow those of the image."""
    reference = {"reference_latents": [tiny.noise("flux", seed=9)], "reference_latents_method": method}
    conditions = {"positive": tiny.conditioning("flux", 11, **reference), "negative": tiny.conditioning("flux", 12, **reference)}
    assert relative(sample(model("flux"), "flux", **conditions), plain("flux")) > 0.01
    assert max(replay_errors(attached(model("flux"), policy=EVERY_SECOND, level=level), "flux", **conditions)) < 1e-6


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_under_a_mask_a_skip_repeats_the_computed_result(name, level):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6] = 1
    errors = replay_errors(attached(model(name), policy=EVERY_SECOND, level=level), name, noise_mask=mask)
    assert max(errors) < 1e-6


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_context_windows_keep_apart(name, level):
    windows: set = set()

    def look(executor, args, kwargs):
        windows.add(tuple(args[4]["transformer_options"]["context_window"].index_list))

    patcher = windowed(model(name), len(tiny.KINDS[name].latent()) - 1)     # over the width: a model of pictures knows no frames
    spy = spied(attached(patcher, policy=EVERY_SECOND, level=level, reports=(reports := [])), WrappersMP.CALC_COND_BATCH, look)
    assert max(replay_errors(spy, name, size=(8, 20))) < 1e-6
    assert len(windows) >= 3 and decisions(reports[0]).count(False) == 11


def test_rows_of_other_conditions_passes_windows_and_shapes_are_other_rows():
    row = Row("cpu", 0, "uuid", 0, None, (1, 16, 8, 8))
    others = [row._replace(device="cuda:1"), row._replace(ordinal=1), row._replace(uuid="other"), row._replace(cond=1),
              row._replace(window=(0, 1)), row._replace(shape=(1, 16, 8, 12))]
    assert len({row, *others}) == 7


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("times", [(0.5, 1.0), (0.0, 0.5)], ids=["appears", "goes"])
def test_a_condition_that_appears_or_goes_in_mid_run_is_not_predicted_across(name, level, times):
    timed = tiny.conditioning(name, 13)
    timed[0][1].update(start_percent=times[0], end_percent=times[1])
    latent, report = run(model(name), name, cached={"level": level, "policy_knobs": {"interval": 5, "warm_up": 1}},
                         positive=tiny.conditioning(name, 11) + timed)
    assert torch.isfinite(latent).all()
    border = model(name).get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = torch.tensor([e.sigma for e in report.each])      # the host compares in single precision
    first = (sigmas <= border if times[0] else sigmas < border).nonzero()[0].item()
    assert first % 5, "the schedule of the policy skips this one"
    assert decisions(report)[first] and not all(decisions(report))
