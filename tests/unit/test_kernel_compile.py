"""Kernels compile for every GPU that they are meant for, without one, as their launches would compile them."""
import json

import pytest

from benchmarks import _compiled
from pack.kernels import KERNELS
from pack.kernels.spec import Limits


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    if reason := _compiled.missing():
        pytest.skip(reason)
    return _compiled.rows()


def told(row: dict) -> str:
    return f"{row['kernel']}, {row['case']}, {row['dtype']}, sm_{row['arch']}: {row}"


@pytest.mark.parametrize("arch", _compiled.ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_compiles_and_stays_within_its_limits(kernel, arch, compiled):
    rows = [row for row in compiled if row["kernel"] == kernel.name and row["arch"] == arch]
    assert {row["case"] for row in rows} == {case.name for case in kernel.cases if arch in _compiled.THOROUGH or not case.small}
    for row in rows:
        assert not _compiled.broken(row, kernel.limits), told(row)


def test_every_small_case_and_type_is_compiled_somewhere(compiled):
    there = {(row["kernel"], row["case"], row["dtype"]) for row in compiled}
    assert there == {(kernel.name, case.name, str(dtype)) for kernel in KERNELS for case in kernel.cases for dtype in kernel.dtypes}


def test_addresses_are_computed_in_64_bits(compiled):
    for row in compiled:
        assert not row["narrow"], told(row)


def test_sums_are_the_same_each_time_as_nothing_is_added_by_atomics(compiled):
    for row in compiled:
        assert not row["atomics"], told(row)


def test_combine_reads_even_sizes_16_bytes_at_a_time(compiled):
    even = [row for row in compiled if row["kernel"] == "combine" and row["case"] == "eight"]
    assert even
    for row in even:
        assert row["loads"] == ["ld.global.v4.b32"], told(row)


GOOD = {"arch": 89, "registers": 64, "stack_bytes": 0, "local_bytes": 0, "shared_bytes": 512, "instruction": "IMMA.16832.S8.S8 IMMA.16864.S4.S4"}
LIMITS = Limits(registers=64, shared_bytes=512, instructions={89: ("IMMA.16832",), 90: ("IGMMA", "UTMALDG")}, unlimited=(100,))


def test_a_row_within_its_limits_is_fine_and_one_without_is_not():
    assert not _compiled.broken(GOOD, LIMITS)
    for name in ("registers", "stack_bytes", "local_bytes", "shared_bytes"):
        (said,) = _compiled.broken(GOOD | {name: 600}, LIMITS)
        assert name in said
    assert len(_compiled.broken(GOOD | {"instruction": ""}, LIMITS)) == 1 and len(_compiled.broken(GOOD | {"arch": 90}, LIMITS)) == 2
    assert not _compiled.broken(GOOD | {"arch": 100, "registers": 255, "shared_bytes": 200_000}, LIMITS)
    assert _compiled.broken(GOOD | {"arch": 100, "stack_bytes": 8}, LIMITS)


def test_the_table_is_printed_and_written_and_a_row_beyond_its_limits_is_told(monkeypatch, capsys, tmp_path):
    from benchmarks import kernels as benchmark

    rows = [GOOD | {"kernel": "combine", "case": "one", "dtype": "torch.bfloat16", "narrow": [], "loads": [], "atomics": 0}]
    monkeypatch.setattr(benchmark, "COMPILED", tmp_path / "kernels-compile.json")
    monkeypatch.setattr(_compiled, "missing", lambda: "")
    monkeypatch.setattr(_compiled, "rows", lambda *arguments: rows)
    assert benchmark.main(["--compile-only"]) == 0
    (row,) = json.loads(benchmark.COMPILED.read_text())
    assert tuple(row) == benchmark.COLUMNS and "64 registers" in capsys.readouterr().out
    rows[0]["stack_bytes"] = 16
    assert benchmark.main(["--compile-only"]) == 1 and "TOO MUCH" in capsys.readouterr().out
