"""Fused Kernels in the host's own blocks, by the kernels' torch references: the same picture, fused where it should be, gone when the run is."""
from itertools import islice

import pytest
import torch
from fusing import FEW, NAMES, counts, fused, made, ran
from harness import blocks, model, network, relative, sample
from quantized import SUBJECTS, WRITERS, drawn, nearness, shifted, write
from test_quantized_loader import stock
from test_threads_and_compile import compiled

from benchmarks import _pictures as bench
from pack.core.families.base import module_at
from pack.core.quant.fusion import attach, heads, products, rules
from pack.core.quant.fusion.attach import LAYERS, Settings, attach_fused_kernels
from pack.core.quant.fusion.sites import SITES
from pack.nodes.fused_kernels import FusedKernels as Node
from testbed import tiny
from testbed.quantized import int8


def expected(name: str) -> dict[str, int]:
    """From the host's blocks alone: each norm is fused with its modulation, and with the residual before it but in the first block of a stack."""
    net = network(model(name))
    if name == "z_image":
        stacks = [len(net.noise_refiner), len(net.layers)]
        every = sum(stacks)
        return {"norm+modulate+int8": len(stacks), "norm+residual+norm+modulate+int8": 2 * every - len(stacks), "swiglu+int8": every,
                "K or V not copied": 2 * every}
    doubles, singles = len(net.double_blocks), len(net.single_blocks)
    act = "swiglu" if net.params.mlp_ratio == 3.0 else "gelu"
    turned = {"norm+cat+rope of q and k": doubles, "norm+rope of q and k": singles}
    return turned | {
        "norm+modulate+int8": 3, "residual+norm+modulate+int8": 4 * doubles - 2 + singles - 1, f"{act}+int8": 2 * doubles, f"{act}+cat+int8": singles}


@pytest.mark.parametrize("name", NAMES)
def test_every_place_in_every_block_is_fused(name):
    latent, record = ran(made(name), name)
    assert counts(record) == expected(name) and not record.left
    assert record.blocks == len(blocks(name)) + (len(network(model(name)).noise_refiner) if name == "z_image" else 0)
    assert record.line().startswith(f"Fused Kernels: {record.blocks} blocks, in each evaluation ")
    true = sample(made(name), name, steps=FEW)
    assert 0 < relative(latent, true) < 2 * relative(sample(made(name), name, steps=FEW, noise=nudged(name)), true)


def nudged(name):
    """Noise off by a millionth: what rounding to codes makes of that is as near as two right ways to compute one picture come."""
    return tiny.noise(name) * (1 + 1e-6)


@pytest.mark.parametrize("form", ["int8_tensorwise", "int8, rotated by 256"])
@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_a_trained_int8_model_draws_the_host_s_picture(name, form, tmp_path, monkeypatch):
    if name == "flux" and form != "int8_tensorwise":       # the one whose layers are whole groups of 256 wide
        monkeypatch.setitem(SUBJECTS, name, bench.SUBJECTS[0])
    monkeypatch.setitem(WRITERS, "int8, rotated by 256", lambda weight: int8(weight, 256))
    patcher, records = stock(write(name, form, tmp_path / "model.safetensors")), []
    true, found = drawn(name, patcher, 2), drawn(name, fused(patcher, records), 2)
    assert len(records) == 2 and sum(records[0].fused.values()) > 0
    near = nearness(found, true)
    moved = [bench.sample(shifted(SUBJECTS[name], patcher), caption, noise * (1 + 1e-6), 20, 1.0, "euler")
             for caption, noise in islice(SUBJECTS[name].pictures(), 2)]
    print(f"{name} {form}: {near:.1f} dB, and {nearness(moved, true):.1f} dB with noise off by a millionth; {records[0].line()}")
    assert near > max(50, nearness(moved, true) - 3)


@pytest.mark.parametrize("name", ["flux", "flux2", "z_image", "lumina2", "flux_longcat"])
def test_a_full_model_in_single_precision_comes_within_a_millionth(name):
    latent, record = ran(model(name), name, {"steps": 1})
    true = sample(model(name), name, steps=1)
    assert counts(record)["norm+modulate"] > 0
    assert (latent - true).abs().max() <= 1e-6 * max(1.0, true.abs().max()) * 10
    assert ((latent - true).norm() / true.norm()) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_with_layers_int8_a_full_model_is_left_alone_to_the_bit(name):
    latent, record = ran(model(name), name, layers="int8")
    assert torch.equal(latent, sample(model(name), name, steps=FEW)) and set(record.fused) <= {"K or V not copied"} and record.left


@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_the_kernels_are_as_near_to_single_precision_as_the_host(name):
    in_16_bits = made(name, torch.bfloat16)
    records: list = []
    true, host, ours = (sample(patcher, name, steps=2) for patcher in (made(name), in_16_bits, fused(in_16_bits, records)))
    assert counts(records[0]) == expected(name)
    assert 0 < relative(ours, true) < 1.3 * relative(host, true)


KERNELS = {
    "modulate_int8": NAMES, "gated_residual_int8": NAMES[:2], "sandwich_residual_int8": NAMES[2:], "activate_int8": NAMES, "int8_linear": NAMES,
}


