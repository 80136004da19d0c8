"""Every kernel against its reference, on every case and type that it lists; and what happens where there is no Triton."""
import ast
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pack.kernels import KERNELS, _triton
from pack.kernels.spec import CODES, MOST_OFF, SCALES, TOLERANCE, VALUES, Kernel, fault, faults, several
from testbed import inprocess, interpreter

if _triton.HAS_TRITON:
    interpreter.round_as_a_gpu_does()

SMALL = [(kernel, case, dtype) for kernel in KERNELS for case in kernel.cases if case.small for dtype in kernel.dtypes]
needs_triton = pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")


@pytest.fixture
def unwritten_is_wrong(monkeypatch):
    """New tensors hold what no kernel writes: NaN, or the least integer."""
    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).min)

    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        make = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, make=make, **options: poisoned(make(*args, **options)))


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")      # on its way to the zero that it should be
@pytest.mark.parametrize(("kernel", "case", "dtype"), SMALL, ids=lambda value: str(getattr(value, "name", value)))
def test_a_kernel_says_what_its_reference_says(kernel, case, dtype, unwritten_is_wrong):
    torch.manual_seed(42)
    given = kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu")
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    assert not faults(kernel, kernel.fused(**given), kernel.reference(**given), dtype)
    assert all(torch.equal(given[name], value) for name, value in before.items())


def test_what_differs_more_than_rounding_does_is_a_fault():
    codes = torch.randint(-127, 127, (400_000,), dtype=torch.int8)
    some = torch.arange(codes.numel()) < int(MOST_OFF * codes.numel())
    assert not fault(CODES, codes, codes) and not fault(CODES, codes + some, codes)
    assert fault(CODES, codes + 2 * some, codes) and fault(CODES, codes + some.roll(3) + some.roll(90), codes) and fault(CODES, codes.int(), codes)
    scales = torch.rand(100, 1) + 0.1
    assert not fault(SCALES, scales * (1 + 5e-7), scales) and fault(SCALES, scales * (1 + 3e-6), scales) and fault(SCALES, scales.view(-1), scales)
    assert fault(SCALES, torch.cat((scales[:-1], torch.tensor([[torch.nan]]))), scales)
    many = torch.rand(2000, 1) + 0.1
    ties, more = ((torch.arange(2000) < rows)[:, None] for rows in (10, 11))       # of 16-bit sums that are normed again
    assert not fault(SCALES, many * (1 + 1e-4 * ties), many, torch.bfloat16) and fault(SCALES, many * (1 + 1e-4 * more), many, torch.bfloat16)
    assert fault(SCALES, many * (1 + 1e-4 * ties), many) and fault(SCALES, many * (1 + 0.1 * ties), many, torch.bfloat16)
    for dtype, tolerance in TOLERANCE.items():
        values = torch.randn(1000).to(dtype)
        off = values.clone()
        off[7] += 4 * tolerance * values.abs().max()
        assert not fault(VALUES, values, values) and fault(VALUES, off, values) and fault(VALUES, torch.full_like(values, torch.nan), values)
    both = Kernel("both", None, None, None, None, (), outputs=(CODES, SCALES))
    assert not faults(both, (codes, scales), (codes, scales)) and len(faults(both, (codes.roll(1), 2 * scales), (codes, scales))) == 2
    assert faults(both, codes, (codes, scales))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_has_odd_even_and_real_cases_and_is_tested_in_fp32(kernel):
    shapes = [torch.Size(case.shape) for case in kernel.cases if case.small]
    assert any(side % 2 and side > 1 for shape in shapes for side in shape)         # rows may be odd where channels come by the block
    assert any(shape.numel() % 16 == 0 for shape in shapes) and any(shape.numel() > 1024 and shape.numel() % 1024 for shape in shapes)
    assert torch.float32 in kernel.dtypes and any(not case.small for case in kernel.cases)
    names = [case.name for case in kernel.cases]
    assert len(set(names)) == len(names)


def test_names_of_kernels_are_told_once():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_bytes_of_the_roofline_are_not_more_than_all_that_is_there(kernel):
    for case in kernel.cases:
        if case.small:
            given = kernel.inputs(case.shape, **case.sizes, dtype=torch.bfloat16, device="cpu")
            there = sum(t.nbytes for value in given.values() for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor))
            made = sum(out.nbytes for out in several(kernel.reference(**given)))
            assert 0 < kernel.traffic(**given) <= there + made


@pytest.fixture
def bare():
    """The kernels, imported once more under a name of their own: as the Triton of the test lets them be."""
    yield lambda: inprocess.package("bare", inprocess.ROOT / "kernels")
    for name in [name for name in sys.modules if name.split(".")[0] == "bare"]:
        del sys.modules[name]


def without_triton(kernels) -> None:
    assert [kernel.name for kernel in kernels.KERNELS] == [kernel.name for kernel in KERNELS]
    bare = sys.modules["bare._triton"]
    assert not bare.HAS_TRITON and not bare.usable(torch.device("cpu")) and not bare.usable(torch.device("cuda", 0))
    assert "does not fit this torch" in bare.failure(torch.device("cuda", 0))
    assert torch.equal(sys.modules["bare.combine"].combine([2.0], [torch.ones(3)]), torch.full((3,), 2.0))


