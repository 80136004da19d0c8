"""Every system of references in every situation: what is right alone is right in a batch, with guidance, by regions, with a LoRA, again and after a stop.

That each is right alone is shown by its own tests, against attention that is written out independently.
"""
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
import tryon
from comfy_extras.nodes_flux import FluxKVCache
from harness import model
from template_files import base, scalar_weights, template
from test_easycontrol import adapter, condition
from test_templates import concatenating

from pack.core.reference.bank import Bank
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.latents import Settings, attach_reference_latents
from pack.core.reference.templates.merge import referred
from testbed import tiny

SIGMA = 0.7


@dataclass(frozen=True)
class System:
    """conds: CONDITIONING of a text and the references of these numbers; attach: what reads them, with a bank; layer: one that a LoRA may change.

    stop: a module that runs while a reference is encoded; fills: whether one is encoded in the run at all.
    """

    patcher: Callable
    conds: Callable
    attach: Callable
    layer: str
    stop: Callable
    channels: int
    size: tuple[int, int] = (8, 8)
    fills: bool = True

    def x(self, seed=2, batch=1, size=None):
        return tryon.drawn(seed, batch, self.channels, *(size or self.size))


def handles(*handles):
    return sum(handles, Handle())


def easycontrol(*seeds) -> Handle:
    net = model("flux").model.diffusion_model
    return Handle(tuple(Reference(condition(net, seed=seed, kind="subject" if seed % 2 else "spatial", adapter=adapter(net))) for seed in seeds))


GARMENTS = {seed: tryon.garment(seed, "upper" if seed % 2 else "shoe") for seed in range(10)}


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> dict[str, System]:
    folder, tryons, klein = tmp_path_factory.mktemp("templates"), tryon.fastfit(), base()
    bright = template(folder, scalar_weights())
    entries = {seed: bright.entry((0.1 * seed,)) for seed in range(10)}

    def templates(*seeds):
        handle = None
        for seed in seeds:
            handle = referred(entries[seed], before=handle)
        return handle or Handle()

    def latents(seed, *refs):
        held = {"reference_latents": [tryon.drawn(90 + ref, 1, 128, 4, 2 + ref % 3) for ref in refs]} if refs else {}
        return tiny.conditioning("flux2", seed, **held)

    def read(patcher, bank):
        return attach_references(patcher, bank=bank)

    def by_handle(kind, made):
        def conds(seed, *refs, apart=False):
            conditioning = tryon.conditioning(seed=20 + seed) if kind == "fastfit" else tiny.conditioning(kind, seed)
            for part in ([(ref,) for ref in refs] if apart else [refs]):
                conditioning = with_references(conditioning, made(*part))
            return conditioning

        return conds

    qkv = "double_blocks.0.img_attn.qkv"
    return {
        "EasyControl": System(lambda: model("flux"), by_handle("flux", easycontrol), read, qkv, lambda net: net.single_blocks[1], 16),
        "FastFit": System(lambda: tryons, by_handle("fastfit", lambda *seeds: tryon.handle(*map(GARMENTS.get, seeds))), read,
                          "input_blocks.1.1.transformer_blocks.0.attn1.to_k", lambda net: net.output_blocks[4][0], 4, tryon.SIZE),
        "template": System(lambda: klein, by_handle("flux2", templates), read, qkv, lambda net: net.single_blocks[1], 128, (4, 6), fills=False),
        "klein-KV": System(lambda: klein, latents, lambda patcher, bank: attach_reference_latents(read(patcher, bank), Settings("exact")), qkv,
                           lambda net: net.single_blocks[1], 128, (4, 6)),
    }


NAMES = ("EasyControl", "FastFit", "template", "klein-KV")


@pytest.fixture(params=NAMES)
def system(request, systems) -> System:
    return systems[request.param]


def prediction(patcher, x, positive, negative=None, cfg=1.0):
    """The denoised latent of this very x, through the whole of the host's sampling."""
    got = []

    def sampler(denoise, noise, sigmas, extra_args=None, callback=None, disable=None):
        got.append(denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args).clone())
        return noise

    with torch.inference_mode():
        comfy.sample.sample_custom(patcher, x * 0, cfg, comfy.samplers.KSAMPLER(sampler), torch.tensor([SIGMA, 0.0]), positive, negative or positive, x * 0,
                                   disable_pbar=True, seed=1)
    return got[0]


