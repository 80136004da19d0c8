"""Reference Latent Cache in mode freeze: what it promises of an approximation, and the errors that it tells."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from edit_models import FREEZE, both, cached, conditioning, near, network_of, patcher, references, rows_of, stacks, told
from harness import STEPS, Control, model, sample, spied
from test_easycontrol import condition

from pack.core.reference import join, kept, latents
from pack.core.reference.bank import Bank
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.told import share
from testbed import tiny


@pytest.mark.parametrize("settings", [{"first": STEPS}, {"refresh": 1}, {"refresh": 1, "measure": True}], ids=str)
@pytest.mark.parametrize("name", FREEZE)
def test_freezing_nothing_is_bit_identical_to_the_host(name, settings):
    assert torch.equal(sample(cached(patcher(name), **settings), name, **both(name)), sample(patcher(name), name, **both(name)))


@pytest.mark.parametrize("name", FREEZE)
def test_frozen_references_leave_the_sequence_after_the_first_evaluations(name):
    lengths = rows_of(name, cached(patcher(name), first=3), cfg=1.0)
    plain = rows_of(name, patcher(name), cfg=1.0)
    assert len(lengths) == len(plain) == STEPS and lengths[:3] == plain[:3] and len(set(plain)) == 1
    assert len(set(lengths[3:])) == 1 and lengths[3] == plain[0] - {"flux2": 48, "omni": 8 + 8 + 16 + 8, "omni_plain": 8 + 16}.get(name, 12)


@pytest.mark.parametrize("name", FREEZE)
def test_frozen_references_are_approximate_and_near_and_better_than_none(name):
    full, records = sample(patcher(name), name, **both(name)), []
    frozen = sample(cached(patcher(name), records), name, **both(name))
    bare = sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12))
    off = (frozen - full).norm() / full.norm()
    assert 1e-6 < off < (bare - full).norm() / full.norm()
    assert (records[0].full, records[0].frozen, records[0].errors) == (2, STEPS - 2, {}) and "error not measured" in records[0].line()


@pytest.mark.parametrize("name", FREEZE)
def test_k_and_v_taken_at_the_same_sigma_and_latent_give_the_full_prediction(name):
    """What is frozen is right, block by block: with nothing having moved since, nothing changes."""
    got = []

    def twice(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.extend(denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args).clone() for _ in range(3))
        return x

    noise = tiny.noise(name, batch=2)
    with torch.inference_mode():
        comfy.sample.sample_custom(cached(patcher(name), first=1), noise, 3.0, comfy.samplers.KSAMPLER(twice), torch.tensor([0.8, 0.0]),
                                   *both(name, *references(name, 31, 32)).values(), noise * 0, disable_pbar=True, seed=1)
    assert torch.equal(got[1], got[2]) and (got[0] - got[1]).abs().max() <= 2e-5 * got[0].abs().max()


def replayed(patched, name, points, cfg):
    """The guided predictions of a model at these latents and sigmas, in one run."""
    got = []

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.extend(denoise(x, now * x.new_ones(len(x)), **extra_args).clone() for x, now in points)
        return x

    noise = tiny.noise(name)
    with torch.inference_mode():
        comfy.sample.sample_custom(patched, noise, cfg, comfy.samplers.KSAMPLER(sampler), torch.tensor([0.9, 0.2]), *both(name).values(), noise * 0,
                                   disable_pbar=True, seed=1)
    return got


@pytest.mark.parametrize("name", FREEZE)
def test_the_errors_that_are_told_are_the_true_ones_of_their_evaluations(name):
    """The first frozen evaluation, and a refresh: against the host at the very same latents, with K and V of the same evaluation."""
    points = [(torch.randn(tiny.noise(name).shape, generator=torch.Generator().manual_seed(i)), torch.tensor(0.9 - 0.1 * i)) for i in range(7)]
    records, silent = [], []
    run = replayed(cached(patcher(name), records, refresh=3, measure=True), name, points, cfg=1.0)
    unmeasured = replayed(cached(patcher(name), silent, refresh=3), name, points, cfg=1.0)
    hosts, from_1 = (replayed(patched, name, points, cfg=1.0) for patched in (patcher(name), cached(patcher(name))))
    assert all(map(torch.equal, run, unmeasured)) and list(silent[0].errors) == [4] and list(records[0].errors) == [2, 4]
    assert [torch.equal(a, b) for a, b in zip(run, hosts, strict=True)] == [True, True, False, False, True, False, False]
    assert records[0].errors[2] == pytest.approx(told(run[2], hosts[2]), rel=1e-7) and records[0].errors[2] > 1e-6
    assert records[0].errors[4] == pytest.approx(told(from_1[4], hosts[4]), rel=1e-7) and silent[0].errors[4] == records[0].errors[4]
    assert f"{share(records[0].errors[4])} of the denoised latent at evaluation 4" in records[0].line()
    assert (records[0].full, records[0].frozen, records[0].mixed) == (3, 4, 0)


def denoised(patched, name: str, cfg: float, conds: dict) -> list:
    """What the sampler gets at every step."""
    got = []
    sample(patched, name, cfg=cfg, steps=4, callback=lambda step, x0, x, total: got.append(x0.clone()), **conds)
    return got


@pytest.mark.parametrize("sides", ["alike", "unlike", "positive alone"])
@pytest.mark.parametrize("cfg", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_the_error_is_that_of_what_the_sampler_gets_with_guidance(name, cfg, sides):
    """Of the first frozen evaluation, whose latent is that of the host's run: nothing was frozen before it."""
    negative = {"alike": references(name, 31), "unlike": references(name, 33, 34), "positive alone": []}[sides]
    conds, records = {"positive": conditioning(name, 11, *references(name, 31)), "negative": conditioning(name, 12, *negative)}, []
    frozen, full = denoised(cached(patcher(name), records, measure=True), name, cfg, conds), denoised(patcher(name), name, cfg, conds)
    assert torch.equal(frozen[1], full[1]) and records[0].errors == {2: pytest.approx(told(frozen[2], full[2]), rel=1e-3)}
    assert "of the denoised latent at evaluation 2" in records[0].line()


