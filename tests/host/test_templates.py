"""Diffusion Templates against an explicit concatenation of keys and values behind the rotation, written from the paper's description."""
import math

import comfy.model_management
import pytest
import torch
from harness import sample
from template_files import BLOCKS, WIDTH, base, scalar_weights, template

from pack.core.reference.bank import Bank
from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.templates.merge import referred
from testbed import tiny

STEPS = 3


def by_hand(weights, values, block, part):
    """Keys or values of a scalar template, [1, H, T, D]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    code = torch.cat([torch.cat([(1000 * torch.tensor(v) * frequencies).cos(), (1000 * torch.tensor(v) * frequencies).sin()]) for v in values])
    w = {key.removeprefix(f"proj_{part}.{block}."): tensor for key, tensor in weights.items() if key.startswith(f"proj_{part}.{block}.")}
    hidden = w["prefer_value_embedder.0.weight"] @ code + w["prefer_value_embedder.0.bias"]
    hidden = w["prefer_value_embedder.2.weight"] @ (hidden * hidden.sigmoid()) + w["prefer_value_embedder.2.bias"]
    return (hidden + w["positional_embedding"]).view(1, -1, WIDTH // 128, 128).transpose(1, 2)


def concatenating(patcher, sides: dict[int, list], weights=None, calls: list | None = None):
    """The model with keys and values put behind its own where the rotation is done. sides: of cond_or_uncond; weights: of each entry's tokens, by softmax."""
    def attend(func, q, k, v, heads, transformer_options=None, **more):
        block = f"{transformer_options['block_type']}.{transformer_options['block_index']}"
        chunks = transformer_options["cond_or_uncond"]
        per = len(q) // len(chunks)
        if calls is not None and block == "double.0":
            calls.append(chunks)

        def joined(own, part):
            rows = [torch.cat([own[i * per:(i + 1) * per], *(e.blocks[block][part].expand(per, -1, -1, -1) for e in sides.get(side, ()))], 2)
                    for i, side in enumerate(chunks)]
            return torch.cat(rows)

        keys, values = joined(k, 0), joined(v, 1)
        if weights is None:
            return func(q, keys, values, heads, transformer_options=transformer_options, **more)
        scale = torch.cat([torch.ones(k.shape[2]), *(torch.full((e.tokens,), w) for e, w in zip(sides[chunks[0]], weights, strict=True))])
        shares = (q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp() * scale
        return ((shares / shares.sum(-1, keepdim=True)) @ values).transpose(1, 2).flatten(2)

    clone = patcher.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attend
    return clone


def both(handle):
    """Positive and negative with the references."""
    positive, negative = tiny.conditioning("flux2", 11), tiny.conditioning("flux2", 12)
    return {"positive": with_references(positive, handle), "negative": with_references(negative, handle.other_side())}


def sampled(patcher, **more):
    return sample(patcher, "flux2", steps=STEPS, size=(4, 6), **more)


@pytest.fixture(scope="module")
def model():
    return base()


@pytest.fixture
def bright(tmp_path):
    return template(tmp_path, scalar_weights())


@pytest.mark.parametrize("values", [(0.7,), (0.2, 0.4, 0.9)])
def test_a_scalar_template_is_two_layers_on_the_code_of_its_values_and_learnt_tokens(tmp_path, values):
    weights = scalar_weights(values=len(values))
    entry = template(tmp_path, weights).entry(values)
    assert list(entry.blocks) == [block.replace("_", ".") for block in BLOCKS] and entry.tokens == 6 and entry.rope == "none" and entry.exactness == "exact"
    for block in BLOCKS:
        for part, tensor in zip("kv", entry.blocks[block.replace("_", ".")], strict=True):
            torch.testing.assert_close(tensor, by_hand(weights, values, block, part), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_injected_equals_a_concatenation_behind_the_rotation_to_the_bit_in_one_batch(model, bright, batch):
    entry, null, chunks = bright.entry((0.7,)), bright.entry((0.4,)), []
    wanted = sampled(concatenating(model, {0: [entry], 1: [null]}, calls=chunks), batch=batch)
    got = sampled(attach_references(model), batch=batch, **both(referred(entry, null)))
    assert torch.equal(got, wanted) and all(len(chunk) == 2 for chunk in chunks)
    assert (got - sampled(model, batch=batch)).abs().max() > 1e-2
    assert (got - sampled(attach_references(model), batch=batch, **both(referred(entry, entry)))).abs().max() > 1e-2


def test_positive_and_negative_are_one_batch_where_they_have_as_many_tokens_and_two_where_not(model, bright):
    seen = []

    def spy(executor, x, *args, **kwargs):
        seen.append(len(x))
        return executor(x, *args, **kwargs)

    attached = attach_references(model)
    attached.add_wrapper_with_key("diffusion_model", "test.spy", spy)
    sampled(attached, **both(referred(bright.entry((0.7,)), bright.entry((0.4,)))))
    assert seen == [2] * STEPS
    seen.clear()
    got = sampled(attached, **both(referred(bright.entry((0.7,)))))
    assert seen == [1] * 2 * STEPS
    clone = concatenating(model, {0: [bright.entry((0.7,))]})
    alone = dict(both(referred(bright.entry((0.7,)))))
    alone["positive"] = [[alone["positive"][0][0], {"guidance": 2.0}]]      # a condition that does not batch with the other
    assert torch.equal(got, sampled(clone, **alone))


def test_several_templates_stand_one_behind_the_other(tmp_path, model, bright):
    sharp = template(tmp_path, scalar_weights(seed=8, tokens=9), "sharp")
    one, two, null = bright.entry((0.7,)), sharp.entry((0.3,)), sharp.entry((0.5,))
    handle = referred(two, null, before=referred(one, one))
    wanted = sampled(concatenating(model, {0: [one, two], 1: [one, null]}))
    assert torch.equal(sampled(attach_references(model), **both(handle)), wanted)
    assert not torch.equal(wanted, sampled(concatenating(model, {0: [one], 1: [one]})))


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_weight_multiplies_the_attention_that_the_tokens_get(tmp_path, model, bright, weight):
    sharp = template(tmp_path, scalar_weights(seed=8, tokens=9), "sharp")
    one, two = bright.entry((0.7,)), sharp.entry((0.3,))
    handle = referred(two, two, before=referred(one, one, weight=weight))
    wanted = sampled(concatenating(model, {0: [one, two], 1: [one, two]}, weights=[weight, 1.0]))
    got = sampled(attach_references(model), **both(handle))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - sampled(attach_references(model), **both(referred(two, two, before=referred(one, one))))).abs().max() > 1e-2


def test_weight_0_and_a_template_whose_time_has_not_come_leave_the_host_s_picture(model, bright):
    entry = bright.entry((0.7,))
    plain = sampled(model)
    assert torch.equal(plain, sampled(attach_references(model), **both(referred(entry, entry, weight=0.0))))
    early = sampled(attach_references(model), **both(referred(entry, entry, end=0.3)))
    assert not torch.equal(plain, early) and not torch.equal(early, sampled(attach_references(model), **both(referred(entry, entry))))


def lora_on(patcher, strength: float = 1.0):
    clone, generator = patcher.clone(), torch.Generator().manual_seed(6)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert clone.add_patches({key: ("diff", (0.2 * torch.randn(3 * WIDTH, WIDTH, generator=generator),))}, strength) == [key]
    return clone


def test_a_clone_with_a_lora_behind_the_injector_uses_the_same_entry_on_its_own_weights(model, bright):
    entry, bank, found = bright.entry((0.7,)), Bank(), []
    attached = attach_references(model, notify=found.append, bank=bank)
    without = sampled(attached, **both(referred(entry, entry)))
    got = sampled(lora_on(attached), **both(referred(entry, entry)))
    wanted = sampled(lora_on(concatenating(model, {0: [entry], 1: [entry]})))
    assert torch.equal(got, wanted) and (got - without).abs().max() > 1e-2
    assert not len(bank) and all(not record.made and not record.found and record.given == [entry.source] for record in found)


def test_the_key_hangs_on_the_weights_and_the_values_and_on_nothing_else(tmp_path, bright):
    key = bright.entry((0.7,)).key
    assert key.lasting and set(key.fields) == {"system", "template", "inputs", "numerics"}
    assert key == template(tmp_path, scalar_weights(), "under another name").entry((0.7,)).key
    assert key.differing(bright.entry((0.70001,)).key) == ["inputs"]
    assert key.differing(template(tmp_path, scalar_weights(seed=2), "other").entry((0.7,)).key) == ["template"]
    half = {name: tensor.bfloat16() for name, tensor in scalar_weights().items()}
    other = template(tmp_path, half, "half").entry((0.7,))
    assert other.key.differing(key) == ["numerics", "template"] and all(k.dtype == torch.bfloat16 for k, _ in other.blocks.values())


def test_no_linear_layer_of_the_model_sees_a_token_of_a_template(model, bright):
    rows = {}

    def counted(patcher, **more):
        rows.clear()
        hooks = [module.register_forward_hook(lambda module, args, out, name=name: rows.setdefault(name, []).append(args[0].shape[:-1].numel()))
                 for name, module in patcher.model.diffusion_model.named_modules() if isinstance(module, torch.nn.Linear)]
        try:
            sampled(patcher, **more)
        finally:
            for hook in hooks:
                hook.remove()
        return dict(rows)

    plain = counted(model)
    assert len(plain) > 20 and counted(attach_references(model), **both(referred(bright.entry((0.7,)), bright.entry((0.4,))))) == plain


def test_unloading_the_model_between_two_runs_changes_nothing(model, bright):
    attached, conds = attach_references(model), both(referred(bright.entry((0.7,)), bright.entry((0.4,))))
    first = sampled(attached, **conds)
    comfy.model_management.unload_all_models()
    assert torch.equal(first, sampled(attached, **conds))


def test_a_model_that_the_template_was_not_made_for_is_told_before_it_samples(model, bright, tmp_path):
    handle = referred(bright.entry((0.7,)))
    with pytest.raises(ValueError, match="made for 5 blocks and Flux has 3 of the kind; use it with the flux2 model"):
        sampled(attach_references(tiny.patcher("flux2")), **both(handle))
    with pytest.raises(ValueError, match="has 2 heads of 128 channels in block double.0 and the model 1 of 128"):
        sampled(attach_references(base(hidden=128)), **both(handle))
    with pytest.raises(ValueError, match="was made for FLUX.2 and the model is FLUX.1"):
        sample(attach_references(tiny.patcher("flux")), "flux", steps=1, positive=with_references(tiny.conditioning("flux", 1), handle))
    with pytest.raises(ValueError, match="has 0 of the kind"):
        sample(attach_references(tiny.patcher("z_image")), "z_image", steps=1, positive=with_references(tiny.conditioning("z_image", 1), handle))


def test_templates_of_different_bases_are_named_and_none_is_dropped(tmp_path, bright):
    other = template(tmp_path, scalar_weights(blocks=BLOCKS[:-1]), "smaller").entry((0.5,))
    with pytest.raises(ValueError) as caught:
        referred(other, before=referred(bright.entry((0.7,))))
    assert "template.safetensors, 0.7" in str(caught.value) and "smaller.safetensors, 0.5" in str(caught.value)
    assert "5 blocks of 2 heads" in str(caught.value) and "4 blocks of 2 heads" in str(caught.value)
