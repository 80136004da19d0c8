"""The benchmark for GPUs, run whole on the CPU at tiny sizes, with a clock and a memory that the test makes up."""
import gc
import getpass
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import _gpu_blocks, _gpu_kernels, _gpu_machine, _gpu_model, _gpu_nodes, gpu, kernels
from benchmarks._gpu_meter import GpuMeter, sorted_out
from benchmarks._gpu_peers import HOST, PEERS
from benchmarks._gpu_record import OUT_OF_MEMORY, Bench, Record, scrubbed
from benchmarks._gpu_sampling import sampled
from benchmarks._gpu_subjects import BF16, FORMATS, FP8, INT8, Q4_K, flux, load, weights, z_image
from benchmarks._gpu_verdict import verdicts
from pack.kernels import KERNELS, _triton
from pack.kernels.spec import Case, several

CPU = torch.device("cpu")
FLUX, Z_IMAGE = flux(hidden=256, text=16, pooled=16, double=2, single=2), z_image(dim=256, text=16, layers=2, refiners=1)
TINY = gpu.Sizes(
    small_kernels=True, products=((48, 64, 256),), subjects=(FLUX, Z_IMAGE), whole=FLUX, blocks=(1, 2), block_steps=2, steps=3, latent=8,
    text_tokens=(7,), memory_share=1e-6)
GIB = 1 << 30


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


COSTS = {"DoubleStreamBlock": 2.0, "SingleStreamBlock": 1.0, "JointTransformerBlock": 4.0, "Flux": 7.0, "NextDiT": 9.0}     # ms on the made-up GPU


class FakeMeter:
    """Runs what it is given, on a GPU whose clock goes on by COSTS whenever such a module was called, and half a second of ours with each stamp."""

    device = CPU

    def __init__(self, clock: Clock):
        self.clock, self.calls, self.released, self.gpu, self.free = clock, 0, 0, 0.0, 40 * GIB

    def called(self, module, inputs, output):
        self.gpu += COSTS.get(type(module).__name__, 0.0)

    def microseconds(self, call):
        call()
        self.calls += 1
        return 10.0

    def copy_speed(self):
        return 2e6

    def stamp(self):
        self.clock.seconds += 0.5
        return self.gpu

    def milliseconds(self, stamps):
        return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]

    def shares(self, call):
        call()
        return {"products": 6.0, "attention": 3.0, "elementwise": 1.0}

    def restart_peak(self):
        self.peaked = 0

    def peak(self):
        return 3 * GIB

    def room(self):
        return self.free

    host_room = room

    def release(self):
        self.released += 1


@pytest.fixture
def bench(tmp_path):
    clock = Clock()
    made = Bench(Record(tmp_path / "gpu.json", _gpu_machine.program(), verdicts), FakeMeter(clock), TINY, clock, lambda text: None)
    hook = torch.nn.modules.module.register_module_forward_hook(made.meter.called)
    yield made
    hook.remove()


def written(bench) -> dict:
    return json.loads(bench.record.file.read_text(encoding="utf-8"))


def begun(bench, section: str, until: float = math.inf):
    bench.begin(section, until)
    return bench


# the models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("subject", [FLUX, Z_IMAGE], ids=lambda subject: subject.name)
def test_every_format_is_what_the_loader_makes_of_it_and_draws_numbers(subject, form, bench):
    patcher = load(subject, form, CPU)
    layer = patcher.model.diffusion_model.get_submodule("double_blocks.1.img_mlp.2" if subject is FLUX else "layers.1.feed_forward.w2")
    layouts = {BF16: None, FP8: "TensorCoreFP8E4M3Layout", INT8: "TensorWiseINT8Layout", Q4_K: "RepriseGGUFLayout"}
    assert getattr(layer.weight, "_layout_cls", None) == layouts[form]
    if form == INT8:
        assert layer.weight._params.convrot
    if form == Q4_K:
        assert layer.weight._params.compute == "int8"
        values = layer.weight.dequantize().float()
        assert abs(values.mean()) < 0.1 * values.std() and values.std().item() == pytest.approx(values.shape[1] ** -0.5, rel=0.1)
    found = sampled(bench, patcher, subject, 7, 3)
    blocks = 2 * 2.0 + 2 * 1.0 + 7.0 if subject is FLUX else (1 + 1 + 2) * 4.0 + 9.0
    assert found.finite and found.steps == [blocks] * 3


