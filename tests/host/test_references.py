"""What the injector promises of every reference, tried with EasyControl's, whose entries hang on most."""
import copy

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import Control, model, sample, spied
from test_easycontrol import adapter, by_pack, condition, explicit

from pack.core.reference import easycontrol
from pack.core.reference.bank import Bank
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import RUN, Keeping, attach_references
from testbed import tiny

NETWORK = model("flux").model.diffusion_model


def conds(positive: Handle, negative: Handle | None = None, **more):
    return {"positive": with_references(tiny.conditioning("flux", 11, **more), positive),
            "negative": with_references(tiny.conditioning("flux", 12, **more), positive if negative is None else negative)}


def handle(*seeds, **more) -> Handle:
    one = adapter(NETWORK, slots=2)
    return Handle(tuple(Reference(condition(NETWORK, seed=seed, adapter=one), **more) for seed in seeds or (5,)))


def used(patcher, bank=None, records=None, **keeping):
    return attach_references(patcher, Keeping(**keeping), (records if records is not None else []).append, Bank() if bank is None else bank)


def near(a, b, most=1e-5):
    return (a - b).abs().max() <= most


def test_positive_and_negative_are_sampled_in_one_batch():
    sizes = []
    spy = spied(used(model("flux")), WrappersMP.DIFFUSION_MODEL, lambda executor, args, kwargs: sizes.append(len(args[0])))
    together = sample(spy, "flux", **conds(handle(5), handle(6)))
    assert set(sizes) == {2}
    sizes.clear()
    apart = sample(spy, "flux", **conds(handle(5), handle(6, weight=0.999999999)))      # another weight, next to nothing
    assert set(sizes) == {1}
    assert near(together, apart, 1e-4)


def test_a_negative_without_references_is_sampled_as_if_it_were_alone():
    bank = Bank()
    noise = tiny.noise("flux")
    got = by_pack(model("flux"), noise, 0.6, tiny.conditioning("flux", 11), Handle(), bank)
    one_sided = sample(used(model("flux"), bank), "flux", **conds(handle(), Handle()))
    assert not near(one_sided, sample(model("flux"), "flux"), 1e-3) and got["v"].isfinite().all() and len(bank) == 1


def test_rows_of_one_batch_have_each_the_entry_of_their_own_pooled_text():
    texts = [tiny.conditioning("flux", seed)[0] for seed in (21, 22)]
    both = [[torch.cat([text for text, _ in texts]), {"pooled_output": torch.cat([more["pooled_output"] for _, more in texts])}]]
    noise, bank = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)), Bank()
    got = by_pack(model("flux"), noise, 0.7, both, handle(), bank)
    wanted = explicit(model("flux"), got["x"], 0.7, both[0][0], both[0][1]["pooled_output"], 3.5, [handle().references[0].recipe])
    assert near(got["v"], wanted) and len(bank) == 2


def test_a_regional_condition_stretches_over_its_region():
    """The area's picture alone, sampled as a picture of its size, has the same first prediction."""
    area = (4, 8, 2, 0)     # rows, columns, and where they begin
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    regional = [[text, {**more, "area": area, "strength": 1.0}] for text, more in tiny.conditioning("flux", 11)]
    got = by_pack(model("flux"), noise, 0.7, regional, handle())
    part = got["x"][:, :, 2:6]
    wanted = explicit(model("flux"), part, 0.7, regional[0][0], regional[0][1]["pooled_output"], 3.5, [handle().references[0].recipe])
    assert near(got["v"][:, :, 2:6], wanted, 2e-5)


def test_two_handles_on_one_condition_are_one_after_the_other():
    positive = with_references(conds(handle(5))["positive"], handle(6))
    twice = sample(used(model("flux")), "flux", positive=positive, negative=conds(handle(5, 6))["negative"])
    assert torch.equal(twice, sample(used(model("flux")), "flux", **conds(handle(5, 6))))


