"""Kernels and products in `bench gpu`: what they are timed against, and the clock that times them."""
from dataclasses import replace

import pytest
import torch
from gpu_bench import CPU, TINY, begun, quick_kernels, tiny_bench, written

from benchmarks import _gpu_kernels, kernels
from benchmarks._gpu_meter import GpuMeter, sorted_out
from benchmarks._gpu_peers import HOST, PEERS
from pack.kernels import KERNELS, _triton
from pack.kernels.spec import Case, several


@pytest.fixture
def bench(tmp_path):
    with tiny_bench(tmp_path) as made:
        yield made


@pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")
def test_a_kernel_is_timed_against_its_floor_the_host_and_comfy_kitchen(bench, monkeypatch):
    few = quick_kernels(monkeypatch)
    _gpu_kernels.run(begun(bench, "kernels"))
    rows = written(bench)["kernels"]
    assert [(row["kernel"], row["case"]) for row in rows] == [(kernel.name, case.name) for kernel in few for case in kernel.cases]
    assert all(row["fused_us"] == row["reference_us"] == row["host_us"] == 10.0 and row["dtype"] == "bfloat16" for row in rows)
    assert all(row["of_roofline"] == pytest.approx(row["bytes"] / 2e6 / 10, abs=1e-3) for row in rows)
    assert {row["kernel"]: row["kitchen_us"] for row in rows} == {"combine": None, "quantize rows": 10.0}
    assert {row["kernel"]: row["host_is"] for row in rows} == {"combine": "the reference", "quantize rows": "its operations"}


@pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")
def test_a_kernel_that_is_wrong_gets_no_time(bench, monkeypatch):
    combine = next(kernel for kernel in KERNELS if kernel.name == "combine")
    wrong = replace(combine, name="wrong", fused=lambda **given: 1.03 * combine.reference(**given), cases=(Case("small", (63,), K=2),))
    quick_kernels(monkeypatch, wrong)
    _gpu_kernels.run(begun(bench, "kernels"))
    *right, row = written(bench)["kernels"]
    assert "ArithmeticFault" in row["failed"] and "fused_us" not in row and all("fused_us" in each for each in right)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.name in HOST], ids=lambda kernel: kernel.name)
def test_what_a_kernel_is_timed_against_gives_the_same(kernel):
    """To within what rounding in between makes of it: of codes one step, and of values two units in the last place of the largest."""
    tried = 0
    for case in (case for case in kernel.cases if case.small):
        given = kernels.given(kernel, case, torch.float32, "cpu")
        wanted = kernel.reference(**given)
        results = [HOST[kernel.name](**given)]
        peer = PEERS.get(kernel.name, lambda **given: None)(**given)
        results += [] if peer is None else [peer()]
        for result in results:
            for mine, true in zip(outputs(result, wanted), several(wanted), strict=True):
                tried += 1
                assert mine.shape == true.shape and mine.dtype is true.dtype
                near = 1 if true.dtype is torch.int8 else 1e-4 * true.abs().max().item()
                assert (mine.float() - true.float()).abs().max().item() <= near
    assert tried


def outputs(result, wanted) -> tuple:
    """Where the kernel joins what the host has apart, that joined."""
    return several(result) if isinstance(wanted, tuple) or isinstance(result, torch.Tensor) else (torch.cat(result, 1),)


def test_every_peer_is_that_of_a_kernel():
    assert HOST.keys() | PEERS.keys() <= {kernel.name for kernel in KERNELS}


def test_every_way_to_multiply_has_a_row(bench):
    _gpu_kernels.run_products(begun(bench, "products"))
    rows = written(bench)["products"]
    assert {row["way"] for row in rows} == set(_gpu_kernels.WAYS) and {row["shape"] for row in rows} == {"48 x 256 x 64"}
    assert all(row["tops"] == round(2 * 48 * 64 * 256 / 10 / 1e6, 1) for row in rows), [row for row in rows if "failed" in row]
    assert {row["way"] for row in rows if row["of_sums"] == 1.0} == {name for name in _gpu_kernels.WAYS if "int8" in name}


# the clock of a GPU ----------------------------------------------------------------------------------------------------
class Event:
    """Stands in for torch.cuda.Event: the time of the made-up GPU when it was recorded."""

    gpu = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.at = Event.gpu

    def elapsed_time(self, other) -> float:
        return other.at - self.at


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(Event, "gpu", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **more: empty(4 if shape == (kernels.CACHE,) else shape, **more))


def test_a_call_takes_the_median_of_its_times_between_events(events):
    calls = []

    def call():
        calls.append(50.0 if len(calls) % 5 == 2 else 4.0)
        Event.gpu += calls[-1]

    assert kernels.microseconds(call) == 4000.0
    assert len(calls) == 1 + kernels.FEW + kernels.LONG / 4


def test_stamps_are_events_of_the_gpu(events):
    meter, stamps = GpuMeter(), []
    for each in (0.0, 3.0, 4.5):
        Event.gpu += each
        stamps.append(meter.stamp())
    assert meter.milliseconds(stamps) == [3.0, 4.5] and meter.host_room() > 0


def test_without_triton_kernels_are_left_out_and_products_of_others_timed(bench, monkeypatch):
    bench.sizes = replace(TINY, small_kernels=False)
    _gpu_kernels.run(begun(bench, "kernels"))
    _gpu_kernels.run_products(begun(bench, "products"))
    content = written(bench)
    ways = {row["way"] for row in content["products"]}
    assert "kernels" not in content and content["copy_tb_per_s"] and ways == set(_gpu_kernels.WAYS) - {_gpu_kernels.OWN, _gpu_kernels.OWN_FROM_BF16}
    assert {row["why"] for row in content["not_run"]} == {_triton.hindrance(CPU)}


# names of kernels ------------------------------------------------------------------------------------------------------
def test_kernels_are_told_apart_by_their_names():
    names = {
        "products": ["sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "nvjet_hsh_128x256_64x4", "_int8_linear_kernel", "void cutlass::Kernel2<cutlass_80_tensorop>",
                     "ampere_bf16_s16816gemm_bf16_128x256", "void gemv2T_kernel_val<int>", "cutlass_int8_dequantize_gemm"],
        "attention": ["void pytorch_flash::flash_fwd_kernel<>", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "qk_int8_sv_f16_accum_f32_attn_kernel"],
        "elementwise": ["void at::native::vectorized_elementwise_kernel<4>", "_quantize_kernel", "_modulate_kernel", "Memcpy DtoD",
                        "quantize_int8_rowwise_kernel", "dequantize_int8_linear_kernel", "void at::native::vectorized_layer_norm_kernel", "_codes_kernel"],
    }
    for kind, kernels_of_it in names.items():
        for name in kernels_of_it:
            assert sorted_out([(name, 2000.0)])[kind] == 2.0, name
