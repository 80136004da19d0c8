"""How much memory references take, during a run and after it, and who gives it back."""
import comfy.context_windows
import comfy.hooks
import pytest
import torch
import tryon
from comfy.patcher_extension import WrappersMP
from harness import STEPS, model, sample, spied
from test_easycontrol import condition
from test_references import conds, handle, used

from pack.core.reference.bank import Bank
from pack.core.reference.demand import wanted
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import RUN, Keeping
from pack.core.reference.lend import Loans
from pack.core.reference.run import Run
from testbed import tiny

LAYER = "diffusion_model.double_blocks.0.img_attn.qkv"


def keyframed(conditioning: list, strengths) -> list:
    """The conditioning under a LoRA whose strength is another one on every step."""
    generator, group = torch.Generator().manual_seed(8), comfy.hooks.HookKeyframeGroup()
    rows, columns = model("flux").model.state_dict()[f"{LAYER}.weight"].shape
    lora = {f"{LAYER}.lora_down.weight": torch.randn(4, columns, generator=generator) / columns ** 0.5,
            f"{LAYER}.lora_up.weight": torch.randn(rows, 4, generator=generator)}
    for i, strength in enumerate(strengths):
        group.add(comfy.hooks.HookKeyframe(strength, i / len(strengths)))
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)


def held(run) -> int:
    """Bytes of every entry that something of the run holds: as lent, or in a patch."""
    lent = [lent for _, lent in run.loans.held.values()]
    lent += [lent for patch in run.buffers.patches.values() for segment in patch.segments for lent in segment.lent]
    return sum({id(one): one.entry.bytes for one in lent}.values())


def watched(patcher, seen: list):
    """The model, and (bytes held, bytes reserved) of every call."""
    def look(executor, args, kwargs):
        run = kwargs.get("transformer_options", args[-1] if args else {}).get(RUN)
        seen.append((held(run), run.record.bytes))

    return spied(patcher, WrappersMP.DIFFUSION_MODEL, look)


@pytest.mark.parametrize("place", ["gpu", "streamed"])
def test_a_lora_that_changes_on_every_step_takes_no_more_than_was_reserved(place, monkeypatch):
    strengths, seen, records = [0.1 * i for i in range(STEPS)], [], []
    sides = conds(handle())
    sides["positive"] = keyframed(sides["positive"], strengths)
    got = sample(watched(used(model("flux"), records=records, place=place), seen), "flux", **sides)
    made = len(records[0].made)
    assert made > STEPS // 2 and len(seen) == 2 * STEPS
    assert 0 < max(bytes for bytes, _ in seen) <= seen[0][1] == records[0].bytes
    assert f"{made - 2} entries left before the end" in records[0].line()
    monkeypatch.setattr(Loans, "make_room", lambda *args: {})
    seen.clear()
    assert torch.equal(got, sample(watched(used(model("flux"), place=place), seen), "flux", **sides))
    assert max(bytes for bytes, _ in seen) > 5 * seen[0][1]     # what it took without


def test_several_texts_in_one_batch_are_reserved_for_and_none_leaves():
    texts, records = [tiny.conditioning("flux", seed)[0] for seed in (21, 22)], []
    both = [[torch.cat([text for text, _ in texts]), {"pooled_output": torch.cat([more["pooled_output"] for _, more in texts])}]]
    bank = Bank()
    sample(used(model("flux"), bank, records), "flux", batch=2, cfg=1.0, positive=with_references(both, handle()))
    assert len(bank) == len(records[0].made) == 2 and bank.bytes == records[0].bytes and "left before the end" not in records[0].line()


@pytest.mark.parametrize("storage", ["same", "fp8"])
def test_entries_that_fit_never_leave(storage):
    records = []
    sample(used(model("flux"), records=records, storage=storage), "flux", **conds(handle(5, 6), handle(6, 7)))
    assert len(records[0].made) == 4 and "left before the end" not in records[0].line()


def test_without_keep_nothing_of_the_references_stays_not_even_what_an_earlier_run_left():
    bank, one, other = Bank(), handle(5), handle(6)
    sample(used(model("flux"), bank), "flux", **conds(one))
    sample(used(model("flux"), bank), "flux", **conds(other))
    prompts = {"positive": with_references(tiny.conditioning("flux", 31), one), "negative": with_references(tiny.conditioning("flux", 12), one)}
    sample(used(model("flux"), bank), "flux", **prompts)
    assert len(bank) == 5
    wanted = sample(used(model("flux")), "flux", **conds(one))
    assert torch.equal(sample(used(model("flux"), bank, keep=False), "flux", **conds(one)), wanted)
    assert len(bank) == 2 and {entry.key.fields["content"] for entry in bank.entries.values()} == {other.references[0].recipe.content}


def test_without_keep_garments_leave_with_their_nulls_and_other_garments_stay():
    bank, patcher = Bank(), tryon.fastfit()
    tryon.by_pack(patcher, tryon.handle(tryon.garment(5), tryon.garment(6, "shoe")), bank=bank, cfg=2.5)
    assert len(bank) == 4
    tryon.by_pack(patcher, tryon.handle(tryon.garment(5)), bank=bank, cfg=2.5, keeping=Keeping(keep=False))
    assert {entry.key.fields["class"] for entry in bank.entries.values()} == {"shoe"} and len(bank) == 2


