"""Templates that are LoRAs, or text: merged by hand against the host's own machinery."""
import comfy.utils
import pytest
import torch
from harness import sample
from template_files import WIDTH, base, lora_weights, scalar_weights, template
from test_templates import STEPS, both, concatenating, sampled

from pack.core.reference.injector import attach_references
from pack.core.reference.templates.lora import applied, chosen, merged
from pack.core.reference.templates.merge import referred
from pack.core.reference.templates.text import with_text
from testbed import tiny

Q, LINEAR = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"
PLACES = {Q: ("double_blocks.0.img_attn.qkv", slice(0, WIDTH)), LINEAR: ("single_blocks.1.linear1", slice(None))}
CONDS = {"positive": tiny.conditioning("flux2", 11), "negative": tiny.conditioning("flux2", 12)}


def changed(model, deltas: dict):
    """The model with these changes written into its weights, on one deep copy."""
    clone = base()
    for layer, delta in deltas.items():
        name, rows = PLACES[layer]
        comfy.utils.get_attr(clone.model.diffusion_model, f"{name}.weight").data[rows] += delta
    return clone


def delta(weights, layer, i=None):
    down, up = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
    return up @ down if i is None else up[i] @ down[i]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def model():
    return base()


def test_a_bank_s_chosen_loras_change_every_layer_by_the_sum_of_their_changes(tmp_path, model):
    weights = lora_weights(count=4)
    bank = template(tmp_path, weights)
    assert bank.count == 4 and len(bank.loras([1, 3])) == 2
    lora = merged(bank.loras([1, 3]), [0.5, 2.0])
    got, *_ = applied(model, *CONDS.values(), lora, 0.8, "both", "it")
    wanted = changed(model, {layer: 0.8 * (0.5 * delta(weights, layer, 1) + 2.0 * delta(weights, layer, 3)) for layer in PLACES})
    close(sampled(got), sampled(wanted))
    assert (sampled(got) - sampled(model)).abs().max() > 1e-2


def test_loras_of_different_layers_are_merged_with_all_layers_of_all_of_them(tmp_path, model):
    first, second = lora_weights(seed=3, layers=(Q,)), lora_weights(seed=4, layers=(LINEAR, Q), rank=3)
    loras = [template(tmp_path, weights, name).loras([0])[0] for name, weights in (("a", first), ("b", second))]
    got, *_ = applied(model, *CONDS.values(), merged(loras, [1.0, 1.0]), 1.0, "both", "it")
    close(sampled(got), sampled(changed(model, {Q: delta(first, Q) + delta(second, Q), LINEAR: delta(second, LINEAR)})))


def test_an_alpha_is_divided_by_the_rank(tmp_path):
    weights = lora_weights(layers=(Q,), rank=4)
    down, up = template(tmp_path, {**weights, f"{Q}.alpha": torch.tensor(2.0)}).loras([0])[0][Q]
    torch.testing.assert_close(up @ down, delta(weights, Q) / 2)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_lora_of_one_side_acts_on_that_side_alone(tmp_path, model, side):
    weights = lora_weights()
    lora = merged(template(tmp_path, weights).loras([0]), [1.0])
    same, positive, negative = applied(model, *CONDS.values(), lora, 1.0, side, "it")
    assert same is model
    got = sample(model, "flux2", steps=1, size=(4, 6), cfg=3.0, positive=positive, negative=negative)
    other = changed(model, {layer: delta(weights, layer) for layer in PLACES})

    def side_of(name, patcher):
        return sample(patcher, "flux2", steps=1, size=(4, 6), cfg=1.0, positive=CONDS[name])

    p, n = (side_of(name, other if name == side else model) for name in ("positive", "negative"))
    close(got, n + 3.0 * (p - n))       # one Euler step to sigma 0 is linear in the prediction
    assert (got - sample(model, "flux2", steps=1, size=(4, 6), cfg=3.0, **CONDS)).abs().max() > 1e-2


