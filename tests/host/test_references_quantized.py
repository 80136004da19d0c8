"""References on quantized models: as exact as on full ones where activations are not rounded, and no further off than a rounding where they are.

Int8 and fp8 layers round their inputs; a last bit in an input may tip a code, and that moves the output by about what quantization
itself is off. So there the bound is a share of that error, and what was kept must be to the bit what encoding anew gives.
"""
import pytest
import torch
from edit_models import compared
from template_files import base, scalar_weights, template
from test_easycontrol import adapter, by_pack, condition, explicit
from test_templates import both, concatenating, sampled

from pack.core.quant.files import WeightFile
from pack.core.quant.loader import load_file
from pack.core.quant.plan import Settings
from pack.core.reference.bank import Bank
from pack.core.reference.handle import Handle, Reference
from pack.core.reference.injector import attach_references
from pack.core.reference.templates.merge import referred
from testbed import gguf_files, quantized, tiny

ROUNDED = ("int8", "fp8")       # computes that round activations
SHARE = 0.2                     # of the error that the format itself makes


@pytest.fixture(scope="module")
def models():
    """(format, kind) -> model, each made once."""
    kept = {}
    return lambda form, kind="flux": kept.get((form, kind)) or kept.setdefault((form, kind), made_in(form, kind))


def made_in(form: str, kind: str):
    """A seeded model in a format: of safetensors, of GGUF, or what the loader makes of full precision."""
    tensors, metadata = (base().model.diffusion_model.state_dict(), {}) if kind == "klein" else tiny.weights(kind)
    tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    made, packed = dict(tensors), {}
    if form in gguf_files.TYPES:
        from pack.core.quant.files import Blocks

        for key in [key for key, tensor in tensors.items() if quantized.linear(key, tensor) and tensor.shape[1] % gguf_files.block(form) == 0]:
            tensor = made.pop(key)
            packed[key] = Blocks(form, tuple(tensor.shape), torch.from_numpy(gguf_files.encoded(tensor.numpy(), form)))
    elif form in quantized.WRITERS:
        for key, tensor in tensors.items():
            if quantized.linear(key, tensor):
                del made[key]
                made |= {key.removesuffix(".weight") + end: part for end, part in quantized.WRITERS[form](tensor).items()}
    compute = form if form in ROUNDED else "host"
    with torch.inference_mode():
        return load_file(WeightFile(quantized.MODELS / "none.gguf", "gguf", metadata, made, packed), Settings(compute=compute))[0]


def errors(models, form: str, kinds=("spatial", "subject")) -> tuple[float, float, float]:
    """(off the joint attention over the same layers, off the same of full precision, what the conditions change)"""
    found = {}
    for name in (form, "fp32"):
        patcher = models(name)
        net = patcher.model.diffusion_model
        one = adapter(net, slots=len(kinds))
        conditions = [condition(net, seed=i, kind=kind, slot=i, adapter=one) for i, kind in enumerate(kinds)]
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
        conds = tiny.conditioning("flux", 11)
        got = by_pack(patcher, noise, 0.7, conds, Handle(tuple(map(Reference, conditions))))
        with torch.inference_mode():
            wanted, without = (explicit(patcher, got["x"], 0.7, conds[0][0], conds[0][1]["pooled_output"], 3.5, some) for some in (conditions, []))
        found[name] = got["v"], wanted, without
    got, wanted, without = found[form]
    return (got - wanted).abs().max().item(), (wanted - found["fp32"][1]).abs().max().item(), (wanted - without).abs().max().item()


@pytest.mark.parametrize("form", ["bf16", "float8_e4m3fn", "Q8_0", "Q4_0", "Q5_1"])
def test_on_weights_alone_in_few_bits_a_condition_equals_the_joint_attention_as_on_full_ones(form, models):
    off, quantization, effect = errors(models, form)
    assert off <= 1e-5 and effect > 1e-2 and quantization > 1e-4


@pytest.mark.parametrize("form", [*ROUNDED, "int8_tensorwise, rotated", "float8_e4m3fn scaled"])
def test_where_activations_are_rounded_a_condition_is_off_by_less_than_the_format(form, models):
    off, quantization, effect = errors(models, form)
    assert off <= SHARE * quantization and effect > 1e-2, (off, quantization, effect)


@pytest.mark.parametrize("form", [*ROUNDED, "Q4_0", "float8_e4m3fn"])
def test_what_was_kept_is_to_the_bit_what_encoding_anew_gives(form, models):
    patcher, bank = models(form), Bank()
    handle = Handle((Reference(condition(patcher.model.diffusion_model, seed=4)),))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    conds = tiny.conditioning("flux", 11)
    first, kept, anew = (by_pack(patcher, noise, 0.7, conds, handle, bank=one)["v"] for one in (bank, bank, Bank()))
    assert torch.equal(first, kept) and torch.equal(first, anew)


@pytest.mark.parametrize("form", ["int8", "Q4_0"])
def test_an_entry_of_the_full_model_is_not_taken_for_one_of_the_quantized_model(form, models):
    bank = Bank()
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    conds = tiny.conditioning("flux", 11)
    full = models("fp32")
    handle = Handle((Reference(condition(full.model.diffusion_model, seed=4)),))
    by_pack(full, noise, 0.7, conds, handle, bank=bank)
    shared, own = (by_pack(models(form), noise, 0.7, conds, handle, bank=one)["v"] for one in (bank, Bank()))
    assert torch.equal(shared, own)


@pytest.mark.parametrize(("form", "most"), [("bf16", 1e-5), ("float8_e4m3fn", 1e-5), ("Q4_0", 1e-5), ("int8", 1e-3), ("float8_e4m3fn scaled", 1e-3)])
def test_reference_latents_equal_masked_joint_attention_over_the_same_layers(form, most, models):
    off, unmasked = compared((31, 32), patched=models(form, "flux2"), steps=1, cfg=1.0)      # guidance multiplies what a tipped code does
    assert off <= most and off < unmasked / 5, (off, unmasked)


@pytest.mark.parametrize("form", ["bf16", "float8_e4m3fn", "Q4_0", "int8", "float8_e4m3fn scaled"])
def test_a_template_is_to_the_bit_what_a_concatenation_gives_over_the_same_layers(form, models, tmp_path):
    patcher, bright = models(form, "klein"), template(tmp_path, scalar_weights())
    entry, null = bright.entry((0.7,)), bright.entry((0.4,))
    wanted = sampled(concatenating(patcher, {0: [entry], 1: [null]}))
    assert torch.equal(sampled(attach_references(patcher), **both(referred(entry, null))), wanted)