@pytest.mark.parametrize(("kernel", "name"), [(kernel, name) for kernel, names in KERNELS.items() for name in names])
def test_a_kernel_that_is_wrong_is_seen_in_the_latent(kernel, name, monkeypatch):
    right, whole = getattr(products, kernel), sample(fused(made(name)), name, steps=1)

    def wrong(*args, **options):
        made = right(*args, **options)
        return made.roll(1, -1) if kernel == "int8_linear" else (*made[:-2], made[-2].roll(1, -1), made[-1])
    monkeypatch.setattr(products, kernel, wrong)
    assert relative(sample(fused(made(name)), name, steps=1), whole) > 0.02


def test_a_wrong_modulation_is_seen_before_full_layers(monkeypatch):
    right = products.modulate
    monkeypatch.setattr(products, "modulate", lambda *args, **options: right(*args, **options) * 1.5)
    assert relative(sample(fused(model("flux")), "flux", steps=1), sample(model("flux"), "flux", steps=1)) > 0.01


@pytest.mark.parametrize("name", NAMES[:2])
def test_queries_that_are_wrongly_turned_are_seen(name, monkeypatch):
    right = heads.qkv_rope
    monkeypatch.setattr(heads, "qkv_rope", lambda *args, **options: [part * 2 for part in right(*args, **options)])
    assert relative(sample(fused(model(name)), name, steps=1), sample(model(name), name, steps=1)) > 0.01


def test_keys_that_are_wrongly_not_copied_are_seen(monkeypatch):
    monkeypatch.setitem(
        rules.RULES, torch.Tensor.flatten, lambda args, kwargs: rules.flattened(args, kwargs) * 2 if rules.pending(args[0], rules.Once) else None)
    assert relative(sample(fused(model("z_image")), "z_image", steps=1), sample(model("z_image"), "z_image", steps=1)) > 0.01


# off is off ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_disabled_node_hands_on_the_very_model(name):
    assert Node.execute(model(name), enabled=False).result[0] is model(name)


@pytest.mark.parametrize("name", NAMES)
def test_without_triton_the_node_passes_through_to_the_bit_and_says_why(name):
    records: list = []
    latent = sample(attach_fused_kernels(model(name), Settings(), records.append), name, steps=FEW)
    (record,) = records
    assert torch.equal(latent, sample(model(name), name, steps=FEW)) and not record.fused
    assert record.line().startswith("Fused Kernels is off: ") and "NVIDIA" in record.line()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_model(name):
    patcher = made(name)
    true = sample(patcher, name, steps=FEW)
    before = {path: dict(vars(module)) for path, module in network(patcher).named_modules()}
    options = str(patcher.model_options)
    ran(patcher, name)
    assert {path: dict(vars(module)) for path, module in network(patcher).named_modules()} == before
    assert str(patcher.model_options) == options and not patcher.object_patches
    assert torch.equal(sample(patcher, name, steps=FEW), true)


def test_nothing_stays_after_an_interrupt():
    def stop(step, denoised, x, total):
        raise KeyboardInterrupt
    records: list = []
    with pytest.raises(KeyboardInterrupt):
        sample(fused(made("z_image"), records), "z_image", steps=FEW, callback=stop)
    assert len(records) == 1 and not [path for path, module in network(made("z_image")).named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("name", "network_of"), [("wan", "WanModel"), ("sd3", "OpenAISignatureMMDITWrapper"), ("omnigen2", "OmniGen2Transformer2DModel")])
def test_an_unknown_model_passes_through_and_the_record_says_so(name, network_of):
    latent, record = ran(model(name), name)
    assert torch.equal(latent, sample(model(name), name, steps=FEW)) and record.line() == (
        f"Fused Kernels is off: {network_of} is of no family that has fused kernels; FLUX, FLUX.2, Z-Image and Lumina 2 are")


def test_a_run_that_ends_within_its_first_evaluation_counts_nothing():
    def stop(module, args):
        raise KeyboardInterrupt
    records: list = []
    with pytest.raises(KeyboardInterrupt), network(made("flux_13m")).single_blocks[-1].register_forward_pre_hook(stop):
        sample(fused(made("flux_13m"), records), "flux_13m", steps=FEW)
    assert records[0].fused and records[0].line() == "Fused Kernels: the run ended within its first evaluation"


def test_the_node_twice_is_the_node_once():
    records: list = []
    patcher = fused(fused(model("flux"), records, layers="int8"), records)
    sample(patcher, "flux", steps=1)
    assert len(records) == 1 and all(len(entries) == 1 for kind in patcher.wrappers.values() for key, entries in kind.items() if key == attach.KEY)


@pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.1"]], ids=["whole", "blocks"])
def test_a_compiled_model_is_left_alone(keys):
    records: list = []
    patcher = fused(compiled("flux", keys), records)
    sample(patcher, "flux", steps=2)
    assert len(records) == 1 and "torch.compile" in records[0].line() and not records[0].fused


def test_settings_that_are_none_are_refused():
    with pytest.raises(ValueError, match="layers is 'both'; choose one of all, int8"):
        Settings(layers="both")
    assert LAYERS == ("all", "int8")


@pytest.mark.parametrize("family", SITES)
def test_every_name_in_the_table_is_one_of_the_host_s(family):
    """Of the family's models together: some have parts that others lack."""
    kinds = {"flux": ("flux", "flux2"), "nextdit": ("z_image",)}[family]
    for site in SITES[family]:
        for path in (*site.norms, *site.activations, *site.outputs, *site.packed):
            assert any(module_at(network(model(kind)), f"{site.stack}.0.{path}") is not None for kind in kinds)