@pytest.mark.parametrize("form", FORMATS)
def test_blocks_share_their_tensors_in_the_hosts_memory(form):
    file = weights(flux(hidden=256, text=16, pooled=16, double=3, single=5), form, CPU)
    held = [*file.tensors.values(), *(blocks.bytes for blocks in file.packed.values())]
    few = weights(flux(hidden=256, text=16, pooled=16, double=1, single=1), form, CPU)
    least = [*few.tensors.values(), *(blocks.bytes for blocks in few.packed.values())]
    assert sum(each.nbytes for each in {t.data_ptr(): t for t in held}.values()) == sum(each.nbytes for each in {t.data_ptr(): t for t in least}.values())
    assert sum(each.nbytes for each in held) > 2 * sum(each.nbytes for each in least)


def test_the_published_sizes_are_those_of_the_published_models():
    whole, other = flux().network(), z_image().network()
    assert sum(p.numel() for p in whole.parameters()) / 1e9 == pytest.approx(11.9014, abs=1e-3)
    assert sum(p.numel() for p in other.parameters()) / 1e9 == pytest.approx(6.1549, abs=2e-3)
    assert all(p.is_meta for p in (*whole.parameters(), *other.parameters()))


# the sections ----------------------------------------------------------------------------------------------------------
def quick_kernels(monkeypatch, *more):
    """Two kernels of few cases, and `more`."""
    few = tuple(replace(kernel, cases=kernel.cases[:2]) for kernel in KERNELS if kernel.name in ("quantize rows", "combine"))
    monkeypatch.setattr(_gpu_kernels, "KERNELS", (*few, *more))
    return few


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


def test_a_block_takes_what_more_blocks_take_longer(bench):
    _gpu_blocks.run(begun(bench, "blocks"))
    content = written(bench)
    rows = [row for row in content["blocks"] if row["nodes"] == _gpu_nodes.PLAIN]
    assert [(row["model"], row["format"], row["block"], row["ms"]) for row in rows] == [
        *[("FLUX.1", form, *block) for form in FORMATS for block in (("double-stream", 2.0), ("single-stream", 1.0))],
        *[("Z-Image", form, "single-stream", 4.0) for form in FORMATS]]
    assert all(row["finite"] and "doubt" not in row for row in rows)
    fused = [row for row in content["blocks"] if row["nodes"] == _gpu_nodes.FUSED]
    assert len(fused) == len(rows) and all("Fused Kernels" in row["told"][0] for row in fused) and not content["not_run"]


def test_shares_are_of_the_blocks_alone(bench):
    """What the embedders and the last layer take is in both and falls out."""
    patcher = load(FLUX, BF16, CPU)
    network = patcher.model.diffusion_model
    blocks, rest = network.double_blocks, {"products": 1.0, "attention": 0.5, "elementwise": 2.5}
    each = {"products": 6.0, "attention": 3.0, "elementwise": 1.0}
    bench.meter.shares = lambda call: {kind: each[kind] * len(network.double_blocks) + rest[kind] for kind in each}
    found = _gpu_blocks.shares(bench, patcher, FLUX, network, "double_blocks", 1, 7)
    assert found == {"products": 0.6, "attention": 0.3, "elementwise": 0.1} and network.double_blocks is blocks


def test_a_hindered_profiler_costs_the_shares_and_not_the_times(bench):
    def hindered(call):
        raise RuntimeError("the profiler saw no kernel")

    bench.meter.shares = hindered
    row = _gpu_blocks.of_block(bench, load(FLUX, BF16, CPU), FLUX, (), "single_blocks", 1, 7)
    assert row["ms"] == 1.0 and row["share"] is None and "profiler" in row["no_share"]


