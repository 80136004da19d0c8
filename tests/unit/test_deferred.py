"""A Deferred is the tensor that it stands for, whatever is done with it."""
import copy
import pickle

import pytest
import torch
from expressions_of_rows import DTYPES, KINDS, B, C, N, row, rows, scope
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pack.core.quant.fusion.deferred import Deferred, pending, plain
from pack.core.quant.fusion.expressions import Activation, Expression, Product, Residual


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


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
    "+": lambda x: x + 1,
    "r+": lambda x: rows(9, x.dtype, *x.shape) + x,
    "-": lambda x: 2 - x,
    "*": lambda x: x * x,
    "* row": lambda x: x * rows(9, x.dtype, B, 1, channels(x)),
    "row *": lambda x: rows(9, x.dtype, B, 1, channels(x)) * x,
    "* channels": lambda x: x * torch.ones(channels(x), dtype=x.dtype),
    "* fp64": lambda x: x * x.new_ones(B, 1, channels(x)).double(),
    "/": lambda x: 1 / (x.abs() + 1),
    "**": lambda x: x ** 2,
    "neg": lambda x: -x,
    "==": lambda x: x == x,
    "<": lambda x: x < 0.5,
    "addcmul": lambda x: torch.addcmul(rows(9, x.dtype, B, 1, channels(x)), x, rows(8, x.dtype, B, 1, channels(x))),
    "addcmul, value": lambda x: torch.addcmul(x, x, x, value=2),
    "add, alpha": lambda x: torch.add(x, x, alpha=3),
    "cat": lambda x: torch.cat((x, x), 2),
    "cat beside": lambda x: torch.cat((rows(9, x.dtype, B, N, 4), x), 2), "cat, tokens": lambda x: torch.cat([x, x], dim=1),
    "stack": lambda x: torch.stack([x, x]),
    "silu": F.silu,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "nan_to_num": torch.nan_to_num,
    "clamp": lambda x: x.clamp(-1, 1),
    "linear": lambda x: F.linear(x, rows(7, x.dtype, 6, channels(x)), rows(6, x.dtype, 6)),
    "matmul": lambda x: x @ rows(7, x.dtype, channels(x), 3),
    "einsum": lambda x: torch.einsum("bnc,bmc->bnm", x, x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "split": lambda x: torch.cat(torch.split(x, [4, channels(x) - 4], dim=-1), 1) if channels(x) == 8 else torch.split(x, 5, dim=-1)[0],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "first": lambda x: x[0],
    "slice": lambda x: x[:, 1:4, ::2],
    "mask": lambda x: x[x > 0],
    "view": lambda x: x.view(B, N, -1, channels(x)),
    "reshape": lambda x: x.reshape(B * N, -1),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(1, 2).contiguous(),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "expand": lambda x: x[:1].expand(3, -1, -1),
    "flatten": lambda x: x.flatten(1),
    "copies of heads": lambda x: x.view(B, N, 1, channels(x)).unsqueeze(3).repeat(1, 1, 1, 2, 1).flatten(2, 3),
    "one copy of heads": lambda x: x.view(B, N, 1, channels(x)).unsqueeze(3).repeat(1, 1, 1, 1, 1).flatten(2, 3),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.float().mean(1),
    "norm": lambda x: x.float().norm(),
    "to": lambda x: x.to(torch.float64), "to, same": lambda x: x.to(x.dtype),
    "half": lambda x: x.half(),
    "cpu": lambda x: x.cpu(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "like": lambda x: torch.zeros_like(x) + x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.float().numpy()),
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(x.clone()),
    "put": put,
    "in place": nothing,
    "copy_": lambda x: torch.zeros(x.shape, dtype=x.dtype).copy_(x),
    "out": lambda x: torch.add(x, 1, out=torch.empty(x.shape, dtype=x.dtype)),
    "set": lambda x: rows(9, x.dtype, *x.shape).index_copy_(1, torch.arange(N), x),
    "deep copy": copy.deepcopy,
    "pickled": lambda x: pickle.loads(pickle.dumps(x.clone())),
    "custom operator": lambda x: torch.ops.reprise.quantize_rows(x, False)[0],
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0),
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


IN_A_ROW = ("+", "* row", "row *", "silu", "clone", "in place", "add_", "put", "r+", "addcmul", "to, same", "*", "view")


@given(st.sampled_from(sorted(KINDS)), st.lists(st.sampled_from(IN_A_ROW), max_size=5))
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
    x, y, gate, s = rows(1), rows(2), row(3), scope()
    kept, residual = x.clone(), x
    s.enter([x])
    for _ in range(2):
        residual += Deferred(s, Product(y)) * gate
        assert pending(residual, Residual)
    check(residual, kept + y * gate + y * gate)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("which", ["of a block that is over", "of none", "a block has another"])
def test_a_sum_in_place_is_there_for_all_who_hold_the_tensor(which):
    x, y, gate, s = rows(1), rows(2), row(3), scope()
    kept, true = x, x + gate * y
    if which == "of a block that is over":
        s.enter([x])
    s.enter([rows(1)] if which == "a block has another" else [])
    x += Deferred(s, Product(y)) * gate
    assert x is kept and torch.equal(x, true)


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
    found = Deferred(scope(), Activation(rows(0), None, lambda: calls.append(1) or rows(0) * 2))
    found.sum(), found.mean(), found.clone()
    assert calls == [1]
