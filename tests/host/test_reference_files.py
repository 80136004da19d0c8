"""Saved references: whole or refused, and used with what they were made for alone."""
import json
import struct

import pytest
import torch
from harness import model, sample
from safetensors.torch import save_file
from test_easycontrol import condition

from pack.core.reference.bank import Bank
from pack.core.reference.files import names, read, write
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.inspect import described, entries_of
from pack.core.reference.stored import lasting, weights_print
from testbed import tiny


def conditions(handle, pooled=(11, 12)):
    return dict(zip(("positive", "negative"), (with_references(tiny.conditioning("flux", seed), handle) for seed in pooled), strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, handle, latent of the run that encoded)."""
    folder, patcher = tmp_path_factory.mktemp("references"), model("flux")
    handle = Handle((Reference(condition(patcher.model.diffusion_model)),))
    attached = attach_references(patcher, bank=Bank())
    latent = sample(attached, "flux", **conditions(handle))
    write(folder, "cat", "flux", [lasting(entry, attached) for _, entry in entries_of(attached, handle)])
    return folder, handle, latent


def test_a_saved_reference_gives_the_same_picture_in_another_bank(saved):
    folder, _, latent = saved
    handle = Handle((Reference(read(folder, "cat")),))
    assert names(folder) == ["cat"]
    assert torch.equal(sample(attach_references(model("flux"), bank=Bank()), "flux", **conditions(handle)), latent)


@pytest.mark.parametrize("change, field", [
    ({"pooled": (11, 13)}, "pooled"), ({"guidance": 2.0}, "guidance"), ({"size": (12, 8)}, "size"), ({"lora": 1}, "base"), ({"seed": 4}, None),
])
def test_a_saved_reference_is_refused_with_the_field_that_differs(saved, change, field):
    folder, patcher = saved[0], model("flux")
    handle = Handle((Reference(read(folder, "cat")),))
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
    write(tmp_path, "small", "flux", [lasting(entry, attached) for _, entry in entries_of(attached, handle)])
    stored = read(tmp_path, "small")
    assert "8 bits" in stored.exactness
    assert torch.equal(sample(attach_references(patcher, bank=Bank()), "flux", **conditions(Handle((Reference(stored),)))), latent)
    rewritten(tmp_path / "small.safetensors", lambda header: header.pop("0.double.0.ks"))
    with pytest.raises(ValueError, match="reference 'small'"):
        read(tmp_path, "small")


def test_inspect_tells_size_fields_and_hits():
    patcher = model("flux")
    handle = Handle((Reference(condition(patcher.model.diffusion_model), weight=0.5),))
    attached = attach_references(patcher, bank=Bank())
    assert "not encoded yet" in described(attached, handle)
    for seed in (1, 2):
        sample(attached, "flux", seed=seed, **conditions(handle))
    text = described(attached, handle)
    assert "weight 0.5" in text and "exact" in text and "used 1 times" in text and "pooled:" in text and "the bank holds 2 entries" in text
