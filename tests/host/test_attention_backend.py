"""Attention Backend: the right calls on the right steps, by stand-ins for libraries that want a GPU."""
import copy
import gc
import math
import sys
import weakref
from contextlib import contextmanager, nullcontext
from types import ModuleType

import comfy.ldm.modules.attention as host
import comfy.model_management
import comfy.samplers
import comfy_kitchen
import pytest
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from harness import QUICK, attached, model, network, plain, sample, sample_by, schedule, spied

from pack.core.quant import attention as module
from pack.core.quant.attention import CHOICES, OVERRIDE, Run, Settings, attach_attention
from pack.core.quant.attention_backends import BACKENDS, Backend, Sage2
from pack.core.quant.machine import EIGHT_BIT_ATTENTION, KITCHEN_INT8, SAGE_1, SAGE_2
from pack.core.step import Clock
from pack.kernels import _triton
from pack.nodes.attention_backend import AttentionBackend
from testbed import tiny

OFF_BY = 1.25       # what a stand-in's result is multiplied with, so that it shows
STEPS = 12


class StandIn:
    """A library's function: exact attention times OFF_BY. calls: one entry per call; fault: raised by the next calls."""

    def __init__(self):
        self.calls, self.fault, self.factor, self.now = [], None, OFF_BY, None

    def compute(self, q, k, v, mask, scale):
        self.calls.append(self.now)
        if self.fault is not None:
            raise self.fault
        return self.factor * F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def int8_attention(self, q, k, v, *, scale=None, attn_mask=None):
        return self.compute(q, k, v, attn_mask, scale)

    def sageattn(self, q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, attn_mask=None):
        assert tensor_layout == "HND" and not is_causal
        return self.compute(q, k, v, attn_mask, sm_scale)


@pytest.fixture
def stand_in(monkeypatch):
    """Every library is there and serves the CPU; each function is the same stand-in."""
    made = StandIn()
    monkeypatch.setattr(comfy_kitchen, "int8_attention", made.int8_attention, raising=False)
    monkeypatch.setattr(Backend, "unable", lambda self, device: "")
    monkeypatch.setattr(type(BACKENDS[KITCHEN_INT8]), "unable", lambda self, device: "")
    sage(monkeypatch, made)
    monkeypatch.setitem(host.REGISTERED_ATTENTION_FUNCTIONS, "xformers", host.attention_basic)
    return made


def sage(monkeypatch, made, major=2, masks=True):
    package = ModuleType("sageattention")
    package.sageattn = made.sageattn if masks else lambda q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **others: made.compute(
        q, k, v, None, sm_scale)
    if major == 2:
        package.sageattn_qk_int8_pv_fp8_cuda = made.sageattn
    monkeypatch.setitem(sys.modules, "sageattention", package)


def told_of(made, patcher):
    """A clone that tells the stand-in the sigma of each evaluation."""
    def before(executor, args, kwargs):
        made.now = round(float(args[1].flatten()[0]), 6)
        made.schedule = args[2]["transformer_options"]["sample_sigmas"].tolist()

    return spied(patcher, WrappersMP.PREDICT_NOISE, before)


def run(patcher, name, *, sampling=None, **settings):
    """The latent and the record of a run."""
    records = []
    latent = sample(attach_attention(patcher, Settings(**settings), records.append), name, **(sampling or {}))
    [record] = records
    return latent, record


def calls_of(name: str, patcher=None) -> int:
    """Calls of attention in a run, counted by an override."""
    seen = []
    clone = (patcher or model(name)).clone()
    clone.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: (seen.append(1), func(*args, **kwargs))[1]
    sample(clone, name)
    return len(seen)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 3), (0, 11)])
@pytest.mark.parametrize("name", QUICK)
def test_first_and_last_steps_stay_in_full_precision_and_no_others(name, first, last, stand_in):
    latent, record = run(told_of(stand_in, model(name)), name, backend=KITCHEN_INT8, first=first, last=last)
    sigmas = [round(float(sigma), 6) for sigma in schedule(name)[:-1]]
    assert sorted(set(stand_in.calls), reverse=True) == sorted(sigmas[first:STEPS - last], reverse=True)
    assert record.served + record.full + record.fell_back.total() == calls_of(name)
    assert record.served == len(stand_in.calls) and not torch.equal(latent, plain(name))
    assert record.full * (STEPS - first - last) == (record.served + record.fell_back.total()) * (first + last)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2", "uni_pc"])