def test_the_model_is_sampled_in_every_format_and_with_every_node(bench):
    _gpu_model.run(begun(bench, "model"))
    content = written(bench)
    rows = {(row["format"], row["nodes"]): row for row in content["model"]}
    asked = [_gpu_nodes.spoken(names) for group in _gpu_model.GROUPS for names in group]
    assert list(rows) == [(form, spoken) for form in _gpu_model.BYTES for spoken in asked] and not content["not_run"]
    for (form, spoken), row in rows.items():
        assert row["finite"] and row["steps"] == TINY.steps and row["peak_gib"] == 3.0, (form, spoken)
        assert bool(row["told"]) == (spoken != _gpu_nodes.PLAIN)
    plain, aside = rows[INT8, _gpu_nodes.PLAIN], rows[INT8, _gpu_nodes.MODULATION]
    assert plain["ms_per_step"] == plain["median_ms"] == 2 * 2.0 + 2 * 1.0 + 7.0
    assert any("stayed off the GPU" in line for line in aside["told"]) and any("Step Cache" in line for line in rows[INT8, _gpu_nodes.STEP]["told"])


@pytest.mark.parametrize("broken", [False, True], ids=["all is well", "no memory in every row"])
def test_a_model_is_gone_before_the_next_is_loaded(bench, monkeypatch, broken):
    models, wrapped = [], _gpu_model.load

    def loaded(*arguments):
        assert not [model for model in models if model() is not None]
        patcher = wrapped(*arguments)
        models.append(weakref.ref(patcher.model))
        return patcher

    def starved(bench, model, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_gpu_model, "load", loaded)
    monkeypatch.setattr(_gpu_model, "BYTES", {INT8: 14.2, Q4_K: 6.4})
    bench.meter.release = gc.collect
    if broken:
        monkeypatch.setattr(_gpu_model, "sampled", starved)
    else:
        monkeypatch.setattr(_gpu_model, "GROUPS", ((_gpu_model.GROUPS[0][2],), (_gpu_model.GROUPS[1][1],)))
    _gpu_model.run(begun(bench, "model"))
    gc.collect()
    rows = written(bench)["model"]
    assert len(models) == 4 and not [model for model in models if model() is not None]
    assert {row.get("failed", "") for row in rows} == {OUT_OF_MEMORY if broken else ""}


def test_what_does_not_fit_is_left_out_and_told(bench):
    bench.sizes, bench.meter.free = replace(TINY, memory_share=1.0), 23.6 * GIB      # a card of 24 GB
    bench.meter.host_room = lambda: 60 * GIB
    loaded = []
    whole, _gpu_model.load = _gpu_model.load, lambda subject, form, device: loaded.append(form)
    try:
        _gpu_model.run(begun(bench, "model"))
    finally:
        _gpu_model.load = whole
    (left,) = written(bench)["not_run"]
    assert set(loaded) == {INT8, Q4_K} and left["format"] == BF16 and left["why"] == "it needs 26.2 GiB of the GPU, and 23.6 are free"
    bench.meter.free, bench.meter.host_room = 140 * GIB, lambda: 16 * GIB
    assert _gpu_model.lacking(bench, BF16) == "loading it needs 24.0 GiB of memory, and 16.0 are free" and not _gpu_model.lacking(bench, INT8)


# nothing is lost -------------------------------------------------------------------------------------------------------
def fails(error: BaseException):
    def run(*_):
        raise error
    return run


def test_a_row_without_memory_is_told_and_the_rest_goes_on(bench):
    begun(bench, "blocks")
    assert bench.row({"format": "a"}, fails(torch.OutOfMemoryError("CUDA out of memory")), str) is None
    assert bench.row({"format": "b"}, fails(RuntimeError("no kernel image in /home/someone/x.cu")), str) is None
    assert bench.row({"format": "c"}, lambda: {"ms": 1.0}, str) == {"format": "c", "ms": 1.0}
    assert written(bench)["blocks"] == [
        {"format": "a", "failed": OUT_OF_MEMORY}, {"format": "b", "failed": "RuntimeError: no kernel image in <path>"}, {"format": "c", "ms": 1.0}]
    assert bench.meter.released == 2


def test_no_row_is_begun_that_would_not_end_in_time(bench):
    def slow():
        bench.now.seconds += 4.0
        return {"ms": 1.0}

    begun(bench, "blocks", until=10.0)
    assert bench.row({"n": 1}, slow, str) and bench.row({"n": 2}, slow, str)
    assert bench.row({"n": 3}, slow, str) is None and bench.now.seconds == 8.0
    assert bench.row({"n": 4}, slow, str, expected=1.0) is None
    content = written(bench)
    assert [row["n"] for row in content["blocks"]] == [1, 2] and [(row["section"], row["n"]) for row in content["not_run"]] == [("blocks", 3), ("blocks", 4)]
    begun(bench, "model", until=20.0)
    assert bench.row({"n": 5}, slow, str) and bench.row({"n": 6}, slow, str, expected=11.0) is None


