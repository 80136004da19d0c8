"""FastFit against an explicit joint attention, written from the paper's description over the tensors of the checkpoint alone."""
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_patcher
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from harness import model
from torch.nn import functional as F
from tryon import TENSORS, by_pack, conditioning, drawn, explicit, fastfit, garment, handle, softmax_attention

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit_checkpoint import Shapes, load_fastfit
from pack.core.reference.fastfit_unet import FastFitUNet
from pack.core.reference.handle import Handle
from pack.core.reference.injector import Keeping
from pack.core.reference.join import Mismatch
from pack.core.reference.ready import Ready
from pack.core.reference.seams import SEAMS
from testbed import tiny_fastfit


@pytest.fixture(scope="module")
def patcher():
    return fastfit()


OUTFITS = {
    "one": [garment(5)],
    "one of another size": [garment(5, size=(12, 10))],
    "one of an odd size": [garment(5, "bag", size=(5, 7))],
    "three": [garment(5), garment(6, "lower", (10, 8)), garment(7, "shoe", (4, 4))],
}


@pytest.mark.parametrize("name", OUTFITS)
@pytest.mark.parametrize("size", [(8, 6), (10, 10)])
def test_references_equal_the_explicit_joint_attention(patcher, name, size):
    got = by_pack(patcher, handle(*OUTFITS[name]), size=size)
    with torch.inference_mode():
        wanted = explicit(patcher, got.x, 3.0, conditioning(size), OUTFITS[name])
        without = explicit(patcher, got.x, 3.0, conditioning(size), [])
    assert (wanted - without).abs().max() > 1e-2
    assert (got.eps - wanted).abs().max() <= 1e-5


def test_without_references_the_model_is_the_inpainting_unet_without_cross_attention(patcher):
    got = by_pack(patcher, Handle())
    with torch.inference_mode():
        assert (got.eps - explicit(patcher, got.x, 3.0, conditioning(), [])).abs().max() <= 1e-5


def test_the_order_of_references_does_not_matter(patcher):
    one, two = OUTFITS["three"][:2]
    there, back = (by_pack(patcher, handle(*both)).eps for both in ((one, two), (two, one)))
    assert (there - back).abs().max() <= 1e-5


def test_the_negative_sees_null_references_of_the_same_class(patcher):
    garments, conds = OUTFITS["three"], conditioning()
    got = by_pack(patcher, handle(*garments), cfg=2.5)
    with torch.inference_mode():
        cond, null, none = (explicit(patcher, got.x, 3.0, conds, seen, null=null) for seen, null in ((garments, False), (garments, True), ([], False)))
    assert (null - none).abs().max() > 1e-2
    assert (got.eps - (null + 2.5 * (cond - null))).abs().max() <= 1e-5 * 2.5


@pytest.mark.parametrize("batch", [1, 2])
def test_positive_and_negative_are_one_batch_that_equals_two_calls(patcher, batch):
    references = handle(*OUTFITS["three"])
    got = by_pack(patcher, references, cfg=2.5, batch=batch)
    assert (got.calls, got.rows) == (1, 2 * batch)
    positive = by_pack(patcher, references, batch=batch).eps
    negative = by_pack(patcher, references.other_side(), batch=batch).eps
    assert (got.eps - (negative + 2.5 * (positive - negative))).abs().max() <= 1e-5


def test_an_empty_negative_is_sampled_too(patcher):
    got = by_pack(patcher, handle(garment()), cfg=2.5, negative=Handle())
    with torch.inference_mode():
        cond, none = (explicit(patcher, got.x, 3.0, conditioning(), seen) for seen in ([garment()], []))
    assert got.calls == 2 and (got.eps - (none + 2.5 * (cond - none))).abs().max() <= 1e-5 * 2.5


@pytest.mark.parametrize(("other", "calls"), [((6, 8), 1), ((4, 12), 2)])
def test_sizes_are_one_batch_where_they_have_as_many_tokens_at_every_resolution(patcher, other, calls):
    """4 x 12 has the 48 tokens of 8 x 6, and as many at half of it, but not at a quarter."""
    one, two = garment(5), garment(6, size=other)
    got = by_pack(patcher, handle(one), cfg=2.5, negative=handle(two))
    with torch.inference_mode():
        cond, null = (explicit(patcher, got.x, 3.0, conditioning(), [seen]) for seen in (one, two))
    assert got.calls == calls and (got.eps - (null + 2.5 * (cond - null))).abs().max() <= 1e-5 * 2.5