def rescaled(patched):
    """Guidance of another kind than cfg's."""
    clone = patched.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    return clone


@pytest.mark.parametrize("kind", ["post cfg", "two prompts"])
def test_an_error_that_is_not_of_the_denoised_latent_is_told_as_what_it_is(kind):
    records, watched = [], []

    def wrapper(executor, *args, **kwargs):
        watched.append(executor(*args, **kwargs).clone())
        return watched[-1]

    patched = cached(rescaled(patcher("flux2")) if kind == "post cfg" else patcher("flux2"), records, measure=True)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.watch", wrapper)     # behind the cache, so it sees what is computed to measure
    more = conditioning("flux2", 13, *references("flux2", 33)) if kind == "two prompts" else []
    conds = {"positive": conditioning("flux2", 11, *references("flux2", 31, 32)) + more, "negative": conditioning("flux2", 12, *references("flux2", 33))}
    sample(patched, "flux2", **conds)       # of unlike references, so there are two calls
    frozen, full = torch.cat(watched[4:8:2]), torch.cat(watched[5:8:2])
    assert records[0].errors == {2: pytest.approx(told(frozen, full), rel=1e-7)}
    assert "of the predictions before guidance at evaluation 2" in records[0].line()


@pytest.mark.parametrize(("settings", "said"), [
    ({"refresh": 1}, "refresh_every 1 computes every evaluation in full, so nothing was frozen; choose 2 or more, or 0 for never"),
    ({"first": STEPS}, "no evaluation came after those that are computed in full")])
