"""What is recorded of the host's operations, which kernel computes it, and how modules get their forward back."""
import threading
from functools import partial

import pytest
import torch
from expressions_of_rows import B, C, N, activation, norm, row, rows, scope
from torch import nn
from torch.nn import functional as F

from pack.core.quant.fusion import products, rules
from pack.core.quant.fusion.deferred import Deferred, pending, plain
from pack.core.quant.fusion.expressions import Activation, Expression, Joined, Norm, Product, Residual, Scaled
from pack.core.quant.fusion.scope import Int8
from pack.core.quant.fusion.sites import Site, replaced, replacements


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# what is recorded ------------------------------------------------------------------------------------------------------
def of(expression, **more):
    return Deferred(scope(**more), expression)


RECORDED = {
    "modulation": (lambda: torch.addcmul(row(1), of(norm(rows(0))), row(2)), Scaled),
    "scale alone": (lambda: of(norm(rows(0), True)) * row(1), Scaled),
    "gate": (lambda: row(1) * of(norm(rows(0), True)), Scaled),
    "gated product": (lambda: of(Product(rows(0))) * row(1), Scaled),
    "residual": (lambda: rows(4) + of(Product(rows(0))) * row(1), Residual),
    "swiglu": (lambda: F.silu(of(Product(rows(0)))) * rows(1), Activation),
    "swiglu of two products": (lambda: F.silu(of(Product(rows(0)))) * of(Product(rows(1))), Activation),
    "joined": (lambda: torch.cat((rows(1), of(activation(rows(0)))), 2), Joined),
}


@pytest.mark.parametrize("name", RECORDED)
def test_the_host_s_expressions_are_recorded(name):
    make, kind = RECORDED[name]
    assert isinstance(pending(make(), Expression), kind)