def test_a_lora_of_one_side_and_a_scalar_template_act_together(tmp_path, model):
    entry = template(tmp_path, scalar_weights(), "bright").entry((0.7,))
    lora = merged(template(tmp_path, lora_weights()).loras([0]), [1.0])
    conds = both(referred(entry, entry))
    attached, positive, negative = applied(attach_references(model), *conds.values(), lora, 1.0, "positive", "it")
    _, *plain = applied(model, *CONDS.values(), lora, 1.0, "positive", "it")
    wanted = sampled(concatenating(model, {0: [entry], 1: [entry]}), positive=plain[0], negative=plain[1])
    assert torch.equal(sampled(attached, positive=positive, negative=negative), wanted)


@pytest.mark.parametrize(("weights", "said"), [
    (lora_weights(layers=("transformer_blocks.9.attn.to_q",)), r"changes layers that Flux2 has not \('transformer_blocks.9.attn.to_q'\)"),
    (lora_weights(layers=(Q,), width=512), rf"changes {Q} as a weight of shape \[512, 512\], and in Flux2 it is \[256, 256\]"),
    (lora_weights(layers=("diffusion_model.double_blocks.0.img_attn.norm.key_norm",)), r"shape \[256, 256\], and in Flux2 it is \[128\]"),
])
def test_a_lora_for_another_model_is_told_instead_of_left_out(tmp_path, model, weights, said):
    lora = merged(template(tmp_path, weights).loras([0]), [1.0])
    with pytest.raises(ValueError, match=said):
        applied(model, *CONDS.values(), lora, 1.0, "both", "template x")


def test_a_side_without_a_prompt_and_a_lora_that_is_not_there_are_told(tmp_path, model):
    bank = template(tmp_path, lora_weights(count=3))
    with pytest.raises(ValueError, match="on the negative prompt alone and none is connected"):
        applied(model, CONDS["positive"], None, merged(bank.loras([0]), [1.0]), 1.0, "negative", "it")
    with pytest.raises(ValueError, match="LoRA 3 was asked of template.safetensors, which has 3, counted from 0"):
        bank.loras([0, 3])


@pytest.mark.parametrize(("text", "numbers"), [("", [0, 1, 2, 3, 4]), ("1", [1]), (" 0, 2-4 ", [0, 2, 3, 4]), ("3,3", [3])])
def test_loras_are_chosen_by_numbers_and_ranges(text, numbers):
    assert chosen(text, 5) == numbers


@pytest.mark.parametrize("text", ["a", "1;2", "-1", "1--2", "9" * 9, "4-2", ",", "0-999999"])
def test_what_chooses_no_lora_is_told(text):
    with pytest.raises(ValueError, match="expected numbers from 0 to 4"):
        chosen(text, 5)


def test_text_of_several_templates_follows_the_prompt_s_and_moves_the_picture(tmp_path, model):
    generator = torch.Generator().manual_seed(9)
    first, second = torch.randn(3, 16, generator=generator), torch.randn(1, 2, 16, generator=generator)
    one, two = (template(tmp_path, {key: tensor}, name) for name, key, tensor in (("a", "text_embedding", first), ("b", "extra_text_embedding", second)))
    (text, others), = with_text(with_text(CONDS["positive"], one), two)
    assert torch.equal(text, torch.cat([CONDS["positive"][0][0], first[None], second], 1)) and others is not CONDS["positive"][0][1]
    moved = sample(model, "flux2", steps=STEPS, size=(4, 6), positive=[[text, others]], negative=CONDS["negative"])
    assert (moved - sampled(model, **CONDS)).abs().max() > 1e-2
    wrong = template(tmp_path, {"text_embedding": torch.zeros(3, 17)}, "wrong")
    with pytest.raises(ValueError, match="wrong.safetensors has text of 17 channels and the prompt 16"):
        with_text(CONDS["positive"], wrong)