@pytest.mark.parametrize("place", ["gpu", "streamed"])
def test_the_place_of_entries_does_not_change_a_bit(place):
    assert torch.equal(sample(used(model("flux"), place=place), "flux", **conds(handle(5, 6))), sample(used(model("flux")), "flux", **conds(handle(5, 6))))


def test_a_lora_after_the_injector_makes_other_entries():
    bank, patcher = Bank(), used(model("flux"))
    patcher = used(model("flux"), bank)
    first = sample(patcher, "flux", **conds(handle()))
    later = patcher.clone()
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    diff = 0.05 * torch.randn(later.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1))
    later.add_patches({key: ("diff", (diff,))}, 1.0)
    second = sample(later, "flux", **conds(handle()))
    assert len(bank) == 4 and not near(first, second, 1e-3)
    before = model("flux").clone()
    before.add_patches({key: ("diff", (diff,))}, 1.0)
    assert torch.equal(second, sample(used(before), "flux", **conds(handle())))


def test_entries_outlive_the_unloading_of_the_model():
    bank, records = Bank(), []
    patcher = used(model("flux"), bank, records)
    first = sample(patcher, "flux", **conds(handle()))
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patcher, "flux", **conds(handle())), first)
    assert [len(record.made) for record in records] == [2, 0]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("fault", [Stop, torch.OutOfMemoryError])
def test_an_encoding_that_is_cut_short_leaves_nothing_behind(fault, monkeypatch):
    bank, patcher = Bank(), model("flux")
    whole = easycontrol.prefill

    def cut(network, patches, ids, vec, put, options, taps):
        count = []

        def some(name, k, v):
            count.append(name)
            if len(count) == 3:
                raise fault("here")
            put(name, k, v)

        return whole(network, patches, ids, vec, some, options, taps)

    monkeypatch.setattr(easycontrol, "prefill", cut)
    with pytest.raises(fault):
        sample(used(patcher, bank), "flux", **conds(handle()))
    assert len(bank) == 0 and not any(module._forward_hooks for module in patcher.model.diffusion_model.modules())
    monkeypatch.undo()
    assert torch.equal(sample(used(patcher, bank), "flux", **conds(handle())), sample(used(patcher), "flux", **conds(handle())))


def test_without_room_on_the_gpu_the_entry_is_made_in_host_memory_and_the_picture_is_the_same(monkeypatch):
    records, whole, tries = [], easycontrol.prefill, []

    def once(*args):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(*args)

    wanted = sample(used(model("flux")), "flux", **conds(handle()))
    monkeypatch.setattr(easycontrol, "prefill", once)
    assert torch.equal(sample(used(model("flux"), records=records), "flux", **conds(handle())), wanted)
    assert "host memory block by block" in records[0].line()


def test_an_entry_above_the_limit_serves_its_run_and_is_not_kept():
    records, bank = [], Bank(limit=10)
    assert torch.equal(sample(used(model("flux"), bank, records), "flux", **conds(handle())), sample(used(model("flux")), "flux", **conds(handle())))
    assert len(bank) == 0 and "is not kept" in records[0].line() and len(records[0].made) == 2


def test_entries_that_are_not_to_be_kept_end_with_the_run():
    bank = Bank()
    sample(used(model("flux"), bank, keep=False), "flux", **conds(handle()))
    assert len(bank) == 0


def test_nothing_is_left_on_the_model():
    patcher = model("flux")
    attached = used(patcher)
    options = copy.copy(attached.model_options["transformer_options"])
    sample(attached, "flux", **conds(handle()))
    assert attached.model_options["transformer_options"].keys() == options.keys() and RUN not in attached.model_options["transformer_options"]
    assert "patches" not in attached.model_options["transformer_options"]
    assert torch.equal(sample(patcher, "flux"), sample(attached, "flux"))