def test_steps_are_those_of_the_schedule_whatever_the_sampler_evaluates(sampler, stand_in):
    run(told_of(stand_in, model("flux")), "flux", backend=KITCHEN_INT8, first=3, last=4, sampling={"sampler": sampler})
    sigmas = stand_in.schedule      # some samplers leave the last but one out
    assert stand_in.calls and all(sigmas[-5] * (1 + 1e-4) < sigma <= sigmas[3] * (1 + 1e-4) for sigma in stand_in.calls)


@pytest.mark.parametrize("name", QUICK)
def test_sdpa_is_bit_identical_where_the_host_uses_it(name):
    latent, record = run(model(name), name, backend="SDPA", first=100, last=100)    # no step of it need be left out
    assert host.optimized_attention is host.attention_pytorch, "the host of the tests uses SDPA"
    assert torch.equal(latent, plain(name)) and record.served == calls_of(name) and not record.fell_back and "full precision" in record.line()


@pytest.mark.parametrize("name", QUICK)
def test_automatic_changes_nothing_where_nothing_faster_is_there(name):
    latent, record = run(model(name), name)
    assert torch.equal(latent, plain(name)) and record.line().startswith("Attention Backend is off: nothing faster")


def test_off_hands_on_the_very_model():
    assert AttentionBackend.execute(model("flux"), backend="off").result[0] is model("flux")


@pytest.mark.parametrize(("settings", "words"), [
    ({"first": 6, "last": 6}, "all 12 steps"), ({"first": 100, "last": 0}, "all 12 steps"), ({"first": 0, "last": 12}, "all 12 steps")])
def test_where_all_steps_are_first_or_last_nothing_changes(settings, words, stand_in):
    latent, record = run(model("flux"), "flux", backend=KITCHEN_INT8, **settings)
    assert torch.equal(latent, plain("flux")) and words in record.reason and not stand_in.calls


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_schedule_with_sigmas_that_are_no_numbers_is_left_to_the_sampler(bad, stand_in):
    records = []
    sigmas = schedule("flux").clone()
    sigmas[3] = bad
    sample_by(lambda denoise, x, sigmas: denoise(x, 0.5), attach_attention(model("flux"), Settings(KITCHEN_INT8, 0, 0), records.append), "flux", sigmas=sigmas)
    assert "no numbers" in records[0].reason and not stand_in.calls


@pytest.mark.parametrize("name", [SAGE_2, KITCHEN_INT8, SAGE_1, "xformers"])
def test_a_backend_that_is_not_installed_is_one_sentence_that_says_what_to_do(name):
    assert BACKENDS[name].missing(), "it is installed here, so the test would prove nothing"
    with pytest.raises(ValueError) as caught:
        AttentionBackend.execute(model("flux"), backend=name)
    text = str(caught.value)
    assert text.startswith(f"{name} was chosen: ") and BACKENDS[name].get in text and "automatic" in text and "\n" not in text and len(text) < 250


def test_the_menu_is_the_registry():
    [menu] = [entry for entry in AttentionBackend.define_schema().inputs if entry.id == "backend"]
    assert menu.options == list(CHOICES) == ["automatic", "off", *BACKENDS]
    with pytest.raises(ValueError, match="unknown attention backend 'sage'; known: automatic, off, SageAttention 2"):
        AttentionBackend.execute(model("flux"), backend="sage")


@pytest.mark.parametrize(("major", "right", "wrong"), [(2, SAGE_2, SAGE_1), (1, SAGE_1, SAGE_2)])
def test_the_versions_of_sageattention_are_told_apart_by_what_they_have(major, right, wrong, stand_in, monkeypatch):
    sage(monkeypatch, stand_in, major)
    assert BACKENDS[right].missing() == "" and "another version" in BACKENDS[wrong].missing()


