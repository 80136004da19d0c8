"""Modulation Cache: bit-identical with weights that are gone after they were read once, with every sampler, prompt and interrupt."""
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from harness import model, sample
from modulated import NAMED, SERVED, STEPS, Poison, cached, modulations, network

from pack.core.families import FAMILIES
from pack.core.quant import modulation
from pack.core.quant.modulation import KEY, attach_modulation_cache
from pack.core.quant.stand_in import layers
from testbed import tiny


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", SERVED)
def test_the_weights_are_read_at_the_first_evaluation_and_never_again(name, cfg):
    wanted, records = sample(model(name), name, steps=STEPS, cfg=cfg), []
    patcher = cached(name, records=records)
    with Poison(patcher) as poison:
        got = sample(patcher, name, steps=STEPS, cfg=cfg, callback=poison)
    assert torch.equal(got, wanted)
    assert records[0].streamed == 0 and records[0].found and records[0].table


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("sampling", [
    {"sampler": "heun"}, {"sampler": "dpm_2"}, {"sampler": "dpmpp_2s_ancestral"}, {"sampler": "dpmpp_sde"}, {"sampler": "euler", "batch": 3},
    {"sampler": "res_multistep", "scheduler": "beta"},
], ids=lambda sampling: sampling["sampler"])
def test_the_picture_is_the_same_to_the_bit_with_every_kind_of_sampler(name, sampling):
    records = []
    assert torch.equal(sample(cached(name, records=records), name, steps=STEPS, **sampling), sample(model(name), name, steps=STEPS, **sampling))
    off_schedule = sampling["sampler"] in ("dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde")
    assert bool(records[0].streamed) == off_schedule and (records[0].streamed < STEPS if off_schedule else True)


def test_a_sigma_off_the_schedule_reads_the_weights_again():
    patcher = cached("flux")
    with Poison(patcher) as poison:
        assert not sample(patcher, "flux", steps=STEPS, sampler="dpm_2", callback=poison).isfinite().all()


@pytest.mark.parametrize("name", NAMED)
def test_an_interrupt_while_it_computes_ahead_leaves_the_model_as_it_was(name):
    wanted, records = sample(model(name), name, steps=STEPS), []
    patcher = cached(name, records=records)
    sample(patcher, name, steps=1)
    states = {layer: dict(vars(layer)) for module in modulations(patcher).values() for layer in module.modules()}
    middle, calls = list(modulations(patcher).values())[2], []
    def stop(*_):
        calls.append(0)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException()
    hook = middle.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patcher, name, steps=STEPS)
    finally:
        hook.remove()
    assert patcher.get_attachment(KEY).table is None and len(records) == 2
    assert all(vars(layer).keys() == state.keys() and all(vars(layer)[key] is value for key, value in state.items()) for layer, state in states.items())
    assert torch.equal(sample(patcher, name, steps=STEPS), wanted)


@pytest.mark.parametrize("name", NAMED)
def test_a_table_with_little_room_is_filled_again_and_again(name, monkeypatch):
    patcher, records = cached(name, records=(records := [])), records
    row = sum(layer.weight.shape[0] * 4 for module in modulations(patcher).values() for _, layer in layers(module, ""))
    for rows in (0.5, 1, 5, 9):
        monkeypatch.setattr(modulation, "LEAST_TABLE", int(row * rows))
        monkeypatch.setattr(modulation, "TABLE_SHARE", 0)
        assert torch.equal(sample(patcher, name, steps=8), sample(model(name), name, steps=8))
        assert records[-1].table <= row * rows and bool(records[-1].streamed) == (rows < 2)


def batch(name: str, *seeds: int) -> list:
    texts = [tiny.conditioning(name, seed)[0] for seed in seeds]
    more = {key: torch.cat([text[1][key] for text in texts]) for key in texts[0][1]}
    return [[torch.cat([text for text, _ in texts]), more]]


