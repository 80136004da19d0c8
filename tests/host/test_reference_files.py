"""Saved references: whole or refused, and used with what they were made for alone."""
import copy
import gc
import json
import struct

import comfy.hooks
import comfy.sample
import pytest
import torch
import tryon
from harness import model, sample
from safetensors.torch import save_file
from test_easycontrol import condition

from pack.core.reference.bank import Bank
from pack.core.reference.entry import Entry, Key
from pack.core.reference.files import names, read, write
from pack.core.reference.handle import Handle, Reference, handle_of, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.inspect import described, stored
from pack.core.reference.ready import Ready
from pack.core.reference.seams import LAYOUTS
from pack.core.reference.stored import weights_print
from testbed import tiny


def conditions(handle, pooled=(11, 12)):
    return dict(zip(("positive", "negative"), (with_references(tiny.conditioning("flux", seed), handle) for seed in pooled), strict=True))


def loaded(folder, name) -> Handle:
    return Handle(tuple(map(Reference, read(folder, name))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, handle, latent of the run that encoded)."""
    folder, patcher = tmp_path_factory.mktemp("references"), model("flux")
    handle = Handle((Reference(condition(patcher.model.diffusion_model)),))
    attached = attach_references(patcher, bank=Bank())
    latent = sample(attached, "flux", **conditions(handle))
    write(folder, "cat", stored(attached, handle))
    return folder, handle, latent


def test_a_saved_reference_gives_the_same_picture_in_another_bank(saved):
    folder, _, latent = saved
    handle = loaded(folder, "cat")
    assert names(folder) == ["cat"]
    assert torch.equal(sample(attach_references(model("flux"), bank=Bank()), "flux", **conditions(handle)), latent)


@pytest.mark.parametrize("change, field", [
    ({"pooled": (11, 13)}, "pooled"), ({"guidance": 2.0}, "guidance"), ({"size": (12, 8)}, "size"), ({"lora": 1}, "base"), ({"seed": 4}, None),
])
def test_a_saved_reference_is_refused_with_the_field_that_differs(saved, change, field):
    folder, patcher = saved[0], model("flux")
    handle = loaded(folder, "cat")
    conds = conditions(handle, change.get("pooled", (11, 12)))
    if "guidance" in change:
        conds = {side: [[text, {**more, "guidance": 2.0}] for text, more in cond] for side, cond in conds.items()}
    if "lora" in change:
        patcher = patcher.clone()
        key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
        patcher.add_patches({key: ("diff", (torch.full_like(patcher.model.state_dict()[key], 0.01),))}, 1.0)
    attached = attach_references(patcher, bank=Bank())
    more = {"size": change["size"]} if "size" in change else {"seed": change["seed"]} if "seed" in change else {}
    if field is None:
        sample(attached, "flux", **conds, **more)
        return
    with pytest.raises(ValueError, match=rf"made for another .*\({field}: "):
        sample(attached, "flux", **conds, **more)


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_mlp.0.weight", "single_blocks.1.linear2.weight"])
def test_the_print_of_weights_changes_with_any_matrix(name):
    patcher = tiny.patcher("flux")
    before = weights_print(patcher)
    with torch.no_grad():
        patcher.model.diffusion_model.get_parameter(name).mul_(1.01)
    assert weights_print(patcher) != before


def test_layers_that_were_replaced_are_encoded_anew_and_no_saved_reference_is_taken_for_them(saved):
    folder, handle, _ = saved
    bank, patcher = Bank(), tiny.patcher("flux")     # of its own: the host leaves replaced layers in place until another model is loaded
    sample(attach_references(patcher, bank=bank), "flux", **conditions(handle))
    key, changed = "diffusion_model.double_blocks.0.img_attn.qkv", patcher.clone()
    layer = copy.deepcopy(patcher.model.diffusion_model.double_blocks[0].img_attn.qkv)
    with torch.no_grad():
        layer.weight.mul_(1.1)
    changed.add_object_patch(key, layer)
    got = sample(attach_references(changed, bank=bank), "flux", **conditions(handle))
    assert len(bank) == 2 and torch.equal(got, sample(attach_references(changed, bank=Bank()), "flux", **conditions(handle)))
    with pytest.raises(ValueError, match="made for another model"):
        sample(attach_references(changed, bank=Bank()), "flux", **conditions(loaded(folder, "cat")))


def test_an_outfit_whose_null_was_never_encoded_is_not_saved():
    handle, conds = tryon.handle(tryon.garment(5, "upper")), tryon.conditioning()
    attached = attach_references(tryon.fastfit(), bank=Bank())
    noise = tryon.drawn(9, 1, 4, *tryon.SIZE)
    with torch.inference_mode():
        comfy.sample.sample(attached, noise, 2, 1.0, "euler", "simple", with_references(conds, handle), conds, noise * 0, disable_pbar=True, seed=1)
    with pytest.raises(ValueError, match="sample with cfg above 1"):
        stored(attached, handle)


def test_the_print_of_weights_is_the_same_loaded_and_patched_and_another_with_another_lora():
    patcher = model("flux")
    key = "diffusion_model.single_blocks.0.linear1.weight"
    diff = torch.full_like(patcher.model.state_dict()[key], 0.01)
    one, other = patcher.clone(), patcher.clone()
    one.add_patches({key: ("diff", (diff,))}, 1.0)
    other.add_patches({key: ("diff", (diff,))}, 0.5)
    before = weights_print(one)
    sample(one, "flux")
    assert weights_print(one) == before
    assert len({before, weights_print(other), weights_print(patcher)}) == 3


def with_lora(patcher, size: float = 0.01):
    clone = patcher.clone()
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    clone.add_patches({key: ("diff", (torch.full_like(patcher.model.state_dict()[key], size),))}, 1.0)
    return clone


def test_a_file_names_the_weights_that_sampled_whichever_model_comes_to_the_node(tmp_path):
    """Apply Reference Cache, then a LoRA, then the sampler, with Save Reference Cache on the first."""
    handle = Handle((Reference(condition(model("flux").model.diffusion_model)),))
    attached = attach_references(model("flux"), bank=Bank())
    tuned = with_lora(attached)
    latent = sample(tuned, "flux", **conditions(handle))
    for name, connected in (("first", attached), ("last", tuned)):
        write(tmp_path, name, stored(connected, handle))
        again = attach_references(with_lora(model("flux")), bank=Bank())
        assert torch.equal(sample(again, "flux", **conditions(loaded(tmp_path, name))), latent)
        with pytest.raises(ValueError, match=r"made for another model, or the model with other LoRAs \(base: "):
            sample(attach_references(model("flux"), bank=Bank()), "flux", **conditions(loaded(tmp_path, name)))


def test_what_was_encoded_on_a_model_that_is_gone_is_not_saved_under_another_one_s_name():
    handle = Handle((Reference(condition(model("flux").model.diffusion_model)),))
    attached = attach_references(model("flux"), bank=Bank())
    sample(with_lora(attached), "flux", **conditions(handle))
    gc.collect()
    with pytest.raises(ValueError, match="was encoded on a model with other LoRAs than the one that came, and that is gone; connect the model that goes into"):
        stored(attached, handle)


def test_a_file_that_is_saved_again_keeps_the_weights_that_it_was_made_for(saved, tmp_path):
    again, attached = loaded(saved[0], "cat"), attach_references(model("flux"), bank=Bank())
    sample(attached, "flux", **conditions(again))
    write(tmp_path, "copy", stored(with_lora(attached), again))
    assert torch.equal(sample(attach_references(model("flux"), bank=Bank()), "flux", **conditions(loaded(tmp_path, "copy"))), saved[2])


def test_a_set_of_which_a_part_left_the_bank_is_not_saved():
    bank, handle = Bank(), Handle((Reference(condition(model("flux").model.diffusion_model)),))
    attached = attach_references(model("flux"), bank=bank)
    sample(attached, "flux", **conditions(handle))
    bank.limited(bank.bytes * 2 // 3)
    assert len(bank) == 1
    with pytest.raises(ValueError, match="^1 of the 2 entries of EasyControl random, spatial, 64 x 64 are no longer kept: the limit of .* had no room"):
        stored(attached, handle)


def test_what_was_encoded_under_a_hook_on_one_side_is_not_saved_as_if_the_other_were_all():
    conds = conditions(Handle((Reference(condition(model("flux").model.diffusion_model)),)))
    handle = handle_of({"model_conds": conds["positive"][0][1]["model_conds"]})
    down, up = torch.ones(1, 128), torch.ones(384, 1)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    hooks = comfy.hooks.create_hook_lora({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, 0.01, 0.0)
    conds["positive"] = comfy.hooks.set_hooks_for_conditioning(conds["positive"], hooks)
    attached = attach_references(model("flux"), bank=Bank())
    sample(attached, "flux", **conds)
    with pytest.raises(ValueError, match="was encoded while hooks, a bypass LoRA or replaced layers changed the model"):
        stored(attached, handle)


def rewritten(path, change):
    """The file with its header changed by `change(dict)`."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])


def told(header, i=0, **fields):
    entries = json.loads(header["__metadata__"]["entries"])
    entries[i].update(fields)
    header["__metadata__"]["entries"] = json.dumps(entries)


HOSTILE = {
    "no format": lambda h: h["__metadata__"].pop("format"),
    "version": lambda h: h["__metadata__"].update(version="9"),
    "no list": lambda h: h["__metadata__"].update(entries="[" * 10000),
    "deep": lambda h: h["__metadata__"].update(entries="{}"),
    "rope": lambda h: told(h, rope="spiral"),
    "carrier": lambda h: told(h, carrier="pickle"),
    "no such reference": lambda h: told(h, reference=7),
    "a reference that is no number": lambda h: told(h, reference=True),
    "no references": lambda h: h["__metadata__"].pop("references"),
    "seam": lambda h: h["__metadata__"].update(references='[{"seam": "pickle", "other": "same"}]'),
    "other side": lambda h: h["__metadata__"].update(references='[{"seam": "flux", "other": "null"}]'),
    "no text": lambda h: told(h, source=5),
    "long text": lambda h: told(h, source="x" * 5000),
    "key": lambda h: told(h, key=["a"]),
    "no positions wanted": lambda h: told(h, rope="none"),
    "a foreign tensor": lambda h: h.update({"0.double.0.q": h.pop("0.double.0.k")}),
    "a block by half": lambda h: h.update({"0.double.7.k": h.pop("0.double.0.k")}),
    "another shape": lambda h: h["0.double.0.k"].update(shape=h["0.double.0.k"]["shape"][::-1]),
    "another type": lambda h: h["0.double.0.k"].update(dtype="I32"),
    "an entry that is not told": lambda h: h.update({"9.double.0.k": h.pop("0.double.0.k")}),
    "a tensor beyond the file": lambda h: h["0.double.0.k"].update(data_offsets=[0, 1 << 40]),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_file_that_is_not_as_it_should_be_is_one_sentence(saved, tmp_path, fault):
    (tmp_path / "cat.safetensors").write_bytes((saved[0] / "cat.safetensors").read_bytes())
    rewritten(tmp_path / "cat.safetensors", HOSTILE[fault])
    with pytest.raises(ValueError, match=r"^reference 'cat'.*; save it again$") as error:
        read(tmp_path, "cat")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_file_cut_off_anywhere_is_refused(saved, tmp_path):
    raw = (saved[0] / "cat.safetensors").read_bytes()
    for size in (0, 5, 8, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cat.safetensors").write_bytes(raw[:size])
        with pytest.raises(ValueError, match="damaged or cut off"):
            read(tmp_path, "cat")


@pytest.mark.parametrize("name", ["../cat", "/cat", "a/b", "", "con", "a..b", "x" * 101, "cat\n"])
def test_a_name_cannot_leave_the_folder(saved, name):
    with pytest.raises(ValueError, match="is refused"):
        read(saved[0], name)


def test_a_missing_reference_is_told_with_those_that_are_there(saved):
    with pytest.raises(ValueError, match="there is no saved reference 'dog'; known: cat"):
        read(saved[0], "dog")


def test_another_file_of_tensors_is_no_reference(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="the format is"):
        read(tmp_path, "cat")


def test_a_reference_in_eight_bits_is_saved_and_read_as_it_is(tmp_path):
    patcher = model("flux")
    handle = Handle((Reference(condition(patcher.model.diffusion_model)),))
    attached = attach_references(patcher, Keeping(storage="fp8"), bank=Bank())
    latent = sample(attached, "flux", **conditions(handle))
    write(tmp_path, "small", stored(attached, handle))
    (small,) = read(tmp_path, "small")
    assert "8 bits" in small.exactness
    assert torch.equal(sample(attach_references(patcher, bank=Bank()), "flux", **conditions(loaded(tmp_path, "small"))), latent)
    rewritten(tmp_path / "small.safetensors", lambda header: header.pop("0.double.0.ks"))
    with pytest.raises(ValueError, match="reference 'small'"):
        read(tmp_path, "small")


def test_several_references_of_a_file_are_several_again(tmp_path):
    patcher = model("flux")
    handle = Handle(tuple(Reference(condition(patcher.model.diffusion_model, seed=seed)) for seed in (5, 6)))
    attached = attach_references(patcher, bank=Bank())
    latent = sample(attached, "flux", **conditions(handle))
    write(tmp_path, "both", stored(attached, handle))
    assert len(read(tmp_path, "both")) == 2
    assert torch.equal(sample(attach_references(patcher, bank=Bank()), "flux", **conditions(loaded(tmp_path, "both"))), latent)


@pytest.mark.parametrize("null", [True, False])
def test_a_saved_entry_of_a_template_keeps_its_other_side_and_fits_any_weights(tmp_path, null):
    patcher = model("flux2")
    network = patcher.model.diffusion_model

    def ready(seed):
        generator = torch.Generator().manual_seed(seed)
        blocks = {name: tuple(torch.randn(1, network.num_heads, 6, 128, generator=generator) for _ in range(2)) for name in LAYOUTS["flux"](network)}
        return Entry("flux2", blocks, Key({"template": str(seed), "numerics": "as it came"}), "a template")

    handle = Handle((Reference(Ready(ready(1), null=ready(2) if null else None)),))

    def sides(one: Handle) -> dict:
        return {"positive": with_references(tiny.conditioning("flux2", 11), one),
                "negative": with_references(tiny.conditioning("flux2", 12), one.other_side())}

    attached = attach_references(patcher, bank=Bank())
    latent = sample(attached, "flux2", **sides(handle))
    write(tmp_path, "bright", stored(attached, handle))
    again = loaded(tmp_path, "bright")
    assert len(again.other_side().references) == null
    assert torch.equal(sample(attach_references(patcher, bank=Bank()), "flux2", **sides(again)), latent)


def test_a_saved_outfit_keeps_its_null_references(tmp_path):
    patcher, conds = tryon.fastfit(), tryon.conditioning()
    handle = tryon.handle(tryon.garment(5, "upper"), tryon.garment(6, "shoe"))

    def latent(model, one: Handle) -> torch.Tensor:
        noise = tryon.drawn(9, 1, 4, *tryon.SIZE)
        with torch.inference_mode():
            return comfy.sample.sample(model, noise, 4, 2.5, "euler", "simple", with_references(conds, one), with_references(conds, one.other_side()),
                                       noise * 0, disable_pbar=True, seed=1)

    attached = attach_references(patcher, bank=Bank())
    worn = latent(attached, handle)
    write(tmp_path, "outfit", stored(attached, handle))
    again = loaded(tmp_path, "outfit")
    assert torch.equal(latent(attach_references(patcher, bank=Bank()), again), worn)
    assert not torch.equal(latent(attach_references(patcher, bank=Bank()), Handle(again.references[:1])), worn)


def test_inspect_tells_size_fields_and_hits():
    patcher = model("flux")
    handle = Handle((Reference(condition(patcher.model.diffusion_model), weight=0.5),))
    attached = attach_references(patcher, bank=Bank())
    assert "not encoded yet" in described(attached, handle)
    for seed in (1, 2):
        sample(attached, "flux", seed=seed, **conditions(handle))
    text = described(attached, handle)
    assert "weight 0.5" in text and "exact" in text and "used 1 time since" in text and "pooled:" in text and "the bank holds 2 entries" in text