def test_the_key_changes_with_what_matters_and_with_nothing_else():
    def made(*, size=8, seed=1, lora=0.0, kind="spatial", **cond):
        bank, patcher = Bank(), model("flux").clone()
        if lora:
            key = "diffusion_model.double_blocks.0.img_attn.qkv.bias"
            patcher.add_patches({key: ("diff", (torch.full_like(patcher.model.state_dict()[key], lora),))}, 1.0)
        one = Handle((Reference(condition(NETWORK, kind=kind)),))
        sample(used(patcher, bank), "flux", cfg=1.0, size=size, seed=seed, steps=2, positive=with_references(tiny.conditioning("flux", 11, **cond), one))
        return {key: text for entry in bank.entries.values() for key, text in entry.key.fields.items()}

    plain = made()
    differing = lambda **change: {name for name, text in made(**change).items() if name != "base" and text != plain[name]}
    assert differing(seed=9) == set() and differing(size=(12, 8)) == {"size"} and differing(guidance=2.0) == {"guidance"}
    assert "size" not in made(kind="subject")
    base = used(model("flux"))
    token = lambda patcher: patcher.patches_uuid
    assert token(base) == token(model("flux"))
    changed = base.clone()
    changed.add_patches({"diffusion_model.double_blocks.0.img_attn.qkv.bias": ("diff", (torch.ones(384),))}, 1.0)
    assert token(changed) != token(base)


def test_a_reference_acts_in_its_span_of_the_schedule_alone():
    early, late = (sample(used(model("flux")), "flux", **conds(handle(start=start, end=end))) for start, end in ((0.0, 0.5), (0.5, 1.0)))
    never, whole = sample(used(model("flux")), "flux", **conds(handle(weight=0.0))), sample(used(model("flux")), "flux", **conds(handle()))
    assert torch.equal(never, sample(model("flux"), "flux"))
    assert len({tensor.sum().item() for tensor in (early, late, never, whole)}) == 4


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_a_weight_multiplies_the_attention_that_the_tokens_get(weight):
    """Twice the weight is each token twice."""
    one = handle(weight=2.0)
    twice = handle(5, 5)
    got, wanted = (by_pack(model("flux"), tiny.noise("flux"), 0.7, tiny.conditioning("flux", 11), each) for each in (one, twice))
    assert near(got["v"], wanted["v"])
    other = by_pack(model("flux"), tiny.noise("flux"), 0.7, tiny.conditioning("flux", 11), handle(weight=weight))
    assert near(other["v"], wanted["v"]) == (weight == 2.0)


def test_a_controlnet_acts_beside_a_reference():
    control = lambda: Control(len(NETWORK.double_blocks), len(NETWORK.single_blocks))
    with_control = sample(used(model("flux")), "flux", **conds(handle(), control=control(), control_apply_to_uncond=False))
    assert not near(with_control, sample(used(model("flux")), "flux", **conds(handle())), 1e-3)


def test_condition_tokens_pass_no_layer_after_the_first_call():
    rows = []
    layer = NETWORK.double_blocks[0].img_attn.qkv
    hook = layer.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    try:
        sample(used(model("flux")), "flux", cfg=1.0, **conds(handle()))
    finally:
        hook.remove()
    assert rows == [16] + [16] * 12      # 4 x 4 tokens of the condition, then as many of the picture on 12 steps


def test_eight_bits_are_near_smaller_labelled_and_never_exact():
    records, bank = [], Bank()
    small = sample(used(model("flux"), bank, records, storage="fp8"), "flux", **conds(handle()))
    whole_bank = Bank()
    whole = sample(used(model("flux"), whole_bank), "flux", **conds(handle()))
    off = (small - whole).norm() / whole.norm()
    assert 0 < off < 0.02 and bank.bytes < 0.3 * whole_bank.bytes
    assert "approximate: keys and values in 8 bits" in records[0].line()
    told = float(records[0].exactness.split(", ")[1].split("%")[0]) / 100
    pairs = [(k.float() * scale, wanted) for entry, other in zip(bank.entries.values(), whole_bank.entries.values(), strict=True)
             for name in entry.blocks for k, scale, wanted in zip(entry.blocks[name], entry.scales[name], other.blocks[name], strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    assert abs(told - sum(errors) / len(errors)) < 1e-3
    assert torch.equal(small, sample(used(model("flux"), bank, records, storage="fp8", place="streamed"), "flux", **conds(handle())))