def section(name: str, run) -> gpu.Section:
    return gpu.Section(name, 10.0, run, name)


def test_an_interrupt_leaves_what_was_measured(bench, monkeypatch):
    ended = lambda bench: bench.row({"n": 1}, lambda: {"ms": 1.0}, str)
    monkeypatch.setattr(gpu, "SECTIONS", (section("first", ended), section("second", fails(KeyboardInterrupt())), section("third", ended)))
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(bench, 0.0)
    content = written(bench)
    assert content["first"] == [{"n": 1, "ms": 1.0}] and content["stopped"] == "interrupted in the section 'second'" and not content["finished"]
    assert set(content["seconds"]) == {"first", "second"} and "third" not in content


def test_a_section_that_breaks_does_not_take_the_others_with_it(bench, monkeypatch):
    ended = lambda bench: bench.row({"n": 1}, lambda: {"ms": 1.0}, str)
    monkeypatch.setattr(gpu, "SECTIONS", (section("first", fails(RuntimeError("CUDA error: unspecified launch failure"))), section("second", ended)))
    gpu.measure(bench, 0.0)
    content = written(bench)
    assert "launch failure" in content["first"][0]["failed"] and content["second"] == [{"n": 1, "ms": 1.0}] and content["finished"]


def test_what_a_section_leaves_of_its_time_goes_to_the_next(bench, monkeypatch):
    ends = []
    note = lambda bench: ends.append(bench.until)
    monkeypatch.setattr(gpu, "SECTIONS", (section("first", note), section("second", note)))
    gpu.measure(bench, 100.0, minutes=2.0)
    assert ends == [160.0, 220.0]
    assert gpu.MINUTES < 8.0


def test_the_file_says_what_it_is_of_and_nothing_of_who_made_it(bench, monkeypatch):
    quick_kernels(monkeypatch)
    for name in ("kernels", "products", "machine"):
        run = next(each.run for each in gpu.SECTIONS if each.name == name)
        run(begun(bench, name))
    content, text = written(bench), bench.record.file.read_text(encoding="utf-8")
    assert content["version"] and content["commit"] and content["date"].count("-") == 2
    assert {"gpu", "torch", "cuda", "driver", "triton", "comfy_kitchen", "doctor", "memory_gib"} <= set(content["machine"])
    assert str(Path.home()) not in text and str(gpu.RESULTS.parents[2]) not in text and f"/{getpass.getuser()}/" not in text
    assert scrubbed({"a": ["in C:\\Users\\me\\x.py and ~/y, 3/4 of 1024 x 1024"]}) == {"a": ["in <path> and <path>, 3/4 of 1024 x 1024"]}


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "GPU", False)
    assert gpu.main(["--out", str(tmp_path / "x.json")]) == 1
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "GPU", True)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert gpu.main(["--out", str(tmp_path / "file" / "x.json")]) == 1
    assert "--out" in capsys.readouterr().out


def test_the_command_ends_with_the_file_and_the_verdicts(tmp_path, capsys, monkeypatch):
    """All of it, through the command, at tiny sizes."""
    quick_kernels(monkeypatch)
    monkeypatch.setattr(kernels, "GPU", True)
    monkeypatch.setattr(gpu, "GpuMeter", lambda: FakeMeter(Clock()))
    monkeypatch.setattr(gpu, "Sizes", lambda: replace(TINY, subjects=(FLUX,)))
    monkeypatch.setattr(_gpu_blocks, "FORMATS", (INT8,))
    monkeypatch.setattr(_gpu_model, "BYTES", {INT8: 14.2})
    monkeypatch.setattr(_gpu_machine, "facts", lambda device: {"gpu": "NVIDIA H200", "doctor": ["GPU: one"]})
    file = tmp_path / "new" / "mine.json"
    assert gpu.main(["--out", str(file), "--minutes", "600"]) == 0
    content, said = json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out
    assert content["finished"] and set(content["seconds"]) == {each.name for each in gpu.SECTIONS}
    assert all(content[each.name] for each in gpu.SECTIONS) and content["copy_tb_per_s"] == 2.0
    assert len(content["verdicts"]) == 7 and "NOT MEASURED" in said and str(file) in said


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
