"""A Deferred is the tensor that it stands for, whatever is done with it."""
import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pack.core.quant.fusion import products, rules
from pack.core.quant.fusion.deferred import Deferred, pending, plain
from pack.core.quant.fusion.expressions import Activation, Expression, Joined, Norm, Once, Packed, Product, Residual, Scaled, Silu
from pack.core.quant.fusion.scope import Int8, Record, Scope
from pack.core.quant.fusion.sites import Site, replaced, replacements

B, N, C = 2, 5, 16


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def scope(**more) -> Scope:
    return Scope(Record(), lambda weight: weight if isinstance(weight, Int8) else "in float32", **more)


def rows(seed: int, dtype=torch.float32, *shape: int):
    return torch.randn(shape or (B, N, C), generator=torch.Generator().manual_seed(seed)).to(dtype)


def row(seed: int, dtype=torch.float32):
    return rows(seed, dtype, B, 1, C)


def norm(x, rms=False) -> Norm:
    forward = (lambda x: F.rms_norm(x, (C,), eps=1e-5)) if rms else (lambda x: F.layer_norm(x, (C,), eps=1e-6))
    return Norm(x, forward, rms, 1e-5 if rms else 1e-6)


def activation(x) -> Activation:
    return Activation(x, None, lambda: F.gelu(x, approximate="tanh"))