def test_a_run_that_froze_nothing_says_why(settings, said):
    records = []
    sample(cached(patcher("flux2"), records, **settings), "flux2", **both("flux2"))
    assert said in records[0].line()


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_only_the_sides_that_are_computed_are_reserved_for(cfg, monkeypatch):
    seen, real = [], latents.Freezing.needed
    monkeypatch.setattr(latents.Freezing, "needed", lambda *args: seen.append(real(*args)) or seen[-1])
    records = []
    sample(cached(patcher("flux2"), records), "flux2", cfg=cfg, **both("flux2"))
    kept = records[0].bytes
    assert seen == [pytest.approx(kept, rel=0.05)]     # positions are beside it


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "omni"])
def test_each_condition_and_each_picture_of_a_batch_has_its_own_k_and_v(name):
    noise = tiny.noise(name, batch=2)
    conds = {"positive": conditioning(name, 11, *references(name, 31)), "negative": conditioning(name, 12, *references(name, 32))}
    patched, sizes = cached(patcher(name)), []
    whole = sample(spied(patched, WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: sizes.append(len(args[0]))), name, noise=noise, **conds)
    assert set(sizes) == {4}
    alone = torch.cat([sample(patched, name, noise=noise[i:i + 1], **conds) for i in range(2)])
    assert (whole - alone).abs().max() <= 1e-4 * whole.abs().max()
    shared = {**conds, "negative": conditioning(name, 12, *references(name, 31))}
    assert not near(sample(patched, name, noise=noise, **shared), whole, 1e-3)


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "krea2_edit", "omni"])
def test_positive_and_negative_of_unlike_references_are_run_apart_and_kept_apart(name):
    conds = {"positive": conditioning(name, 11, *references(name, 31, 32)), "negative": conditioning(name, 12, *references(name, 33))}
    records = []
    got = sample(cached(patcher(name), records), name, **conds)
    assert torch.isfinite(got).all() and records[0].frozen == STEPS - 2
    full = sample(patcher(name), name, **conds)
    assert 1e-6 < told(got, full) < told(sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12)), full)


@pytest.mark.parametrize("name", ["qwen_image", "qwen_2511"])
def test_a_text_mask_reaches_qwen_s_attention_with_frozen_references(name):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    conds = both(name, attention_mask=mask)
    full, frozen = (sample(patched, name, **conds) for patched in (patcher(name), cached(patcher(name))))
    unmasked = sample(cached(patcher(name)), name, **both(name))
    assert 1e-7 < told(frozen, full) < told(unmasked, full)


def test_conditions_that_start_late_are_in_full_first():
    late = conditioning("flux2", 13, *references("flux2", 32), start_percent=0.5, end_percent=1.0)
    early = conditioning("flux2", 11, *references("flux2", 31), start_percent=0.0, end_percent=0.5)
    conds = {"positive": early + late, "negative": conditioning("flux2", 12, *references("flux2", 31))}
    records = []
    sample(cached(patcher("flux2"), records), "flux2", **conds)
    assert records[0].full + records[0].mixed == 4 and records[0].frozen == STEPS - 4


def test_fp8_halves_what_is_kept_or_better_and_is_further_off():
    records = {}
    full = sample(patcher("flux2"), "flux2", **both("flux2"))
    off = {}
    for storage in ("same", "fp8"):
        records[storage] = []
        off[storage] = told(sample(cached(patcher("flux2"), records[storage], storage=storage), "flux2", **both("flux2")), full)
    same, fp8 = (records[storage][0].bytes for storage in ("same", "fp8"))
    assert same == 2 * 3 * 2 * 48 * 128 * 4 + 2 * 48 * 4 * 4 and fp8 < same / 3.5
    assert off["fp8"] != off["same"] and off["fp8"] < 3 * off["same"] + 0.05


@pytest.mark.parametrize("name", FREEZE)
def test_what_is_reserved_is_what_is_kept(name, monkeypatch):
    records, asked, needed, real = [], [], [], latents.Freezing.needed
    monkeypatch.setattr(latents.Freezing, "needed", lambda self, *args: needed.append(real(self, *args)) or needed[-1])
    spy = spied(cached(patcher(name), records), WrappersMP.PREPARE_SAMPLING, lambda executor, args, kwargs: asked.append(args[1]))
    sample(spy, name, batch=2, **both(name))
    assert needed[0] <= records[0].bytes <= needed[0] * 1.1 and asked[0][-1] > tiny.noise(name).shape[-1]