def test_the_limit_is_that_of_the_run_that_began_last():
    bank = Bank()
    wide = used(model("flux"), bank)
    sample(wide, "flux", **conds(handle(5)))
    whole = bank.bytes
    narrow = used(model("flux"), bank, limit=whole // 2)
    assert bank.bytes == whole      # putting it on a model changes nothing
    sample(narrow, "flux", **conds(handle(6)))
    assert 0 < bank.bytes <= whole // 2 == bank.limit
    sample(used(model("flux"), bank, limit=4 * whole), "flux", **conds(handle(7)))
    assert bank.limit == 4 * whole and bank.bytes > whole


def test_a_span_that_ends_where_it_begins_encodes_nothing():
    bank = Bank()
    one = Handle((Reference(condition(model("flux").model.diffusion_model), start=0.0, end=0.0),))
    assert torch.equal(sample(used(model("flux"), bank), "flux", **conds(one)), sample(model("flux"), "flux")) and not len(bank)


def test_an_entry_that_left_comes_back_from_the_bank_and_is_told_once(monkeypatch):
    """Room for one of two conditions that take turns, as of tiles of two sizes."""
    records, bank, real = [], Bank(), Run.reserved

    def half(run, references):
        whole = real(run, references)
        run.loans.limit = run.record.bytes // 2
        return whole

    apart = conds(handle(5), handle(6, weight=0.999999999))      # of two weights, so not in one batch
    wanted = sample(used(model("flux")), "flux", **apart)
    monkeypatch.setattr(Run, "reserved", half)
    assert torch.equal(sample(used(model("flux"), bank, records), "flux", **apart), wanted)
    assert len(records[0].made) == 2 and len(records[0].found) == 0 and len(bank) == 2
    assert f"{2 * STEPS - 1} entries left before the end" in records[0].line()


@pytest.mark.parametrize(("cfg", "entries"), [(1.0, 1), (3.0, 2)])
def test_the_negative_is_reserved_for_where_it_is_computed(cfg, entries):
    bank, records = Bank(), []
    sample(used(model("flux"), bank, records), "flux", cfg=cfg, **conds(handle()))
    assert len(records[0].made) == entries and records[0].bytes == bank.bytes


def test_a_negative_that_something_asks_for_at_cfg_1_is_reserved_for():
    bank, records = Bank(), []
    patched = used(model("flux"), bank, records)
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    sample(patched, "flux", cfg=1.0, **conds(handle()))
    assert len(records[0].made) == 2 and records[0].bytes == bank.bytes


def test_an_entry_that_both_sides_share_is_reserved_for_once():
    bank, records = Bank(), []
    both = with_references(tiny.conditioning("flux", 11), handle())
    sample(used(model("flux"), bank, records), "flux", positive=both, negative=both)
    assert len(records[0].made) == 1 and records[0].bytes == bank.bytes


def in_area(conditioning: list, *area: int) -> list:
    """As the host's node sets it, in latent pixels: height, width, y, x."""
    return [[text, {**more, "area": area, "strength": 1.0, "set_area_to_bounds": False}] for text, more in conditioning]


@pytest.mark.parametrize("limit", [8192, 0])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_prompts_for_areas_with_references_of_their_own_never_make_one_another_leave(cfg, limit):
    """The recipe of the help page. The host gives each area the other side's prompt, and a spatial condition is stretched over each."""
    left, right = in_area(tiny.conditioning("flux", 11), 8, 4, 0, 0), in_area(tiny.conditioning("flux", 13), 8, 4, 0, 4)
    bank, records = Bank(limit * 2 ** 20), []
    first, second = handle(5), handle(6)
    negative = tiny.conditioning("flux", 12)
    sides = {"positive": with_references(left, first) + with_references(right, second),
             "negative": with_references(negative, first) + with_references(negative, second)}
    sample(used(model("flux"), bank, records), "flux", cfg=cfg, **sides)
    assert "left before the end" not in records[0].line() and len(records[0].made) == len(set(map(id, records[0].made))) <= 5
    assert records[0].bytes >= len(records[0].made) * handle().references[0].recipe.bytes(model("flux").model.diffusion_model, torch.float32)


@pytest.mark.parametrize("schedule", ["standard_static", "batched", "standard_uniform", "looped_uniform"])
@pytest.mark.parametrize("length", [4, 6, 8])
def test_context_windows_of_several_sizes_are_reserved_for(schedule, length):
    windows, records = comfy.context_windows, []
    patched = used(model("flux"), records=records)
    patched.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(schedule), windows.get_matching_fuse_method("pyramid"), context_length=length, context_overlap=2,
        context_stride=1, closed_loop=False, dim=3)
    sample(patched, "flux", cfg=2.0, noise=torch.randn(1, 16, 8, 20, generator=torch.Generator().manual_seed(1)), **conds(handle()))
    assert len(records[0].made) > 2 and "left before the end" not in records[0].line()


def test_what_a_run_with_only_one_side_wants():
    held = handle()
    sides = {side: [more for _, more in with_references(tiny.conditioning("flux", seed), held)] for side, seed in (("positive", 11), ("negative", 12))}
    assert len(wanted(sides, (1, 16, 8, 8))) == 2 and len(wanted(sides, (1, 16, 8, 8), alone=True)) == 1


def test_an_entry_above_the_limit_says_how_large_both_are():
    records = []
    sample(used(model("flux"), Bank(), records, limit=1), "flux", cfg=1.0, **conds(handle()))
    assert " KiB is above the bank's limit of 0.0 KiB and is not kept" in records[0].line() and "0.0 MiB" not in records[0].line()