def test_automatic_takes_the_first_that_is_there(stand_in, monkeypatch):
    assert run(model("flux"), "flux")[1].backend == SAGE_2
    monkeypatch.setitem(sys.modules, "sageattention", None)
    assert run(model("flux"), "flux")[1].backend == KITCHEN_INT8
    monkeypatch.delattr(comfy_kitchen, "int8_attention")
    assert "nothing faster" in run(model("flux"), "flux")[1].reason
    sage(monkeypatch, stand_in, 1)
    assert run(model("flux"), "flux")[1].backend == SAGE_1


def test_a_device_that_a_backend_does_not_serve_is_told_and_nothing_changes(monkeypatch):
    monkeypatch.setattr(comfy_kitchen, "int8_attention", StandIn().int8_attention, raising=False)
    latent, record = run(model("flux"), "flux", backend=KITCHEN_INT8)
    assert torch.equal(latent, plain("flux")) and record.reason == "comfy_kitchen int8: it is for GPUs, not for cpu"


# one call ------------------------------------------------------------------------------------------------------------

class Given:
    """The function that the host would have called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return host.attention_pytorch.__wrapped__(*args, **kwargs)


def started(name: str, **settings) -> Run:
    if name == SAGE_1:
        vars(sys.modules["sageattention"]).pop(Sage2.mark, None)
    made = Run(BACKENDS[name], Settings(name, 0, 0, **settings), Clock([1.0, 0.5, 0.0], flow=True))
    made.begin(torch.ones(1))
    return made


def tensors(heads=2, keys=None, n=5, m=5, width=64, dtype=torch.float32, split=False, batch=2):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, h, length, width) for h, length in ((heads, n), (keys or heads, m), (keys or heads, m))]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return made if split else [part.transpose(1, 2).flatten(2) for part in made]


def masks(batch=2, n=5, m=5, heads=2):
    generator = torch.Generator().manual_seed(4)
    shapes = ((n, m), (batch, n, m), (1, n, m), (batch, heads, n, m), (batch, 1, n, m))
    return {f"mask {shape}": torch.randn(shape, generator=generator) for shape in shapes} | {"no mask": None}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("out", [False, True], ids=["joined", "apart"])
@pytest.mark.parametrize("split", [False, True], ids=["tokens", "heads"])
@pytest.mark.parametrize("keys", [None, 1], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_served_call_gives_what_the_host_would_in_the_shape_that_it_wants(name, keys, split, out, mask, stand_in):
    stand_in.factor = 1.0
    dtype = torch.bfloat16 if isinstance(BACKENDS[name], Sage2) else torch.float32
    q, k, v = tensors(keys=keys, dtype=dtype, split=split)
    chosen = masks()[mask]
    arguments = {"mask": chosen if chosen is None else chosen.to(dtype), "skip_reshape": split, "skip_output_reshape": out, "scale": 0.3}
    arguments |= {"enable_gqa": True} if keys else {}
    made, given = started(name), Given()
    result, expected = made.attend(given, q, k, v, 2, **arguments), host.attention_pytorch(q, k, v, 2, **arguments)
    assert made.record.served == 1 and not given.calls and result.shape == expected.shape and result.dtype == dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", EIGHT_BIT_ATTENTION)
def test_bits_of_a_mask_are_taken_for_yes_and_no(name, stand_in):
    stand_in.factor = 1.0
    q, k, v = tensors(dtype=torch.float16)
    mask = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    torch.testing.assert_close(started(name).attend(Given(), q, k, v, 2, mask), host.attention_pytorch(q, k, v, 2, mask))


UNFIT = {
    "the model asks for full precision": {"low_precision_attention": False},
    "the model asks for fp32": {"attn_precision": torch.float32},
    "an argument that is not known: is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("why", UNFIT)
@pytest.mark.parametrize("name", EIGHT_BIT_ATTENTION)
def test_what_a_model_asks_for_is_respected(name, why, stand_in):
    q, k, v = tensors(dtype=torch.float16)
    made = started(name)
    assert made.attend(lambda *args, **kwargs: kwargs, q, k, v, 2, **UNFIT[why]) == UNFIT[why]
    assert made.record.fell_back == {why: 1} and not stand_in.calls and not made.record.served


@pytest.mark.parametrize(("name", "call", "why"), [
    (SAGE_2, {"dtype": torch.float32}, "float32, and it takes 16 bits"), (SAGE_1, {"dtype": torch.float32}, "float32, and it takes 16 bits"),
    (SAGE_2, {"width": 160}, "heads of 160 channels"), (SAGE_1, {"width": 40}, "heads of 40 channels"), (KITCHEN_INT8, {"width": 512}, "heads of 512 channels"),
    (KITCHEN_INT8, {"keys": 1}, "heads that do not fit")])
def test_a_call_that_a_library_does_not_take_goes_to_the_function_that_was_given(name, call, why, stand_in):
    q, k, v = tensors(**{"dtype": torch.bfloat16, "split": True, **call})
    made, expected = started(name), object()
    assert made.attend(lambda *args, **kwargs: expected, q, k, v, 2, skip_reshape=True) is expected
    assert made.record.fell_back == {why: 1} and not stand_in.calls


def test_tensors_of_different_types_go_to_the_function_that_was_given(stand_in):
    q, k, v = tensors()
    made = started(KITCHEN_INT8)
    assert made.attend(lambda *args, **kwargs: "given", q, k.half(), v, 2) == "given" and not stand_in.calls


def test_a_sageattention_that_would_swallow_a_mask_is_given_none(stand_in, monkeypatch):
    sage(monkeypatch, stand_in, masks=False)
    q, k, v = tensors(dtype=torch.float16)
    made, given, mask = started(SAGE_2), Given(), masks()["mask (5, 5)"].half()
    torch.testing.assert_close(made.attend(given, q, k, v, 2, mask=mask), host.attention_pytorch(q, k, v, 2, mask))
    assert made.record.fell_back == {"a mask": 1} and given.calls == 1 and not stand_in.calls
    made.attend(given, q, k, v, 2)
    assert made.record.served == 1 == len(stand_in.calls)


BROKEN = [RuntimeError("no kernel image"), ValueError("Unsupported CUDA architecture: sm75"), AssertionError(), OSError("nvcc"), KeyError("sm_121a"),
          *([_triton.TritonError("PTXAS error")] if _triton.HAS_TRITON else [])]


@pytest.mark.parametrize("fault", BROKEN, ids=repr)
def test_a_backend_that_fails_is_asked_once_for_each_kind_of_call_and_the_host_takes_them(fault, stand_in, caplog):
    stand_in.fault = fault
    latent, record = run(model("flux"), "flux", backend=KITCHEN_INT8, first=0, last=0)
    assert torch.equal(latent, plain("flux")) and record.served == 0 and record.fell_back.total() == calls_of("flux")
    assert len(stand_in.calls) == 1 == sum("failed" in entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING")
    assert str(fault) not in record.line() or not str(fault)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("full"), comfy.model_management.InterruptProcessingException(), KeyboardInterrupt()],
                         ids=lambda fault: type(fault).__name__)
def test_a_lack_of_memory_and_an_interrupt_pass_through_and_leave_nothing(fault, stand_in):
    stand_in.fault = fault
    records, patched = [], attach_attention(model("flux"), Settings(KITCHEN_INT8), lambda record: records.append(record))
    before = options_of(patched)
    with pytest.raises(type(fault)):
        sample(patched, "flux")
    assert options_of(patched) == before and len(records) == 1
    stand_in.fault = None
    assert not torch.equal(sample(patched, "flux"), plain("flux"))


# beside others -------------------------------------------------------------------------------------------------------

def options_of(patcher) -> dict:
    options = patcher.model_options["transformer_options"]
    return {key: (dict(value) if isinstance(value, dict) else value) for key, value in options.items()}


@contextmanager
def overridden(patcher, override):
    clone = patcher.clone()
    clone.model_options["transformer_options"][OVERRIDE] = override
    yield clone


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_override_that_is_there_is_kept_and_calls_ours_as_the_attention(order, stand_in):
    seen = []

    def sharper(func, q, *args, **kwargs):
        seen.append(func.__name__)
        return func(q * 2, *args, **kwargs)

    def both(patcher):
        ours = attach_attention(patcher, Settings(KITCHEN_INT8, 0, 0))
        with overridden(ours if order == "after" else patcher, sharper) as clone:
            return clone if order == "after" else attach_attention(clone, Settings(KITCHEN_INT8, 0, 0))

    stand_in.factor = 1.0
    latent = sample(both(model("flux")), "flux")
    with overridden(model("flux"), sharper) as alone:
        expected = sample(alone, "flux")
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, plain("flux")) and len(stand_in.calls) == calls_of("flux") == len(seen) / 2 and set(seen) == {"attention_pytorch"}


def test_an_override_that_is_there_acts_on_steps_in_full_precision_too(stand_in):
    seen = []
    with overridden(model("flux"), lambda func, *args, **kwargs: (seen.append(1), func(*args, **kwargs))[1]) as clone:
        run(clone, "flux", backend=KITCHEN_INT8, first=4, last=4)
    assert len(seen) == calls_of("flux") == 3 * len(stand_in.calls)


def test_nothing_stays_behind_after_a_run(stand_in, monkeypatch):
    alive = []
    made = Run.__init__

    def remembered(self, *args):
        alive.append(weakref.ref(self))
        made(self, *args)

    monkeypatch.setattr(Run, "__init__", remembered)
    original = options_of(model("flux"))
    patched = attach_attention(model("flux"), Settings(KITCHEN_INT8, measure=True))
    before = options_of(patched)
    latent = sample(patched, "flux")
    assert not torch.equal(latent, plain("flux")) and options_of(patched) == before and options_of(model("flux")) == original
    assert OVERRIDE not in before and not any("attention" in str(key) for key in original)
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None
    assert torch.equal(sample(patched, "flux"), latent), "the second run is as the first"
    assert torch.equal(sample(model("flux"), "flux"), plain("flux"))


@pytest.mark.parametrize("fault", [None, RuntimeError], ids=["to its end", "broken off"])
def test_a_guider_has_the_options_that_it_had_when_our_part_ends(fault, stand_in):
    kept = []

    def around(executor, *args, **kwargs):      # outside of ours, as it was added first
        before = executor.class_obj.model_options
        try:
            return executor(*args, **kwargs)
        finally:
            kept.append(executor.class_obj.model_options is before and OVERRIDE not in before["transformer_options"])

    patcher = model("flux").clone()
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", around)
    guider = comfy.samplers.CFGGuider(attach_attention(patcher, Settings(KITCHEN_INT8)))
    guider.set_conds(tiny.conditioning("flux", 11), tiny.conditioning("flux", 12))

    def sampler(denoise, x, sigmas, **more):
        if fault:
            raise fault("broken off")
        return x

    noise = tiny.noise("flux")
    with pytest.raises(fault) if fault else nullcontext():
        guider.sample(noise, noise * 0, comfy.samplers.KSAMPLER(sampler), schedule("flux"), disable_pbar=True)
    assert kept == [True]


def test_a_node_that_copies_all_options_of_a_run_copies_no_run(stand_in):
    made = started(KITCHEN_INT8)
    assert copy.deepcopy({"transformer_options": {"run": made}})["transformer_options"]["run"] is made


def test_a_second_node_takes_the_place_of_the_first(stand_in):
    first, second = [], []
    twice = attach_attention(attach_attention(model("flux"), Settings(KITCHEN_INT8), first.append), Settings("SDPA", 0, 0), second.append)
    assert torch.equal(sample(twice, "flux"), plain("flux")) and not first and second[0].backend == "SDPA"


@pytest.mark.parametrize("order", ["before", "after"])
def test_step_cache_acts_beside_it(order, stand_in):
    records, reports, settings = [], [], Settings(KITCHEN_INT8, 0, 0)
    if order == "before":
        patched = attached(attach_attention(model("flux"), settings, records.append), level="block range", reports=reports)
    else:
        patched = attach_attention(attached(model("flux"), level="block range", reports=reports), settings, records.append)
    sample(patched, "flux")
    assert reports[0].computed < STEPS and records[0].served == len(stand_in.calls) == pytest.approx(calls_of("flux") * reports[0].evaluations / STEPS)


def test_two_clones_do_not_share_settings(stand_in):
    one = attach_attention(model("flux"), Settings(KITCHEN_INT8, 0, 0))
    attach_attention(one, Settings("SDPA", 0, 0))
    assert not torch.equal(sample(one, "flux"), plain("flux"))


@pytest.mark.parametrize("way", ["wrapper", "block", "in place"])
def test_a_compiled_model_is_left_alone_and_told(way, stand_in):
    patcher = model("flux").clone()
    if way == "wrapper":
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, module.COMPILE, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    else:
        block = copy.copy(network(patcher).double_blocks[0])
        if way == "block":
            block = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager")
        assert not module.compiled(patcher, {})
        patcher.add_object_patch("diffusion_model.double_blocks.0", block)
        assert module.compiled(patcher, {})
        return
    latent, record = run(patcher, "flux", backend=KITCHEN_INT8)
    assert torch.equal(latent, plain("flux")) and "torch.compile" in record.reason and not stand_in.calls


def test_first_and_last_steps_are_of_full_precision_where_the_host_is_not(stand_in, monkeypatch):
    def low(*args, **kwargs):
        raise AssertionError("the host's attention of few bits was called")

    wrapped = host.wrap_attn(low)
    monkeypatch.setitem(host.REGISTERED_ATTENTION_FUNCTIONS, "sage", wrapped)
    made = started(KITCHEN_INT8)
    made.end()
    q, k, v = tensors()
    assert torch.equal(made.attend(low, q, k, v, 2), host.attention_pytorch(q, k, v, 2)) and made.record.full == 1
    made.begin(torch.ones(1))
    with pytest.raises(AssertionError, match="few bits"):
        made.attend(low, q, k, v, 2, low_precision_attention=False)     # that a call falls back to is what the host would have called


def test_outside_of_an_evaluation_attention_is_the_hosts(stand_in):
    q, k, v = tensors()
    before = Run(BACKENDS[KITCHEN_INT8], Settings(KITCHEN_INT8, 1, 0), Clock([1.0, 0.5, 0.0], flow=True))
    after, unknown = started(KITCHEN_INT8), Run(BACKENDS[KITCHEN_INT8], Settings(KITCHEN_INT8, 1, 0), Clock([1.0, 0.5, 0.0], flow=True))
    after.end()
    unknown.begin(torch.full((1,), math.nan))
    for made in (before, after, unknown):
        assert torch.equal(made.attend(host.attention_pytorch.__wrapped__, q, k, v, 2), host.attention_pytorch(q, k, v, 2)) and not stand_in.calls


def test_measuring_tells_the_error_and_changes_no_picture(stand_in):
    latent, record = run(model("flux"), "flux", backend=KITCHEN_INT8)
    again, measured = run(model("flux"), "flux", backend=KITCHEN_INT8, measure=True)
    assert torch.equal(latent, again) and record.error is None and "error not measured" in record.line()
    assert measured.error == pytest.approx(OFF_BY - 1, rel=1e-3) and "25.00% off" in measured.line()
    assert measured.served == record.served and len(stand_in.calls) == 2 * record.served


def test_a_model_whose_attention_cannot_be_reached_is_told(stand_in):
    made = Run(BACKENDS[KITCHEN_INT8], Settings(KITCHEN_INT8), Clock([1.0, 0.0], True))
    assert "does not pass" in made.close().line()


def test_the_node_tells_its_line_and_refuses_numbers_out_of_range(stand_in, monkeypatch):
    lines = []
    monkeypatch.setattr("pack.nodes.attention_backend.text_notifier", lambda node: lambda record: lines.append(record.line()))
    [patched] = AttentionBackend.execute(model("flux"), KITCHEN_INT8, 2, 2).result
    sample(patched, "flux")
    assert lines == [f"Attention Backend: comfy_kitchen int8 served {calls_of('flux') * 8 // 12} of {calls_of('flux')} calls, "
                     f"{calls_of('flux') * 4 // 12} in full precision in the first and last steps; approximate, error not measured"]
    with pytest.raises(ValueError, match="first_steps is -1; it must lie between 0 and 1000"):
        AttentionBackend.execute(model("flux"), KITCHEN_INT8, -1)


@pytest.mark.parametrize("name", [SAGE_2, SAGE_1])
def test_sageattention_serves_a_model_of_16_bits(name, stand_in, monkeypatch):
    sage(monkeypatch, stand_in, 2 if name == SAGE_2 else 1)
    patcher = tiny.patcher("flux", dtype=torch.bfloat16).clone()
    patcher.set_model_compute_dtype(torch.bfloat16)
    _, record = run(patcher, "flux", backend=name, first=0, last=0)
    assert not record.fell_back, record.line()
    assert record.served == len(stand_in.calls) == calls_of("flux", patcher)