def test_an_entry_that_is_there_already_is_lent_as_it_is_and_only_to_a_unet_of_its_layout(patcher):
    bank = Bank()
    first = by_pack(patcher, handle(garment(5, size=(12, 10))), bank=bank).eps
    ready = Ready(next(iter(bank.entries.values())), seam="unet")
    assert torch.equal(by_pack(patcher, handle(ready)).eps, first)
    assert not ready.unfit(patcher.model.diffusion_model)
    for name, kind in (("sd15_like", "UNetModel"), ("flux", "Flux")):
        assert ready.unfit(model(name).model.diffusion_model) == (
            f"FastFit upper, 80 x 96 was made for 11 blocks and {kind} has 0 of the kind; use it with the fastfit model that it was made for")
    cut = replace(ready.entry, blocks={**ready.entry.blocks, "middle.0.0": tuple(tensor[..., :3] for tensor in ready.entry.blocks["middle.0.0"])})
    assert Ready(cut, seam="unet").unfit(patcher.model.diffusion_model) == (
        "FastFit upper, 80 x 96 has 8 heads of 3 channels in block middle.0.0 and the model 8 of 16; use it with the fastfit model that it was made for")


def test_doubling_all_keys_and_values_as_the_published_code_does_changes_nothing(patcher):
    got = by_pack(patcher, handle(*OUTFITS["three"]))
    with torch.inference_mode():
        doubled = explicit(patcher, got.x, 3.0, conditioning(), OUTFITS["three"], copies=2)
    assert (got.eps - doubled).abs().max() <= 1e-5


def test_a_weight_multiplies_the_attention_that_a_reference_gets(patcher):
    one, two = OUTFITS["three"][:2]
    got = by_pack(patcher, handle(one, weight=0.5) + handle(two, weight=1.7))
    with torch.inference_mode():
        wanted = explicit(patcher, got.x, 3.0, conditioning(), [one, two], [0.5, 1.7])
        plain = explicit(patcher, got.x, 3.0, conditioning(), [one, two])
    assert (wanted - plain).abs().max() > 1e-3
    assert (got.eps - wanted).abs().max() <= 1e-5


def test_a_weight_of_zero_leaves_a_reference_out_and_encodes_nothing(patcher):
    bank, one, two = Bank(), *OUTFITS["three"][:2]
    got = by_pack(patcher, handle(one) + handle(two, weight=0.0), bank=bank)
    assert torch.equal(got.eps, by_pack(patcher, handle(one)).eps) and len(bank) == 1


def run_keys(patcher, references, **run):
    bank = Bank()
    by_pack(patcher, references, bank=bank, cfg=2.5, **run)
    return {entry.key.digest for entry in bank.entries.values()}


def test_entries_are_shared_by_seeds_sizes_persons_and_guidance_and_not_by_weights_classes_or_garments(patcher):
    before = run_keys(patcher, handle(garment()))
    assert len(before) == 2
    assert run_keys(patcher, handle(garment()), seed=9) == before
    assert run_keys(patcher, handle(garment()), size=(12, 8), sigma=0.7) == before
    assert run_keys(patcher, handle(garment()), conds=conditioning(seed=50)) == before
    assert len(run_keys(patcher, handle(garment(5), garment(6)))) == 3      # the null of a size and class is one
    assert len(run_keys(patcher, handle(garment(6))) & before) == 1
    assert not run_keys(patcher, handle(garment(label="lower"))) & before
    lora = patcher.clone()
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    assert lora.add_patches({name: ("diff", (drawn(3, 32, 32),))}, 0.5)
    assert not run_keys(lora, handle(garment())) & before


def test_a_lora_reaches_references_and_person_alike(patcher):
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    change = drawn(3, 32, 32)
    lora = patcher.clone()
    lora.add_patches({name: ("diff", (change,))}, 0.5)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    got, wanted, plain = (by_pack(one, handle(garment())).eps for one in (lora, fastfit(**{key: TENSORS[key] + 0.5 * change}), patcher))
    assert (got - wanted).abs().max() <= 1e-5 < (plain - wanted).abs().max()


def test_an_entry_takes_the_bytes_that_were_reserved(patcher):
    bank, one = Bank(), garment(size=(10, 7))
    by_pack(patcher, handle(one), bank=bank)
    (entry,) = bank.entries.values()
    assert entry.bytes == one.bytes(patcher.model.diffusion_model, torch.float32) and len(entry.blocks) == 11