# an expression of every kind from a tensor, and what the host would have in its place
KINDS = {
    "product": (lambda x: Product(x), lambda x: x),
    "packed": (lambda x: Packed(x), lambda x: x),
    "once": (lambda x: Once(x), lambda x: x),
    "norm": (lambda x: norm(x), lambda x: F.layer_norm(x, (C,), eps=1e-6)),
    "modulated": (lambda x: Scaled(norm(x), row(1, x.dtype), row(2, x.dtype)),
                  lambda x: torch.addcmul(row(2, x.dtype), F.layer_norm(x, (C,), eps=1e-6), row(1, x.dtype))),
    "gated": (lambda x: Scaled(Product(x), row(1, x.dtype)), lambda x: row(1, x.dtype) * x),
    "residual": (lambda x: Residual(rows(3, x.dtype), Scaled(Product(x), row(1, x.dtype))), lambda x: rows(3, x.dtype) + row(1, x.dtype) * x),
    "silu": (lambda x: Silu(x, F.silu), F.silu),
    "gelu": (activation, lambda x: F.gelu(x, approximate="tanh")),
    "joined": (lambda x: Joined(rows(4, x.dtype, B, N, 3), activation(x)), lambda x: torch.cat((rows(4, x.dtype, B, N, 3), F.gelu(x, approximate="tanh")), 2)),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def channels(x) -> int:
    return x.shape[-1]


def put(x):
    x[:, 1:3] = 4.0
    return x


def nothing(x):
    x[:, :2] *= 2
    x[:, 3:] += 1
    return x


OPERATIONS = {
    "+": lambda x: x + 1, "r+": lambda x: rows(9, x.dtype, *x.shape) + x, "-": lambda x: 2 - x, "*": lambda x: x * x, "* row": lambda x: x * rows(9, x.dtype, B, 1, channels(x)),
    "row *": lambda x: rows(9, x.dtype, B, 1, channels(x)) * x, "* channels": lambda x: x * torch.ones(channels(x), dtype=x.dtype), "* fp64": lambda x: x * x.new_ones(B, 1, channels(x)).double(),
    "/": lambda x: 1 / (x.abs() + 1), "**": lambda x: x ** 2, "neg": lambda x: -x, "==": lambda x: x == x, "<": lambda x: x < 0.5,
    "addcmul": lambda x: torch.addcmul(rows(9, x.dtype, B, 1, channels(x)), x, rows(8, x.dtype, B, 1, channels(x))),
    "addcmul, value": lambda x: torch.addcmul(x, x, x, value=2), "add, alpha": lambda x: torch.add(x, x, alpha=3),
    "cat": lambda x: torch.cat((x, x), 2), "cat beside": lambda x: torch.cat((rows(9, x.dtype, B, N, 4), x), 2), "cat, tokens": lambda x: torch.cat([x, x], dim=1),
    "stack": lambda x: torch.stack([x, x]), "silu": F.silu, "gelu": F.gelu, "softmax": lambda x: x.softmax(-1), "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:]), "nan_to_num": torch.nan_to_num, "clamp": lambda x: x.clamp(-1, 1),
    "linear": lambda x: F.linear(x, rows(7, x.dtype, 6, channels(x)), rows(6, x.dtype, 6)), "matmul": lambda x: x @ rows(7, x.dtype, channels(x), 3),
    "einsum": lambda x: torch.einsum("bnc,bmc->bnm", x, x), "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "split": lambda x: torch.cat(torch.split(x, [4, channels(x) - 4], dim=-1), 1) if channels(x) == 8 else torch.split(x, 5, dim=-1)[0],
    "chunk": lambda x: x.chunk(2, -1)[1], "unbind": lambda x: x.unbind(1)[2], "first": lambda x: x[0], "slice": lambda x: x[:, 1:4, ::2], "mask": lambda x: x[x > 0],
    "view": lambda x: x.view(B, N, -1, channels(x)), "reshape": lambda x: x.reshape(B * N, -1), "permute": lambda x: x.permute(2, 0, 1), "transpose": lambda x: x.transpose(1, 2).contiguous(),
    "unsqueeze": lambda x: x.unsqueeze(0), "repeat": lambda x: x.repeat(1, 2, 1), "expand": lambda x: x[:1].expand(3, -1, -1), "flatten": lambda x: x.flatten(1),
    "copies of heads": lambda x: x.view(B, N, 1, channels(x)).unsqueeze(3).repeat(1, 1, 1, 2, 1).flatten(2, 3),
    "one copy of heads": lambda x: x.view(B, N, 1, channels(x)).unsqueeze(3).repeat(1, 1, 1, 1, 1).flatten(2, 3),
    "sum": lambda x: x.sum(), "mean": lambda x: x.float().mean(1), "norm": lambda x: x.float().norm(), "to": lambda x: x.to(torch.float64), "to, same": lambda x: x.to(x.dtype),
    "half": lambda x: x.half(), "cpu": lambda x: x.cpu(), "clone": lambda x: x.clone(), "detach": lambda x: x.detach(), "like": lambda x: torch.zeros_like(x) + x,
    "where": lambda x: torch.where(x > 0, x, 0.0), "tolist": lambda x: torch.tensor(x.tolist()), "numpy": lambda x: torch.from_numpy(x.float().numpy()),
    "add_": lambda x: x.add_(1), "mul_": lambda x: x.mul_(x.clone()), "put": put, "in place": nothing, "copy_": lambda x: torch.zeros(x.shape, dtype=x.dtype).copy_(x),
    "out": lambda x: torch.add(x, 1, out=torch.empty(x.shape, dtype=x.dtype)), "set": lambda x: rows(9, x.dtype, *x.shape).index_copy_(1, torch.arange(N), x),
    "deep copy": copy.deepcopy, "pickled": lambda x: pickle.loads(pickle.dumps(x.clone())),
    "custom operator": lambda x: torch.ops.reprise.quantize_rows(x, False)[0], "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0),
    "module": lambda x: nn.Sequential(nn.LayerNorm(channels(x), elementwise_affine=False), nn.GELU())(x),
}


def deferred(kind: str, dtype=torch.float32, **more) -> tuple[Deferred, torch.Tensor]:
    make, host = KINDS[kind]
    return Deferred(scope(**more), make(rows(0, dtype))), host(rows(0, dtype))


def check(found, true):
    found = plain(found)
    assert type(found) is type(true) and found.dtype is true.dtype and found.shape == true.shape
    assert torch.equal(found, true)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_gives_what_it_gives_on_the_tensor_bit_for_bit(kind, operation):
    for dtype in DTYPES:
        found, true = deferred(kind, dtype, every=False)
        check(OPERATIONS[operation](found), OPERATIONS[operation](true.clone()))


@given(st.sampled_from(sorted(KINDS)), st.lists(st.sampled_from(["+", "* row", "row *", "silu", "clone", "in place", "add_", "put", "r+", "addcmul", "to, same", "*", "view"]), max_size=5))
def test_every_row_of_operations_gives_what_it_gives_on_the_tensor(kind, operations):
    found, true = deferred(kind, every=False)
    true = true.clone()
    for name in operations:
        if true.ndim != 3:
            break
        found, true = OPERATIONS[name](found), OPERATIONS[name](true)
    check(found, true)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_types_are_told_without_computing(kind):
    for dtype in DTYPES:
        found, true = deferred(kind, dtype)
        assert (found.shape, found.dtype, found.device, found.ndim, len(found), found.numel(), found.size(1), found.dim()) == (
            true.shape, true.dtype, true.device, 3, B, true.numel(), N, 3)
        assert found.value is None and not found.requires_grad and found.is_floating_point() and isinstance(found, torch.Tensor) and torch.is_tensor(found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_wrote_into_a_deferred_is_seen_by_every_later_reader(kind):
    found, true = deferred(kind)
    true = true.clone()
    for x in (found, true):
        x[:, 0] = 7.0
        x.mul_(2)
    check(found + 0, true + 0)
    assert kind in ("product", "packed", "once") or pending(found, Expression) is None


def test_what_a_deferred_is_made_of_is_not_written_to():
    x, y, gate = rows(1), rows(2), row(3)
    kept = x.clone()
    residual = x
    residual += Deferred(scope(), Product(y)) * gate
    assert pending(residual, Residual)
    check(residual, kept + y * gate)
    assert torch.equal(x, kept)


def test_autocast_sees_the_value():
    found, true = deferred("modulated", every=False)
    weight = rows(5, torch.float32, 6, C)
    with torch.autocast("cpu", torch.bfloat16):
        check(F.linear(found, weight), F.linear(true, weight))


def test_a_compiled_function_takes_what_stands_behind_it():
    found, true = deferred("modulated")
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    check(compiled(plain(found)), true * 2 + 1)


def test_a_value_is_computed_once():
    calls = []
    found = Deferred(scope(), Norm(rows(0), lambda x: calls.append(1) or x * 2, False, 1e-6))
    found.sum(), found.mean(), found.clone()
    assert calls == [1]


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
    "one of a larger batch": lambda: of(norm(rows(0))) * rows(1, torch.float32, 2 * B, 1, C)[:3].repeat(2, 1, 1)[:B] if False else of(norm(rows(0))) * rows(1, torch.float32, C),
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


@contextmanager
def lent(like):
    yield 1 + 0.1 * torch.arange(WIDE) / WIDE


def layer_norm(x):
    return Norm(x, lambda x: F.layer_norm(x, (WIDE,), eps=1e-6), False, 1e-6)


def rms_norm(x):
    return Norm(x, lambda x: F.rms_norm(x, (WIDE,), 1 + 0.1 * torch.arange(WIDE) / WIDE, 1e-5), True, 1e-5, lent)


def gate(seed: int):
    return wide(seed, B, 1, WIDE)


FUSED = {       # what the record calls it -> the expression, and the same in plain torch
    "norm+modulate+int8": lambda s: Deferred(s, Scaled(layer_norm(wide(0)), gate(1), gate(2))),
    "residual+norm+modulate+int8": lambda s: Deferred(s, Scaled(layer_norm(Deferred(s, Residual(wide(5), Scaled(Product(wide(0)), gate(3))))), gate(1), gate(2))),
    "norm+residual+norm+modulate+int8": lambda s: Deferred(s, Scaled(rms_norm(Deferred(s, Residual(wide(5), Scaled(rms_norm(wide(0)), gate(3))))), gate(1))),
    "gelu+int8": lambda s: Deferred(s, Activation(wide(0), None, lambda: F.gelu(wide(0), approximate="tanh"))),
    "swiglu+int8": lambda s: Deferred(s, Activation(wide(0), wide(1), lambda: F.silu(wide(0)) * wide(1))),
    "gelu+cat+int8": lambda s: Deferred(s, Joined(wide(6), Activation(wide(0), None, lambda: F.gelu(wide(0), approximate="tanh")))),
    "swiglu+cat+int8": lambda s: Deferred(s, Joined(wide(6), Activation(wide(0), wide(1), lambda: F.silu(wide(0)) * wide(1)))),
}
BROKEN = {"gelu": "activate_int8", "swiglu": "activate_int8", "residual": "gated_residual_int8", "norm+residual": "sandwich_residual_int8", "norm+modulate": "modulate_int8"}


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
    return replaced(replacements(s, SITE, network, None))


@pytest.mark.parametrize("open_", [False, True])
def test_modules_get_their_forward_back_also_after_an_error(open_):
    network, s = stack(), scope(open=open_)
    marker = lambda x: x
    network.blocks[0].norm.forward = marker
    with pytest.raises(KeyboardInterrupt), patched(network, s):
        assert "forward" in vars(network.blocks[1].norm) and network.blocks[0].norm.forward is not marker
        raise KeyboardInterrupt
    assert network.blocks[0].norm.forward is marker
    del network.blocks[0].norm.forward
    assert not [name for name, module in network.named_modules() if "forward" in vars(module)]


def test_a_residual_goes_from_block_to_block_where_nobody_looks_and_is_computed_where_somebody_may():
    for open_ in (True, False):
        network, x, s = stack(), rows(0), scope(open=open_)
        true = network.blocks[0](x, row(1))
        with patched(network, s):
            between = network.blocks[0](x, row(1))
            assert (pending(between, Residual) is not None) == open_
            check(plain(between), true)
            network.blocks[0].register_forward_hook(lambda *_: None)
        with patched(network, s):
            assert type(network.blocks[0](x, row(1))) is torch.Tensor       # a hook looks
        network.blocks[1].forward = Block.forward.__get__(network.blocks[1])
        with patched(network, s):
            assert type(network.blocks[1](x, row(1))) is torch.Tensor       # another node's forward


def test_with_gradients_all_is_plain():
    network = stack()
    with torch.enable_grad(), patched(network, scope(open=True)):
        y = network.blocks[0](rows(0).requires_grad_(), row(1))
        assert type(y) is torch.Tensor and y.requires_grad
