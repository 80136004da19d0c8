"""The models that `bench gpu` computes, and its blocks and whole runs of them, on the CPU at tiny sizes."""
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from gpu_bench import CPU, FLUX, GIB, TINY, Z_IMAGE, begun, tiny_bench, written

from benchmarks import _gpu_blocks, _gpu_model, _gpu_nodes
from benchmarks._gpu_record import OUT_OF_MEMORY
from benchmarks._gpu_sampling import Sampled, sampled
from benchmarks._gpu_subjects import BF16, FORMATS, FP8, INT8, Q4_K, flux, load, weights, z_image


@pytest.fixture
def bench(tmp_path):
    with tiny_bench(tmp_path) as made:
        yield made


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


def test_nodes_are_warm_when_they_are_timed(bench, monkeypatch):
    """Step Cache is off in short runs and Attention Backend in their first and last steps, so that would be timed which no run before it compiled."""
    runs = []
    monkeypatch.setattr(_gpu_model, "sampled", lambda bench, model, subject, tokens, steps: runs.append(steps) or Sampled([5.0] + [1.0] * (steps - 1), True))
    monkeypatch.setattr(_gpu_model, "BYTES", {INT8: 14.2})
    bench.sizes = replace(TINY, steps=12)
    _gpu_model.run(begun(bench, "model"))
    rows = written(bench)["model"]
    assert [warm for warm in runs[::2]] == [12 if _gpu_nodes.STEP in row["nodes"] else 3 for row in rows] and set(runs[1::2]) == {12}
    assert [row["median_ms"] for row in rows] == [None if _gpu_nodes.STEP in row["nodes"] else 1.0 for row in rows]


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
    monkeypatch.setattr(_gpu_model, "BYTES", {Q4_K: 6.4})
    bench.meter.release = gc.collect
    if broken:
        monkeypatch.setattr(_gpu_model, "sampled", starved)
    else:
        monkeypatch.setattr(_gpu_model, "GROUPS", ((_gpu_model.GROUPS[0][2],), (_gpu_model.GROUPS[1][1],)))
    _gpu_model.run(begun(bench, "model"))
    gc.collect()
    rows = written(bench)["model"]
    assert len(models) == len(_gpu_model.GROUPS) and not [model for model in models if model() is not None]
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


