"""Fused Kernels beside nodes that put code of their own into a block: what it does with its tensors counts, and nothing is left behind."""
import gc
import weakref

import comfy.model_management
import pytest
import torch
from fusing import FEW, NAMES, fused, made, ran, turned
from harness import network, relative, sample

from pack.core.families.base import module_at
from pack.core.quant.fusion.deferred import Deferred
from pack.core.quant.fusion.expressions import Product
from pack.core.quant.fusion.scope import Record, Scope
from pack.core.quant.fusion.sites import SITES, Site

OF = {"flux_13m": "flux", "flux2": "flux", "z_image": "nextdit"}      # the family's sites


def lasts(name: str) -> list[tuple[Site, torch.nn.Module]]:
    """The last block of each stack."""
    return [(site, list(module_at(network(made(name)), site.stack))[-1]) for site in SITES[OF[name]]]


def modules(name: str, *kinds: str) -> list[torch.nn.Module]:
    """The modules in these blocks at the places of these kinds."""
    return [module for site, block in lasts(name) for kind in kinds for path in getattr(site, kind) if (module := module_at(block, path)) is not None]


@pytest.mark.parametrize("add", [torch.Tensor.add_, lambda x, y: x.add_(y), lambda x, y: torch.add(x, y, out=x)], ids=["Tensor.add_", "add_", "out"])
def test_a_sum_that_is_written_into_a_tensor_is_in_that_tensor(add):
    x, y, gate = torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 1, 4)
    true = x + gate * y
    with torch.inference_mode():
        add(x, Deferred(Scope(Record(), lambda weight: "in float32"), Product(y)) * gate)
    assert torch.equal(x, true)


def wraps(block, look):
    before = block.forward

    def forward(*args, **kwargs):
        look()
        return before(*args, **kwargs)
    return "forward", forward


def derives(block, look):
    class Other(type(block)):
        def forward(self, *args, **kwargs):
            look()
            return super().forward(*args, **kwargs)
    return "__class__", Other


@pytest.mark.parametrize("by", [wraps, derives])
@pytest.mark.parametrize("name", NAMES)
def test_code_of_another_node_in_a_block_s_place_gets_plain_tensors_alone(name, by, monkeypatch):
    """It may add in place, keep what it was given, or whatever else a tensor stands."""
    seen, plain = set(), sample(made(name), name, steps=FEW)
    _, whole = ran(made(name), name)
    for site, block in lasts(name):
        def look(site=site, block=block):
            for module in (module_at(block, path) for path in site.norms):
                if module is not None:
                    seen.add(type(module(torch.randn(1, 3, *module.normalized_shape, generator=torch.Generator().manual_seed(1)))))
        monkeypatch.setattr(block, *by(block, look))
    latent, record = ran(made(name), name)
    assert seen == {torch.Tensor} and relative(latent, plain) < 0.02
    assert record.others == len(lasts(name)) and record.blocks == whole.blocks - record.others
    assert sum(record.fused.values()) > 0 and f"{record.others} blocks left to the code of other nodes" in record.line()


def halves(module):
    before = module.forward
    return "forward", lambda *args: half(before(*args))


def halves_by_class(module):
    class Other(type(module)):
        def forward(self, *args):
            return half(super().forward(*args))
    return "__class__", Other


def half(result):
    return tuple(part * 0.5 for part in result) if isinstance(result, tuple) else result * 0.5


WITHIN = {
    "norms": (NAMES, lambda name: modules(name, "norms")),
    "activations": (NAMES[:2], lambda name: modules(name, "activations")),
    "norms of q and k": (NAMES[:2], lambda name: modules(name, "qk_norms")),
    "norms of q": (NAMES[:2], lambda name: [module.query_norm for module in modules(name, "qk_norms")]),
}


@pytest.mark.parametrize("by", [halves, halves_by_class])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, (names, _) in WITHIN.items() for name in names])
def test_a_module_with_code_of_another_node_computes_by_that_code(name, kind, by, monkeypatch):
    plain = sample(made(name), name, steps=1)
    for module in WITHIN[kind][1](name):
        monkeypatch.setattr(module, *by(module))
    true = sample(made(name), name, steps=1)
    latent, record = ran(made(name), name, {"steps": 1})
    assert relative(latent, true) < 0.3 * relative(true, plain) and record.fused


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_dropped_is_gone_at_once(name):
    """Not when Python looks for circles: its weights are gigabytes."""
    patcher = turned(name, None)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():        # as the host runs: what it moves out of that mode it cannot move back in it
            sample(fused(patcher), name, steps=1)
        blocks = [weakref.ref(block) for site in SITES[OF[name]] for block in module_at(network(patcher), site.stack)]
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        del patcher
        assert not [block() for block in blocks if block() is not None]
    finally:
        gc.enable()


NEAR = 1e-2     # of int8 models; what a block was given, read as it was before, is 0.013 to 0.2 off


def around(change):
    """A patch around two blocks that reads what they were given, after they ran."""
    def patch(args, extra):
        before = args["img"]
        out = extra["original_block"](args)
        return change(before, out)

    def put(patcher):
        clone = patcher.clone()
        clone.set_model_patch_replace(patch, "dit", "double_block", 0)
        clone.set_model_patch_replace(patch, "dit", "single_block", 1)
        return clone
    return put


def added(before, out):
    out["img"].add_(before * 0.3)
    return out


CHANGES = {"half": lambda before, out: {**out, "img": torch.lerp(before, out["img"], 0.5)}, "in place": added}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["flux_13m", "flux2"])
def test_a_patch_reads_what_a_block_was_given_as_the_host_leaves_it(name, change):
    put = around(CHANGES[change])
    with torch.inference_mode():
        true = sample(put(made(name)), name, steps=FEW)
        latent, record = ran(put(made(name)), name)
    assert relative(latent, true) < NEAR and record.fused, relative(latent, true)


@pytest.mark.parametrize("stack", ["double_blocks", "single_blocks"])
def test_a_hook_reads_what_a_block_was_given_as_the_host_leaves_it(stack):
    def hook(block, args, kwargs, out):
        given = kwargs["img"] if stack == "double_blocks" else args[0]
        return (out[0] + 0.3 * given, out[1]) if stack == "double_blocks" else out + 0.3 * given

    block = getattr(network(made("flux_13m")), stack)[0]
    with torch.inference_mode(), block.register_forward_hook(hook, with_kwargs=True):
        true = sample(made("flux_13m"), "flux_13m", steps=FEW)
        latent, record = ran(made("flux_13m"), "flux_13m")
    assert relative(latent, true) < NEAR and record.fused, relative(latent, true)
