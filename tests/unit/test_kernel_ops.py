"""Kernels as torch operators: what the dispatcher, torch.compile and a second copy of the pack make of them."""
import subprocess
import sys

import pytest
import torch
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from pack.kernels import KERNELS, _op, quantize
from pack.kernels.spec import faults, several
from testbed import inprocess

OPERATORS = [kernel for kernel in KERNELS if kernel.op is not None]
each = pytest.mark.parametrize("kernel", OPERATORS, ids=lambda kernel: kernel.name)


def given(kernel, dtype=torch.float32) -> dict:
    torch.manual_seed(3)
    case = next(case for case in reversed(kernel.cases) if case.small)
    return kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu")


def tensors(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


@each
def test_on_a_cpu_an_operator_is_its_reference(kernel):
    for dtype in kernel.dtypes:
        arguments = given(kernel, dtype)
        for got, wanted in zip(several(kernel.op(**arguments)), several(kernel.reference(**arguments)), strict=True):
            assert torch.equal(got, wanted) and got.dtype is wanted.dtype


@each
def test_torch_finds_nothing_wrong_with_an_operator(kernel):
    torch.library.opcheck(kernel.op, (), given(kernel))


def turned(value, axis: int):
    """The same numbers; those along `axis` are neighbours in memory."""
    if isinstance(value, list):
        return [turned(one, axis) for one in value]
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return value.movedim(axis, -1).contiguous().movedim(-1, axis)


@each
@pytest.mark.parametrize("axis", [0, -2])
def test_what_is_announced_of_results_holds_where_channels_are_no_neighbours_in_memory(kernel, axis):
    """A graph goes on with the strides that were announced."""
    for case in kernel.cases:
        if case.small:
            made = kernel.inputs(case.shape, **case.sizes, dtype=torch.float32, device="cpu")
            arguments = {name: turned(value, axis) for name, value in made.items()}
            results = several(kernel.op(**arguments))
            with FakeTensorMode() as mode:
                announced = several(kernel.op(**tree_map_only(torch.Tensor, mode.from_tensor, arguments)))
            for result, said in zip(results, announced, strict=True):
                assert result.shape == said.shape and result.dtype is said.dtype
                assert check_significant_strides(result, said, only_cuda=False)[0], f"{case.name}: {result.stride()} came, {said.stride()} was announced"
            assert not faults(kernel, results, kernel.reference(**made))


@each
def test_compiling_whole_graphs_passes_over_an_operator_without_a_break(kernel):
    arguments = given(kernel)
    torch.compiler.reset()      # or one lambda would be compiled too often
    compiled = torch.compile(lambda **arguments: kernel.op(**arguments), fullgraph=True, backend="aot_eager")
    assert not faults(kernel, compiled(**arguments), kernel.op(**arguments))


@each
def test_an_operator_works_without_gradients_and_in_inference_mode(kernel):
    arguments = given(kernel)
    wanted = kernel.op(**arguments)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
            assert not faults(kernel, kernel.op(**inside), wanted)


@each
def test_parameters_that_want_gradients_are_taken(kernel):
    arguments = given(kernel)
    wanted = kernel.op(**arguments)
    for value in tensors(arguments).values():
        if value.is_floating_point():
            value.requires_grad_()
    assert not faults(kernel, kernel.op(**arguments), wanted)


@each
def test_outputs_share_no_memory_with_inputs(kernel):
    arguments = given(kernel)
    theirs = {value.untyped_storage().data_ptr() for value in tensors(arguments).values()}
    assert not theirs & {out.untyped_storage().data_ptr() for out in several(kernel.op(**arguments))}


def test_a_pack_imported_under_two_names_registers_its_operators_once():
    try:
        again = inprocess.package("twin", inprocess.ROOT / "kernels")
        assert [kernel.op for kernel in again.KERNELS] == [kernel.op for kernel in KERNELS]
        for kernel in OPERATORS:
            assert not faults(kernel, kernel.op(**given(kernel)), kernel.reference(**given(kernel)))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "twin"]:
            del sys.modules[name]


def test_another_pack_with_other_arguments_is_one_sentence():
    def other(x: torch.Tensor, rotation: bool, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x

    with pytest.raises(RuntimeError, match="keep one copy of the pack"):
        _op.operator("quantize_rows", other, other, other)


def test_on_a_gpu_triton_gets_what_it_takes_and_torch_the_rest(monkeypatch):
    asked = []
    chosen = _op.choice("name", lambda x, rotation: "torch", lambda x, rotation: "triton", lambda x, rotation: asked.append((x, rotation)) or rotation)
    x = torch.ones(3)
    assert chosen(x, True) == "torch" and not asked         # this CPU has no Triton
    monkeypatch.setattr(_op, "usable", lambda device: device == x.device)
    assert chosen(x, rotation=True) == "triton" and chosen(x, False) == "torch" and chosen(rotation=False, x=x) == "torch"
    assert [rotation for _, rotation in asked] == [True, False, False] and all(seen is x for seen, _ in asked)


def test_a_kernel_that_does_not_run_on_a_gpu_leaves_its_work_to_torch_and_says_so_once(monkeypatch, caplog):
    full = [RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError("no room")]
    calls, errors = [], [*full, KeyboardInterrupt(), RuntimeError("out of resource")]

    def fused(x):
        calls.append(x)
        raise errors.pop(0)

    monkeypatch.setattr(_op, "usable", lambda device: True)
    chosen, x = _op.choice("name", lambda x: "torch", fused, lambda x: True), torch.ones(3)
    for expected in (RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt):
        with pytest.raises(expected):
            chosen(x)
    assert [chosen(x) for _ in range(3)] == ["torch"] * 3 and len(calls) == 4
    errors.append(ValueError("shared memory"))
    assert chosen(torch.ones(3, device="meta")) == "torch" and len(calls) == 5     # another device is tried
    assert [record.getMessage().count("name does not run on") for record in caplog.records] == [1, 1] and "out of resource" in caplog.text


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, sys.argv[1])
from testbed import inprocess
inprocess.leave_root()
kernels = inprocess.package("bare", inprocess.ROOT / "kernels")
import torch
for kernel in kernels.KERNELS:
    if kernel.op is not None:
        case = next(case for case in kernel.cases if case.small)
        given = kernel.inputs(case.shape, **case.sizes, dtype=torch.float32, device="cpu")
        for got, wanted in zip(sys.modules["bare.spec"].several(kernel.op(**given)), sys.modules["bare.spec"].several(kernel.reference(**given)), strict=True):
            assert torch.equal(got, wanted)
        print(kernel.name)
"""


def test_operators_are_there_and_right_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, str(inprocess.ROOT)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [kernel.name for kernel in OPERATORS] and not done.stderr
    assert quantize.OP in [kernel.op for kernel in OPERATORS]
