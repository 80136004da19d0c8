"""The benchmark for GPUs, run whole on the CPU at tiny sizes: nothing is lost, no time is overrun, no one is named."""
import errno
import getpass
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_bench import FLUX, TINY, Clock, FakeMeter, begun, quick_kernels, tiny_bench, written

from benchmarks import _gpu_blocks, _gpu_machine, _gpu_model, gpu, kernels
from benchmarks._gpu_record import OUT_OF_MEMORY, Record, scrubbed
from benchmarks._gpu_subjects import INT8
from benchmarks._gpu_verdict import verdicts


@pytest.fixture
def bench(tmp_path):
    with tiny_bench(tmp_path) as made:
        yield made


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


@pytest.mark.parametrize("error", [RuntimeError("no driver"), MemoryError(), ZeroDivisionError("division by zero"), EOFError("cut")], ids=repr)
def test_facts_that_cannot_be_had_cost_neither_the_card_nor_the_rest(bench, monkeypatch, error):
    monkeypatch.setattr(_gpu_machine, "facts", lambda device: fails(error)(None))
    ended = lambda bench: bench.row({"n": 1}, lambda: {"ms": 1.0}, str)
    monkeypatch.setattr(gpu, "SECTIONS", (gpu.SECTIONS[0], section("second", ended)))
    gpu.measure(bench, 0.0)
    content = written(bench)
    assert "failed" in content["facts"][0] and content["second"] == [{"n": 1, "ms": 1.0}] and content["finished"] and content["machine"] == {"gpu": ""}


def test_a_disk_that_fills_up_ends_it_in_a_sentence_and_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    def full(self, text, **given):
        raise OSError(errno.ENOSPC, "No space left on device")

    def measured(bench, *_):
        bench.record.add("first", {"n": 1})
        monkeypatch.setattr(Path, "write_text", full)
        bench.row({"n": 2}, lambda: {}, str)

    monkeypatch.setattr(kernels, "GPU", True)
    monkeypatch.setattr(gpu, "GpuMeter", lambda: FakeMeter(Clock()))
    monkeypatch.setattr(gpu, "measure", measured)
    file = tmp_path / "x.json"
    assert gpu.main(["--out", str(file)]) == 1
    assert "No space left on device" in capsys.readouterr().out and json.loads(file.read_text())["first"] == [{"n": 1}] and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--minutes", "nan"], "nan came"), (["--minutes", "inf"], "inf came"), (["--minutes", "0"], "0 came"), (["--minutes=-3"], "-3 came"),
    (["--minutes", "x"], "a number was expected"), (["--out", ""], "names no file"), (["--out", "{}"], "names no file"),
    (["--out", "/dev/zero"], "no result of this"), (["--out", "{}/notes.txt"], "no result of this"),
    (["--out", "~of-nobody/x"], "'~of-nobody/x'")])
def test_wrong_arguments_are_told_before_anything_is_written(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "GPU", True)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        gpu.main([argument.format(tmp_path) for argument in arguments])
    assert said in capsys.readouterr().err and [file.name for file in tmp_path.iterdir()] == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_result_is_written_anew(tmp_path):
    Record(tmp_path / "x.json", _gpu_machine.program(), verdicts).write()
    assert gpu.result_file(str(tmp_path / "x.json")) == (tmp_path / "x.json").resolve()


def test_what_a_section_leaves_of_its_time_goes_to_the_next(bench, monkeypatch):
    ends = []
    note = lambda bench: ends.append(bench.until)
    monkeypatch.setattr(gpu, "SECTIONS", (section("first", note), section("second", note)))
    gpu.measure(bench, 100.0, minutes=2.0)
    assert ends == [160.0, 220.0]
    assert gpu.MINUTES < 8.0


def test_the_file_says_what_it_is_of_and_nothing_of_who_made_it(bench, monkeypatch):
    quick_kernels(monkeypatch)
    for name in ("kernels", "products", "facts"):
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
    assert content["machine"] and all(content[each.name] for each in gpu.SECTIONS if each.name != "facts") and content["copy_tb_per_s"] == 2.0
    assert len(content["verdicts"]) == 7 and "NOT MEASURED" in said and str(file) in said