def test_freezing_goes_together_with_controlnet_and_an_attention_override():
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    for name in ("omni", "qwen_image"):
        patched = cached(patcher(name)).clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        calls.clear()
        conds = both(name, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]])) if name == "qwen_image" else both(name)
        assert torch.equal(sample(patched, name, **conds), sample(cached(patcher(name)), name, **conds)) and len(calls) >= STEPS * len(stacks(name))
    control = {"control": Control(1, 2, tokens=64), "control_apply_to_uncond": True}
    records = []
    got = sample(cached(patcher("flux2"), records), "flux2", **both("flux2", **control))
    assert records[0].frozen == STEPS - 2 and not near(got, sample(cached(patcher("flux2")), "flux2", **both("flux2")), 1e-3)


def test_a_krea_2_that_makes_no_tokens_of_its_references_is_left_alone_and_the_reason_is_told():
    records, latent = [], references("krea2_edit", 31)[0]
    conds = [ReferenceLatent.execute(tiny.conditioning("krea2", seed), {"samples": latent}).result[0] for seed in (11, 12)]
    got = sample(cached(model("krea2"), records), "krea2", positive=conds[0], negative=conds[1])
    assert torch.equal(got, sample(model("krea2"), "krea2", positive=conds[0], negative=conds[1])) and "Edit Model Reference Method" in records[0].line()


def test_tiles_are_computed_in_full():
    def tiled(patched):
        clone = patched.clone()
        clone.set_model_unet_function_wrapper(lambda apply, args: torch.cat([
            apply(args["input"][..., part:part + 4], args["timestep"], **args["c"]) for part in (0, 4)], -1))
        return clone

    records = []
    assert torch.equal(sample(tiled(cached(patcher("flux2"), records)), "flux2", **both("flux2")), sample(tiled(patcher("flux2")), "flux2", **both("flux2")))
    assert "as tiling does" in records[0].line() and not records[0].frozen


@pytest.mark.parametrize("name", ["flux2", "omni"])
@pytest.mark.parametrize("where", ["taking", "attending"])
def test_without_memory_for_it_the_run_is_the_host_s_own(name, where, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    if where == "taking":
        monkeypatch.setattr(kept, "stored", full)
    else:
        monkeypatch.setattr(join.Buffers, "joined", full)
    records = []
    assert torch.equal(sample(cached(patcher(name), records), name, **both(name)), sample(patcher(name), name, **both(name)))
    assert "memory ran out" in records[0].line() and not records[0].frozen


def test_a_compiled_model_is_computed_in_full():
    records, compiled = [], patcher("flux2").clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, latents.COMPILE, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert torch.equal(sample(cached(compiled, records), "flux2", **both("flux2")), sample(patcher("flux2"), "flux2", **both("flux2")))
    assert "torch.compile" in records[0].line()


def test_guidance_that_skips_layers_is_computed_in_full_beside_a_frozen_main_pass():
    def guided(patched):
        return SkipLayerGuidanceDiT.execute(patched, 2.0, 0.0, 1.0, "", "1").result[0]

    records = []
    got = sample(cached(guided(patcher("flux2")), records), "flux2", **both("flux2"))
    assert (records[0].full, records[0].frozen, records[0].mixed) == (2, 0, STEPS - 2)
    full, unguided = sample(guided(patcher("flux2")), "flux2", **both("flux2")), sample(patcher("flux2"), "flux2", **both("flux2"))
    assert 1e-6 < told(got, full) < told(unguided, full)


@pytest.mark.parametrize("order", ["injector first", "injector last"])
def test_frozen_references_go_together_with_easycontrol(order):
    net, name, bank = network_of("flux"), "flux", Bank()
    handle = Handle((Reference(condition(net)),))
    conds = {side: with_references(texts, handle) for side, texts in both(name).items()}

    def made(**settings):
        if order == "injector first":
            return cached(attach_references(patcher(name), bank=bank), **settings)
        return attach_references(cached(patcher(name), **settings), bank=bank)

    full = sample(attach_references(patcher(name), bank=bank), name, **conds)
    assert torch.equal(sample(made(refresh=1), name, **conds), full)
    without = sample(patcher(name), name, **both(name))
    assert 1e-6 < told(sample(made(), name, **conds), full) < told(without, full)