@pytest.mark.parametrize("fault", [ImportError, OSError, AttributeError, RuntimeError], ids=lambda fault: fault.__name__)
def test_without_a_triton_that_can_be_imported_torch_does_the_work_and_nothing_is_said(fault, bare, monkeypatch, capfd, caplog):
    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise fault("broken on purpose")

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    without_triton(bare())
    assert capfd.readouterr() == ("", "") and not caplog.records


@needs_triton
@pytest.mark.parametrize("lacking", ["triton.tools.tensor_descriptor", "make_tensor_descriptor"])
def test_a_triton_from_before_tensor_descriptors_is_as_none(lacking, bare, monkeypatch, capfd, caplog):
    if lacking in sys.modules:
        monkeypatch.setitem(sys.modules, lacking, None)
    else:
        monkeypatch.delattr(sys.modules["triton.language"], lacking)
    without_triton(bare())
    assert capfd.readouterr() == ("", "") and not caplog.records


@needs_triton
def test_the_cpu_and_a_triton_that_interprets_are_not_usable():
    assert not _triton.usable(torch.device("cpu")) and not _triton.usable(torch.device("cuda", 0))


class Launched:
    """A kernel whose launch ends in `fault`."""

    def __init__(self, fault=None):
        self.fault, self.launches = fault, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args):
        self.launches += 1
        if self.fault:
            raise self.fault


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, as `usable` sees it: gpu(capability, fault of a launch) -> the launches."""
    def stand_in(capability, fault=None):
        probe = Launched(fault)
        monkeypatch.setattr(_triton, "HAS_TRITON", True)
        monkeypatch.setattr(_triton, "triton", SimpleNamespace(runtime=SimpleNamespace(JITFunction=Launched)))
        monkeypatch.setattr(_triton, "_probe", probe)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
        return probe

    _triton.tried.cache_clear()
    yield stand_in
    _triton.tried.cache_clear()


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_gpus_from_ampere_on_are_usable_and_asked_once(gpu, capability, runs):
    probe = gpu(capability)
    assert [_triton.usable(torch.device("cuda", 0)) for _ in range(3)] == [runs] * 3 and probe.launches == runs


def test_an_amd_gpu_is_not_usable(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not _triton.usable(torch.device("cuda", 0))


def of_triton(module: str, name: str, *arguments):
    """An error of Triton's, or nothing where there is no Triton."""
    return [getattr(importlib.import_module(module), name)(*arguments)] if _triton.HAS_TRITON else []


CANNOT_COMPILE = [
    RuntimeError("Failed to find C compiler"), FileNotFoundError("ptxas"), ImportError("DLL load failed"), KeyError("sm_121a"), ValueError("no such target"),
    TypeError("unexpected argument"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), subprocess.CalledProcessError(1, "gcc"),
    *of_triton("triton.runtime.errors", "PTXASError", "Value 'sm_121a' is not defined"),
    *of_triton("triton.runtime.errors", "OutOfResources", 200_000, 101_376, "shared memory"),
    *of_triton("triton.compiler.errors", "CompilationError", None, ast.Pass(), "no such instruction"),
]


@pytest.mark.parametrize("fault", CANNOT_COMPILE, ids=lambda fault: type(fault).__name__)
def test_a_triton_that_cannot_compile_is_told_of_once_and_torch_does_the_work(gpu, fault, caplog):
    probe = gpu((8, 9), fault)
    caplog.set_level("DEBUG")       # whatever ran before may have asked for silence
    caplog.set_level("DEBUG", logger="reprise")
    assert [_triton.usable(torch.device("cuda", 0)) for _ in range(2)] == [False, False] and probe.launches == 1
    (record,) = caplog.records
    assert str(fault) in record.getMessage() and "plain torch" in record.getMessage()
    assert type(fault).__name__ in _triton.failure(torch.device("cuda", 0))


def test_why_triton_cannot_compile_is_told_by_its_first_line_without_folders(gpu):
    gpu((8, 9), FileNotFoundError("no '/home/ann/bin/gcc' nor C:\\tools\\cl.exe\nand more " + 200 * "x"))
    told = _triton.failure(torch.device("cuda", 0))
    assert told == "Triton is installed and cannot compile here (FileNotFoundError: no 'gcc' nor cl.exe); most often a C compiler is missing"
    assert len(_triton.told(RuntimeError("word " * 100))) <= 160 and _triton.told(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")], ids=lambda fault: type(fault).__name__)
def test_memory_that_ran_out_while_asking_says_nothing_about_triton(gpu, fault, caplog):
    gpu((8, 9), fault)
    assert not _triton.usable(torch.device("cuda", 0)) and "no memory" in _triton.failure(torch.device("cuda", 0)) and not caplog.records
    gpu((8, 9))
    assert _triton.usable(torch.device("cuda", 0))
