"""Every kernel against its reference, on every case and type that it lists; and what happens where there is no Triton."""
import sys
from types import SimpleNamespace

import pytest
import torch

from pack.kernels import KERNELS, _triton
from testbed import inprocess

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}    # about one unit in the last place; the interpreter cuts bf16 off
SMALL = [(kernel, case, dtype) for kernel in KERNELS for case in kernel.cases if case.small for dtype in kernel.dtypes]
needs_triton = pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **options: make(*args, **options).fill_(torch.nan))


@needs_triton
@pytest.mark.parametrize(("kernel", "case", "dtype"), SMALL, ids=lambda value: str(getattr(value, "name", value)))
def test_a_kernel_says_what_its_reference_says(kernel, case, dtype, unwritten_is_nan):
    torch.manual_seed(42)
    given = kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu")
    for got, wanted in zip(outputs(kernel.fused(**given)), outputs(kernel.reference(**given)), strict=True):
        assert got.dtype is wanted.dtype and got.shape == wanted.shape
        largest = wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=1e-6 * largest if dtype is torch.float32 else TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_has_odd_even_and_real_cases_and_is_tested_in_fp32(kernel):
    elements = [torch.Size(case.shape).numel() for case in kernel.cases if case.small]
    assert any(n % 2 for n in elements) and any(n % 16 == 0 for n in elements) and any(n > 1024 and n % 1024 for n in elements)
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
            made = sum(out.nbytes for out in outputs(kernel.reference(**given)))
            assert 0 < kernel.traffic(**given) <= there + made


@pytest.mark.parametrize("fault", [ImportError, OSError, AttributeError, RuntimeError], ids=lambda fault: fault.__name__)
def test_without_a_triton_that_can_be_imported_torch_does_the_work_and_nothing_is_said(fault, monkeypatch, capfd, caplog):
    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise fault("broken on purpose")

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    try:
        kernels = inprocess.package("bare", inprocess.ROOT / "kernels")
        assert [kernel.name for kernel in kernels.KERNELS] == [kernel.name for kernel in KERNELS]
        bare = sys.modules["bare._triton"]
        assert not bare.HAS_TRITON and not bare.usable(torch.device("cpu")) and not bare.usable(torch.device("cuda", 0))
        assert torch.equal(sys.modules["bare.combine"].combine([2.0], [torch.ones(3)]), torch.full((3,), 2.0))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "bare"]:
            del sys.modules[name]
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

    def forget():
        _triton.usable.cache_clear()
        _triton.failure.cache_clear()

    forget()
    yield stand_in
    forget()


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_gpus_from_ampere_on_are_usable_and_asked_once(gpu, capability, runs):
    probe = gpu(capability)
    assert [_triton.usable(torch.device("cuda", 0)) for _ in range(3)] == [runs] * 3 and probe.launches == runs


def test_an_amd_gpu_is_not_usable(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not _triton.usable(torch.device("cuda", 0))


@pytest.mark.parametrize("fault", [RuntimeError("Failed to find C compiler"), FileNotFoundError("ptxas"), ImportError("DLL load failed")], ids=str)
def test_a_triton_that_cannot_compile_is_told_of_once_and_torch_does_the_work(gpu, fault, caplog):
    gpu((8, 9), fault)
    caplog.set_level("DEBUG")       # whatever ran before may have asked for silence
    caplog.set_level("DEBUG", logger="reprise")
    assert [_triton.usable(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
    (record,) = caplog.records
    assert str(fault) in record.getMessage() and "plain torch" in record.getMessage()


def test_memory_that_ran_out_while_asking_says_nothing_about_triton(gpu):
    gpu((8, 9), torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        _triton.usable(torch.device("cuda", 0))
    gpu((8, 9))
    assert _triton.usable(torch.device("cuda", 0))