def areas(name: str) -> list:
    """A prompt over all, one for a part, one for the second half of the run."""
    first, second, third = (tiny.conditioning(name, seed) for seed in (11, 13, 14))
    second[0][1].update(area=(4, 4, 0, 4), strength=0.7)
    third[0][1].update(start_percent=0.5, end_percent=1.0)
    return first + second + third


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_batches_of_prompts_regions_and_times_have_rows_of_their_own(name):
    for positive, more in ((batch(name, 21, 22), {"batch": 2}), (areas(name), {})):
        wanted, records = sample(model(name), name, steps=STEPS, positive=positive, **more), []
        patcher = cached(name, records=records)
        assert torch.equal(sample(patcher, name, steps=STEPS, positive=positive, **more), wanted) and not records[0].streamed


def test_guidance_that_asks_once_more_gets_rows_of_its_own():
    skipping = SkipLayerGuidanceDiT.execute(model("flux"), 2.0, 0.0, 1.0, "0", "1").result[0]
    patcher, wanted = cached("flux", skipping, records := []), sample(skipping, "flux", steps=STEPS)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))
    with Poison(patcher) as poison:
        assert torch.equal(sample(patcher, "flux", steps=STEPS, callback=poison), wanted)
    assert not records[0].streamed


def test_a_patch_that_writes_into_the_vector_is_seen():
    def patched(patcher):
        def block(args, more):
            args["vec"].mul_(1.5)
            return more["original_block"](args)
        patcher = patcher.clone()
        patcher.set_model_patch_replace(block, "dit", "double_block", 1)
        return patcher
    wanted = sample(patched(model("flux")), "flux", steps=STEPS)
    assert torch.equal(sample(patched(cached("flux")), "flux", steps=STEPS), wanted)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))


def test_a_model_that_cannot_be_heard_is_streamed_and_says_so():
    patcher, records = cached("sd3", records=(records := [])), records
    def refusing(x, timesteps, **kwargs):
        if not kwargs["transformer_options"].get("wrappers"):
            raise TypeError("this model is called with wrappers alone")
        return forward(x, timesteps, **kwargs)
    forward = network(patcher).forward
    network(patcher).forward = refusing
    try:
        got = sample(patcher, "sd3", steps=STEPS)
    finally:
        del network(patcher).forward
    assert torch.equal(got, sample(model("sd3"), "sd3", steps=STEPS))
    assert records[0].streamed == STEPS and "called with wrappers alone" in records[0].line()


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.modulation], ids=lambda family: family.name)
def test_every_family_that_tells_its_modulation_has_it_and_is_served_exactly_or_not_at_all(family):
    name = tiny.OF_FAMILY[family.name][0]
    assert modulations(model(name))
    patcher, saving = attach_modulation_cache(model(name))
    assert (patcher is model(name)) == bool(saving.why)
    if not saving.why:
        assert torch.equal(sample(patcher, name, steps=STEPS), sample(model(name), name, steps=STEPS))


def test_a_model_whose_loader_patches_in_its_own_way_is_handed_on():
    class Own(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
            raise AssertionError("not for us")
    cpu = torch.device("cpu")
    own = Own(tiny.patcher("flux").model, load_device=cpu, offload_device=cpu)
    same, saving = attach_modulation_cache(own)
    assert same is own and "Own, of another node" in saving.line()


def test_computing_ahead_for_long_shows_a_progress_bar(monkeypatch):
    shown = []
    class Bar:
        def __init__(self, total):
            self.total = total
        def update_absolute(self, value):
            shown.append((value, self.total))
    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    patcher = cached("flux")
    count = len(patcher.get_attachment(KEY).names)
    sample(patcher, "flux", steps=STEPS)
    assert not shown
    monkeypatch.setattr(modulation, "PATIENCE", 0.0)
    sample(patcher, "flux", steps=STEPS)
    assert shown == [(i, count) for i in range(1, count + 1)]


@pytest.mark.parametrize(("name", "why"), [("sd15_like", "of no model family whose modulation is known"), ("wan_causal", "of no model family")])
def test_a_model_whose_modulation_is_not_known_is_handed_on(name, why):
    patcher, saving = attach_modulation_cache(model(name))
    assert patcher is model(name) and why in saving.line()