def alone(system, x, conds, bank=None):
    return prediction(system.attach(system.patcher(), Bank() if bank is None else bank), x, conds)


def near(a, b, most=1e-5):
    assert (a - b).abs().max() <= most, (a - b).abs().max()


def unlike(a, b):
    assert (a - b).abs().max() > 1e-3


def test_a_batch_is_its_pictures_one_by_one(system):
    x, conds = system.x(batch=3), system.conds(11, 3, 4)
    got = alone(system, x, conds)
    near(got, torch.cat([alone(system, row[None], conds) for row in x]))
    unlike(got, alone(system, x, system.conds(11)))


@pytest.mark.parametrize("other", [(5, 6), (5,), ()], ids=["as many", "fewer", "none"])
def test_guidance_is_both_sides_one_by_one(system, other):
    x, positive, negative = system.x(), system.conds(11, 3, 4), system.conds(12, *other)
    p, n = (alone(system, x, conds) for conds in (positive, negative))
    unlike(p, n)
    near(prediction(system.attach(system.patcher(), Bank()), x, positive, negative, cfg=2.5), n + 2.5 * (p - n), 5e-5)


def test_regions_have_each_their_own_references(system):
    """An area of the host's is a picture of its size."""
    high, wide = system.size
    areas = [(high // 2, wide, begin, 0) for begin in (0, high // 2)]
    conds = [system.conds(11, 3), system.conds(13, 4, 6)]
    x, regional = system.x(), [[text, {**more, "area": area}] for area, cond in zip(areas, conds, strict=True) for text, more in cond]
    got = prediction(system.attach(system.patcher(), Bank()), x, regional)
    for i, (rows, _, begin, _) in enumerate(areas):
        part, others = x[:, :, begin:begin + rows], (cut(cond, begin, rows) for cond in (conds[i], conds[1 - i]))
        right, wrong = (alone(system, part, cond) for cond in others)
        near(got[:, :, begin:begin + rows], right, 2e-5)
        unlike(right, wrong)


def cut(conds: list, begin: int, rows: int) -> list:
    """With what an inpainting model is shown cut to an area, as the host does it."""
    return [[text, {name: value[..., begin:begin + rows, :] if name.startswith("concat") else value for name, value in more.items()}] for text, more in conds]


def with_lora(system, patcher):
    clone, key = patcher.clone(), f"diffusion_model.{system.layer}.weight"
    shape = patcher.model.state_dict()[key].shape
    assert clone.add_patches({key: ("diff", (0.2 * tryon.drawn(6, *shape) / shape[1] ** 0.5,))}, 1.0)
    return clone


def test_a_lora_after_the_references_acts_as_one_before_them(system):
    x, conds, bank = system.x(), system.conds(11, 3, 4), Bank()
    attached = system.attach(system.patcher(), bank)
    plain = prediction(attached, x, conds)
    got = prediction(with_lora(system, attached), x, conds)
    assert torch.equal(got, prediction(system.attach(with_lora(system, system.patcher()), Bank()), x, conds))
    unlike(got, plain)
    assert torch.equal(prediction(attached, x, conds), plain)       # and none of the LoRA's entries is taken for the model without it


def test_unloading_and_loading_again_changes_no_bit_and_encodes_nothing_anew(system):
    x, conds, bank = system.x(), system.conds(11, 3, 4), Bank()
    attached = system.attach(system.patcher(), bank)
    first, held = prediction(attached, x, conds), list(bank.entries)
    assert bool(held) == system.fills
    comfy.model_management.unload_all_models()
    assert torch.equal(prediction(attached, x, conds), first) and list(bank.entries) == held


class Stop(BaseException):
    pass


@pytest.mark.parametrize("fault", [Stop, KeyboardInterrupt])
def test_a_run_that_is_stopped_while_it_encodes_leaves_nothing_and_the_next_one_is_right(system, fault):
    x, conds, bank = system.x(), system.conds(11, 3, 4), Bank()
    attached = system.attach(system.patcher(), bank)

    def stop(*args):
        raise fault

    hook = system.stop(attached.model.diffusion_model).register_forward_pre_hook(stop)
    try:
        with pytest.raises(fault):
            prediction(attached, x, conds)
    finally:
        hook.remove()
    assert not len(bank) and not any(module._forward_hooks or module._forward_pre_hooks for module in attached.model.diffusion_model.modules())
    assert torch.equal(prediction(attached, x, conds), alone(system, x, conds)) and bool(len(bank)) == system.fills


@pytest.mark.parametrize("name", ["EasyControl", "FastFit", "template"])
def test_two_handles_on_one_condition_are_one_of_both(systems, name):
    system = systems[name]
    x, bank = system.x(), Bank()
    got = alone(system, x, system.conds(11, 3, 4, apart=True), bank)
    assert torch.equal(got, alone(system, x, system.conds(11, 3, 4)))
    unlike(got, alone(system, x, system.conds(11, 3)))


def with_template(systems, conds: list):
    """The conditioning with a template behind its references, and the template's entry."""
    (_, more), = systems["template"].conds(11, 7)
    handle = more["model_conds"]["reprise_references"].cond
    entry = handle.references[0].recipe.entry
    return with_references(conds, handle), entry


def test_a_template_stands_behind_reference_latents_on_one_condition(systems):
    system = systems["klein-KV"]
    x, conds = system.x(), system.conds(11, 3, 4)
    both, entry = with_template(systems, conds)
    bank = Bank()
    without = alone(system, x, conds, bank)
    got = alone(system, x, both)
    near(got, prediction(system.attach(concatenating(system.patcher(), {0: [entry]}), bank), x, conds))     # found, so they see no template
    unlike(got, without)


@pytest.mark.parametrize("order", ["cache first", "cache last"])
def test_a_template_acts_beside_the_host_s_own_cache_of_reference_latents(systems, order):
    """The host's patch counts its tokens from the end of K, so ours must come behind it, whoever was put on the model first."""
    system = systems["klein-KV"]
    x, conds = system.x(), system.conds(11, 3, 4)
    both, entry = with_template(systems, conds)
    hosts = lambda patcher: FluxKVCache.execute(patcher)[0]
    ours = lambda patcher: attach_references(patcher, bank=Bank())
    patched = ours(hosts(system.patcher())) if order == "cache first" else hosts(ours(system.patcher()))
    wanted = prediction(hosts(concatenating(system.patcher(), {0: [entry]})), x, conds)
    near(prediction(patched, x, both), wanted)
    unlike(wanted, prediction(hosts(system.patcher()), x, conds))


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_of_the_model_s_own_tokens_leaves_references_in_sight(systems, boolean):
    """Against a concatenation whose mask lets what is behind be seen."""
    system = systems["template"]
    x, generator = system.x(), torch.Generator().manual_seed(4)
    conds, entry = with_template(systems, system.conds(11))
    noise = torch.randn(1, 1, 600, 600, generator=generator)
    whole = noise > -1 if boolean else noise

    def masked(patcher):
        clone = patcher.clone()
        clone.set_model_attn1_patch(lambda q, k, v, **others: {"attn_mask": whole[..., :q.shape[2], :k.shape[2]]})
        return clone

    reference = masked(concatenating(system.patcher(), {0: [entry]}))
    options = reference.model_options["transformer_options"]
    concatenated = options["optimized_attention_override"]

    def attend(func, q, k, v, heads, mask=None, **more):
        padded = torch.cat([mask, torch.full((*mask.shape[:-1], entry.tokens), boolean, dtype=mask.dtype)], -1)
        return concatenated(lambda *args, **others: func(*args, mask=padded, **others), q, k, v, heads, **more)

    options["optimized_attention_override"] = attend
    got = alone(system, x, conds)
    wanted = prediction(reference, x, system.conds(11))
    near(prediction(system.attach(masked(system.patcher()), Bank()), x, conds), wanted)
    unlike(wanted, got)