def test_the_published_size_takes_the_bytes_of_the_formula():
    """33.05 MiB for 384 x 512 in fp16: 2 x 2 sum n_l T_l C_l."""
    config = {"image_size": 32, "in_channels": 9, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
              "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "num_heads": 8,
              "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "context_dim": 768, "num_class_embeds": 5}
    net = FastFitUNet(**config, device="meta", operations=Shapes)
    formula = 2 * 2 * (5 * 3072 * 320 + 5 * 768 * 640 + 5 * 192 * 1280 + 48 * 1280)
    assert garment(size=(64, 48)).bytes(net, torch.float16) == formula == round(33.046875 * 2 ** 20)


def test_an_existing_replacement_is_called_with_the_larger_keys_and_values(patcher):
    seen, changed = [], patcher.clone()

    def replacement(q, k, v, extra_options):
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return softmax_attention(q, k, v, extra_options["n_heads"])

    changed.set_model_attn1_replace(replacement, "middle", 0)
    got = by_pack(changed, handle(garment()))
    assert seen == [(4, 8, 8)]
    there = {"patches_replace": {"attn1": {("middle", 0): replacement}}}
    segment = SimpleNamespace(entry=SimpleNamespace(blocks={"middle.0.0": None, "input.1.0": None}))
    assert len(SEAMS["unet"](there, None, [segment], None)["patches_replace"]["attn1"]) == 3 and len(there["patches_replace"]["attn1"]) == 1
    assert (got.eps - by_pack(patcher, handle(garment())).eps).abs().max() <= 1e-5
    with pytest.raises(Mismatch, match=r"^another node replaces the self-attention of block middle.0.0 and cannot weigh references; set the weight"):
        by_pack(changed, handle(garment(), weight=0.5))


def test_perturbed_attention_guidance_runs_beside_references(patcher):
    guided = PerturbedAttentionGuidance.execute(patcher, 3.0)[0]
    got, plain = (by_pack(one, handle(garment()), cfg=2.5).eps for one in (guided, patcher))
    assert got.isfinite().all() and (got - plain).abs().max() > 1e-3


def test_a_streamed_entry_gives_the_same_picture(patcher):
    bank, references = Bank(), handle(*OUTFITS["three"])
    first = by_pack(patcher, references, cfg=2.5, bank=bank).eps
    for _ in range(2):
        assert torch.equal(by_pack(patcher, references, cfg=2.5, bank=bank, keeping=Keeping("streamed")).eps, first)
        bank.clear()


def test_the_override_of_attention_is_used_for_person_and_references(patcher):
    seen, changed = [], patcher.clone()

    def override(attention, *args, **kwargs):
        seen.append(args[1].shape[-2])
        return attention(*args, **kwargs)

    changed.model_options["transformer_options"]["optimized_attention_override"] = override
    got = by_pack(changed, handle(garment()))
    assert torch.equal(got.eps, by_pack(patcher, handle(garment())).eps)
    assert seen[:2] == [48, 48] and seen[11:13] == [96, 96] and len(seen) == 22


def test_patches_and_wrappers_of_the_model_do_not_reach_the_reference_pass(patcher):
    calls, changed = [], patcher.clone()
    changed.set_model_output_block_patch(lambda h, skip, options: (calls.append(len(h)), (h, skip))[1])
    changed.add_wrapper_with_key("diffusion_model", "test", lambda executor, *args, **kwargs: (calls.append("wrapper"), executor(*args, **kwargs))[1])
    got = by_pack(changed, handle(garment()))
    assert calls == ["wrapper"] + [1] * 9
    assert torch.equal(got.eps, by_pack(patcher, handle(garment())).eps)


def test_a_run_leaves_nothing_on_the_model(patcher):
    before, state = by_pack(patcher, Handle()).eps, {name: id(module) for name, module in patcher.model.named_modules()}
    by_pack(patcher, handle(garment()), cfg=2.5)
    assert torch.equal(by_pack(patcher, Handle()).eps, before)
    assert state == {name: id(module) for name, module in patcher.model.named_modules()}
    assert not patcher.model_options["transformer_options"]


def test_half_precision_and_fp8_weights_give_nearly_the_same(tmp_path):
    tiny_fastfit.write(tmp_path / "x.safetensors")
    whole = by_pack(fastfit(), handle(garment())).eps
    for weights, least in (("default", 0.99), ("fp8_e4m3fn", 0.9)):
        loaded = load_fastfit(tmp_path / "x.safetensors", weights)
        assert isinstance(loaded, comfy.model_patcher.ModelPatcher)
        got = by_pack(loaded, handle(garment())).eps
        assert F.cosine_similarity(got.flatten().float(), whole.flatten(), 0) > least
    assert loaded.model.diffusion_model.class_embedding.weight.dtype == torch.float8_e4m3fn
