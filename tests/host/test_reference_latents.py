"""Reference Latent Cache on the host: what both modes promise, and the node."""
import inspect

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_flux import FluxKVCache
from edit_models import FREEZE, both, cached, conditioning, exact, joint, near, patcher, stacks, told
from harness import STEPS, attached, model, sample

from pack.core.reference import latents
from pack.core.reference.bank import Bank
from pack.core.reference.injector import attach_references
from pack.core.reference.latents import Settings
from pack.nodes import reference_latents as group
from testbed import tiny


@pytest.mark.parametrize("mode", ["exact", "freeze"])
@pytest.mark.parametrize("name", FREEZE)
def test_without_references_the_run_is_the_host_s(name, mode):
    records = []
    got = sample(cached(patcher(name), records, mode=mode), name, positive=conditioning(name, 11), negative=conditioning(name, 12))
    assert torch.equal(got, sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12)))
    assert "no condition carries a reference latent" in records[0].line()


@pytest.mark.parametrize("mode", ["exact", "freeze"])
@pytest.mark.parametrize("name", ["omnigen2", "z_image_pixel", "sd15_like", "wan"])
def test_a_model_that_is_not_known_is_the_host_s_own_run_and_says_so(name, mode):
    kind, records = tiny.KINDS[name], []
    refs = [torch.randn(kind.latent(8), generator=torch.Generator().manual_seed(3))]
    conds = [ReferenceLatent.execute(tiny.conditioning(name, seed), {"samples": refs[0]}).result[0] for seed in (11, 12)]
    got = sample(cached(model(name), records, mode=mode), name, positive=conds[0], negative=conds[1])
    assert torch.equal(got, sample(model(name), name, positive=conds[0], negative=conds[1]))
    assert "computed in full" in records[0].line() and "0 evaluations" not in records[0].line()


def hooked(patched) -> dict:
    return {name: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)) for name, module in patched.model.named_modules()}


@pytest.mark.parametrize("mode", ["exact", "freeze"])
def test_nothing_is_left_on_the_model(mode):
    base = patcher("flux2")
    wrappers = {kind: {key: list(held) for key, held in found.items()} for kind, found in base.wrappers.items()}
    options = dict(base.model_options["transformer_options"])
    patched, hooks = cached(base, mode=mode), hooked(base)
    sample(patched, "flux2", **both("flux2"))
    assert {kind: {key: list(held) for key, held in found.items()} for kind, found in base.wrappers.items()} == wrappers
    assert base.model_options["transformer_options"] == options and latents.RUN not in patched.model_options["transformer_options"]
    assert hooked(base) == hooks


@pytest.mark.parametrize("mode", ["exact", "freeze"])
def test_a_guider_that_samples_twice_has_its_options_back_and_keeps_its_references(mode):
    guider, noise = comfy.samplers.CFGGuider(cached(attach_references(patcher("flux2"), bank=Bank()), mode=mode)), tiny.noise("flux2")
    guider.set_conds(*both("flux2").values())
    guider.set_cfg(3.0)
    options = guider.model_options
    with torch.inference_mode():
        runs = [guider.sample(noise, noise * 0, comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, 6), disable_pbar=True, seed=1) for _ in range(2)]
    assert guider.model_options is options and torch.equal(*runs)
    bare = sample(patcher("flux2"), "flux2", positive=conditioning("flux2", 11), negative=conditioning("flux2", 12), steps=5, sigmas=torch.linspace(1, 0, 6))
    assert not near(runs[1], bare, 1e-3)


@pytest.mark.parametrize("name", ["flux2", "omni"])
def test_an_interrupted_frozen_run_leaves_nothing(name):
    patched, records, calls = None, [], []
    patched = cached(patcher(name), records)

    def stop(module, args, kwargs=None):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = stacks(name)[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(patched, name, cfg=1.0, **both(name))
    handle.remove()
    assert records[0].frozen and latents.RUN not in patched.model_options["transformer_options"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in patcher(name).model.modules())
    assert torch.equal(sample(patched, name, **both(name)), sample(cached(patcher(name)), name, **both(name)))


@pytest.mark.parametrize("level", ["guided output", "model output", "block range", "automatic"])
@pytest.mark.parametrize("order", ["cache first", "cache last"])
@pytest.mark.parametrize("name", ["flux2", "omni", "qwen_image"])
def test_step_cache_and_frozen_references_serve_one_run(name, order, level):
    records, reports = [], []
    settings = {"measure": True, "refresh": 4}

    def stepped(patched):
        return attached(patched, policy="interval", level=level, reports=reports)

    patched = stepped(cached(patcher(name), records, **settings)) if order == "cache first" else cached(stepped(patcher(name)), records, **settings)
    got = sample(patched, name, **both(name))
    full = sample(patcher(name), name, **both(name))
    assert torch.isfinite(got).all() and told(got, full) < 0.5
    assert reports[0].computed < STEPS and records[0].frozen > 0 and "several times" not in reports[0].line() + records[0].line()
    assert all(error < 0.5 for error in records[0].errors.values()) and records[0].errors


def test_step_cache_and_exact_references_serve_one_run():
    reports, records = [], []
    patched = attached(exact(patcher("flux2"), records=records), policy="interval", level="block range", reports=reports)
    got = sample(patched, "flux2", **both("flux2"))
    assert reports[0].computed < STEPS and told(got, sample(joint(), "flux2", **both("flux2", method="index_timestep_zero"))) < 0.3
    assert records[0].entries.made


def test_the_host_s_own_cache_on_the_same_model_is_refused_in_one_sentence():
    theirs = FluxKVCache.execute(patcher("flux2")).result[0]
    for mode in ("exact", "freeze"):
        with pytest.raises(ValueError, match="Flux KV Cache"):
            cached(theirs, mode=mode)
        with pytest.raises(ValueError, match="take one of the two nodes away"):
            sample(FluxKVCache.execute(cached(patcher("flux2"), mode=mode)).result[0], "flux2", **both("flux2"))


# the node --------------------------------------------------------------------------------------------------------------
def execute(**inputs):
    node = group.ReferenceLatentCache.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return node.execute(patcher("flux2"), **inputs).result[0]


def test_the_node_s_schema_is_valid_says_what_is_approximate_and_is_off_by_default():
    schema = group.ReferenceLatentCache.GET_SCHEMA()
    schema.validate()
    parameters = inspect.signature(group.ReferenceLatentCache.execute).parameters
    assert {entry.id for entry in schema.inputs} == set(parameters) and all(entry.tooltip for entry in schema.inputs)
    assert all(entry.optional and entry.default == parameters[entry.id].default for entry in schema.inputs if entry.id != "model")
    assert "approximate" in schema.description and "another picture" in schema.description
    assert execute() is patcher("flux2") and execute(mode="off", measure=True) is patcher("flux2")


def test_the_node_puts_its_settings_on_the_model_and_refuses_what_cannot_be():
    patched = execute(mode="freeze", full_evaluations=4, refresh_every=5, measure=True, storage="fp8")
    assert patched.model_options["transformer_options"][latents.KEY].settings == Settings("freeze", 4, 5, True, "fp8")
    for wrong in ({"full_evaluations": 0}, {"refresh_every": -1}, {"full_evaluations": float("nan")}, {"mode": "magic"}, {"mode": "exact", "storage": "fp8"}):
        with pytest.raises(ValueError) as caught:
            execute(**{"mode": "freeze"} | wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