UNKNOWN = {
    "a row of other width": lambda: of(norm(rows(0))) * torch.ones(B, 1, 1),
    "a row for each token": lambda: of(norm(rows(0))) * rows(1),
    "a row of another type": lambda: of(norm(rows(0))) * row(1).half(),
    "a number": lambda: of(norm(rows(0))) * 2,
    "a row without a batch": lambda: of(norm(rows(0))) * rows(1, torch.float32, C),
    "rows for more pictures": lambda: of(norm(rows(0, torch.float32, 1, N, C))) * row(1),
    "a modulation added": lambda: rows(4) + torch.addcmul(row(1), of(norm(rows(0))), row(2)),
    "a shift of tokens": lambda: torch.addcmul(rows(1), of(norm(rows(0))), row(2)),
    "a residual in another type": lambda: rows(4).double() + of(Product(rows(0))) * row(1),
    "tokens joined": lambda: torch.cat((rows(1), of(activation(rows(0)))), 1),
    "three joined": lambda: torch.cat((rows(1), rows(2), of(activation(rows(0)))), 2),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_anything_else_is_computed(name):
    assert type(UNKNOWN[name]()) is torch.Tensor


# int8 products ---------------------------------------------------------------------------------------------------------
WIDE = 256


def weight(out: int, width: int, rotation: bool) -> Int8:
    generator = torch.Generator().manual_seed(out)
    return Int8(torch.randint(-127, 128, (out, width), dtype=torch.int8, generator=generator), torch.rand(out, 1, generator=generator) / 1000, rotation)


def wide(seed: int, *shape: int):
    return rows(seed, torch.float32, *(shape or (B, N, WIDE)))


def layer_norm(x):
    return Norm(x, False, 1e-6)


def rms_norm(x, eps: float = 1e-5):
    return Norm(x, True, eps, 1 + 0.1 * torch.arange(WIDE) / WIDE)


def gate(seed: int):
    return wide(seed, B, 1, WIDE)


FUSED = {       # what the record calls it -> the expression, and the same in plain torch
    "norm+modulate+int8": lambda s: Deferred(s, Scaled(layer_norm(wide(0)), gate(1), gate(2))),
    "residual+norm+modulate+int8": lambda s: Deferred(s, Scaled(
        layer_norm(Deferred(s, Residual(wide(5), Scaled(Product(wide(0)), gate(3))))), gate(1), gate(2))),
    "norm+residual+norm+modulate+int8": lambda s: Deferred(s, Scaled(rms_norm(Deferred(s, Residual(wide(5), Scaled(rms_norm(wide(0)), gate(3))))), gate(1))),
    "gelu+int8": lambda s: Deferred(s, Activation(wide(0), None, lambda: F.gelu(wide(0), approximate="tanh"))),
    "swiglu+int8": lambda s: Deferred(s, Activation(wide(0), wide(1), lambda: F.silu(wide(0)) * wide(1))),
    "gelu+cat+int8": lambda s: Deferred(s, Joined(wide(6), Activation(wide(0), None, lambda: F.gelu(wide(0), approximate="tanh")))),
    "swiglu+cat+int8": lambda s: Deferred(s, Joined(wide(6), Activation(wide(0), wide(1), lambda: F.silu(wide(0)) * wide(1)))),
}
BROKEN = {
    "gelu": "activate_int8", "swiglu": "activate_int8", "residual": "gated_residual_int8", "norm+residual": "sandwich_residual_int8",
    "norm+modulate": "modulate_int8",
}


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_an_int8_product_takes_the_expression_whole(name, rotation):
    s = scope()
    x = FUSED[name](s)
    true = FUSED[name](scope()).plain()
    layer = weight(32, x.shape[-1], rotation)
    found = rules.linear((x, layer, wide(8, 32)), {})
    codes, scales = torch.ops.reprise.quantize_rows(true, rotation)
    expected = products.int8_linear(codes, scales, layer.codes, layer.scales, wide(8, 32), out_dtype=torch.float32)
    assert x.value is None and dict(s.record.fused) == {name: 1}
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max() and (found - expected).norm() <= 1e-3 * expected.norm()
    assert found.shape == (B, N, 32)


@pytest.mark.parametrize("name", FUSED)
def test_the_kernel_that_the_record_tells_of_is_the_one_that_ran(name, monkeypatch):
    function = next(function for start, function in sorted(BROKEN.items(), key=lambda pair: -len(pair[0])) if name.startswith(start))

    def broken(*args, **options):
        raise ZeroDivisionError
    monkeypatch.setattr(products, function, broken)
    x = FUSED[name](scope())
    with pytest.raises(ZeroDivisionError):
        rules.linear((x, weight(32, x.shape[-1], True), None), {})


OTHER_RESIDUALS = {
    "of a layer norm before a layer norm": lambda s: Scaled(
        layer_norm(Deferred(s, Residual(wide(5), Scaled(layer_norm(wide(0)), gate(3))))), gate(1), gate(2)),
    "of a product before an RMS norm": lambda s: Scaled(rms_norm(Deferred(s, Residual(wide(5), Scaled(Product(wide(0)), gate(3))))), gate(1)),
    "of an RMS norm of another epsilon": lambda s: Scaled(rms_norm(Deferred(s, Residual(wide(5), Scaled(rms_norm(wide(0), 0.5), gate(3))))), gate(1)),
    "before a layer norm without a shift": lambda s: Scaled(layer_norm(Deferred(s, Residual(wide(5), Scaled(Product(wide(0)), gate(3))))), gate(1)),
}


@pytest.mark.parametrize("name", OTHER_RESIDUALS)
def test_a_residual_that_no_kernel_knows_is_computed_first(name):
    s = scope()
    true = Deferred(scope(), OTHER_RESIDUALS[name](scope())).plain()
    layer = weight(32, WIDE, True)
    found = rules.linear((Deferred(s, OTHER_RESIDUALS[name](s)), layer, None), {})
    codes, scales = torch.ops.reprise.quantize_rows(true, True)
    expected = products.int8_linear(codes, scales, layer.codes, layer.scales, out_dtype=torch.float32)
    assert dict(s.record.fused) == {"norm+modulate+int8": 1} and (found - expected).norm() <= 1e-3 * expected.norm()


def test_two_products_of_one_value_share_its_codes():
    s = scope()
    x = FUSED["norm+modulate+int8"](s)
    first, second = (rules.linear((x, weight(32, WIDE, True), None), {}) for _ in range(2))
    assert torch.equal(first, second) and s.record.fused["norm+modulate+int8"] == 1
    rules.linear((x, weight(32, WIDE, False), None), {})        # of another rotation: other codes
    assert s.record.fused["norm+modulate+int8"] == 2


def test_a_residual_that_a_kernel_computed_is_the_host_s_to_the_bit():
    for name in ("residual+norm+modulate+int8", "norm+residual+norm+modulate+int8"):
        x, true = FUSED[name](scope()), FUSED[name](scope())
        residual, norm = x.expression.like.like, true.expression.like
        rules.linear((x, weight(32, WIDE, True), None), {})
        assert residual.value is not None and pending(residual, Expression) is None
        assert (residual.value - norm.like.plain()).abs().max() <= 1e-6


def test_a_value_that_was_written_to_is_not_fused_from_its_expression():
    s = scope()
    x = FUSED["norm+modulate+int8"](s)
    x[:, 0] = 3.0
    assert rules.linear((x, weight(32, WIDE, True), None), {}) is None and not s.record.fused


def test_a_product_that_is_not_int8_gets_norm_and_modulation_in_one_pass():
    s = scope()
    x, true = FUSED["norm+modulate+int8"](s), FUSED["norm+modulate+int8"](scope()).plain()
    layer = wide(7, 6, WIDE)
    assert torch.allclose(F.linear(x, layer), F.linear(true, layer), atol=1e-4) and (x.value - true).abs().max() <= 1e-5
    assert dict(s.record.fused) == {"norm+modulate": 1} and dict(s.record.left) == {"in float32": 1}


def test_what_something_else_reads_first_is_told():
    s = scope()
    FUSED["norm+modulate+int8"](s).sum()
    assert dict(s.record.left) == {"of values that something else reads first": 1}


# modules ---------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    __module__ = "comfy.toy"        # stands for one of the host's

    def __init__(self):
        super().__init__()
        self.norm, self.act, self.out = nn.LayerNorm(C, elementwise_affine=False), nn.GELU("tanh"), nn.Linear(C, C)

    def forward(self, x, gate):
        return x + gate * self.out(self.act(self.norm(x) * gate))


def stack():
    network = nn.Module()
    network.blocks = nn.ModuleList([Block(), Block()])
    return network


SITE = (Site("blocks", norms=("norm",), activations=("act",), outputs=("out",)), Site("missing", norms=("norm",)))


def patched(network, s):
    return replaced(lambda: replacements(s, SITE, network, None))


@pytest.mark.parametrize("open_", [False, True])
def test_modules_get_their_forward_back_also_after_an_error(open_):
    network, s = stack(), scope(open=open_)
    marker = lambda x: x
    network.blocks[0].out.forward = marker
    with pytest.raises(KeyboardInterrupt), patched(network, s):
        assert "forward" in vars(network.blocks[1].norm) and network.blocks[0].out.forward is not marker
        raise KeyboardInterrupt
    assert network.blocks[0].out.forward is marker
    del network.blocks[0].out.forward
    assert not [name for name, module in network.named_modules() if "forward" in vars(module)]


def test_two_threads_on_one_network_leave_it_as_it_was():
    network, paused, on, second = stack(), threading.Event(), threading.Event(), scope()

    def slow():
        yield from replacements(scope(), SITE, network, None)
        paused.set()
        assert on.wait(10)

    def other():
        with patched(network, second):
            there.wait(10)

    there, thread = threading.Event(), threading.Thread(target=other)
    first = threading.Thread(target=run_within, args=(replaced(slow), leave := threading.Event()))
    first.start()
    assert paused.wait(10)
    thread.start()
    thread.join(0.2)        # it waits for the first one
    on.set()
    for event, ended in ((there, thread), (leave, first)):
        event.set()
        ended.join(10)
    assert not [name for name, module in network.named_modules() if "forward" in vars(module)]


def run_within(context, leave):
    with context:
        leave.wait(10)


def test_a_residual_goes_from_block_to_block_where_nobody_looks_and_is_computed_where_somebody_may():
    for open_ in (True, False):
        network, x, s = stack(), rows(0), scope(open=open_)
        true = network.blocks[0](x, row(1))
        with patched(network, s):
            between = network.blocks[0](x, row(1))
            assert (pending(between, Residual) is not None) == open_
            assert torch.equal(plain(between), true)



WATCHED = {
    "a hook": lambda block: block.register_forward_hook(lambda *_: None),
    "a hook before": lambda block: block.register_forward_pre_hook(lambda *_: None),
    "another node's forward": lambda block: setattr(block, "forward", partial(lambda before, *args: before(*args), block.forward)),
}


@pytest.mark.parametrize(("name", "within"), [*((name, False) for name in WATCHED), ("another node's forward", True)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_block_that_somebody_watches_gets_and_gives_plain_tensors(name, within, which):
    """within: a Step Cache, say, that comes in after the kernels."""
    network, s = stack(), scope(open=True)
    if not within:
        WATCHED[name](network.blocks[which])
    with patched(network, s):
        if within:
            WATCHED[name](network.blocks[which])
        between = network.blocks[0](rows(0), row(1))
        assert type(between) is torch.Tensor
        if which == 1:
            assert within or type(network.blocks[1](between, row(1))) is torch.Tensor


def test_with_gradients_all_is_plain():
    network = stack()
    with torch.enable_grad(), patched(network, scope(open=True)):
        y = network.blocks[0](rows(0).requires_grad_(), row(1))
        assert type(y) is torch.Tensor and y.requires_grad
