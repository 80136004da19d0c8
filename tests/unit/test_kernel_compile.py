"""Kernels compile for every GPU that they are meant for, without one, as their launches would compile them."""
import json

import pytest

from benchmarks import _compiled
from benchmarks.kernels import COMPILED
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
    assert {(row["case"], row["dtype"]) for row in rows} == {(case.name, str(dtype)) for case in kernel.cases for dtype in _compiled.wanted(kernel, case, arch)}
    assert any(not case.small for case in kernel.cases)
    for row in rows:
        assert not _compiled.broken(row, kernel.limits), told(row)
    assert not kernel.limits.instructions or any(row["looked_into"] for row in rows)


def test_every_case_is_compiled_somewhere_and_real_sizes_in_fp32_and_bf16():
    for kernel in KERNELS:
        for case in kernel.cases:
            types = {dtype for arch in _compiled.ARCHITECTURES for dtype in _compiled.wanted(kernel, case, arch)}
            assert types == set(kernel.dtypes[:1] if case.small else (kernel.dtypes[0], kernel.dtypes[-1]))


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


GOOD = {"arch": 89, "registers": 64, "stack_bytes": 0, "local_bytes": 0, "shared_bytes": 512, "scratch_bytes": 0, "looked_into": True,
        "instruction": "IMMA.16832.S8.S8 IMMA.16864.S4.S4"}
LIMITS = Limits(registers=64, shared_bytes=512, instructions={89: ("IMMA.16832",), 90: ("IGMMA", "UTMALDG")}, unlimited=(100,))


def test_a_row_within_its_limits_is_fine_and_one_without_is_not():
    assert not _compiled.broken(GOOD, LIMITS)
    for name in ("registers", "stack_bytes", "local_bytes", "shared_bytes", "scratch_bytes"):
        (said,) = _compiled.broken(GOOD | {name: 600}, LIMITS)
        assert name.partition("_")[0] in said
    assert len(_compiled.broken(GOOD | {"instruction": ""}, LIMITS)) == 1 and len(_compiled.broken(GOOD | {"arch": 90}, LIMITS)) == 2
    assert not _compiled.broken(GOOD | {"arch": 100, "registers": 255, "shared_bytes": 200_000}, LIMITS)
    assert _compiled.broken(GOOD | {"arch": 100, "stack_bytes": 8}, LIMITS)


def test_an_address_in_32_bits_is_narrow_unless_constants_bound_it():
    assert not _compiled.narrow("""
        %lane = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc1)
        %cst = arith.constant dense<4> : tensor<16xi32> loc(#loc1)
        %at = arith.muli %lane, %cst : tensor<16xi32> loc(#loc2)
        %unit = arith.remsi %row, %cst : tensor<16xi32> loc(#loc2)
        %sum = arith.addi %at, %unit : tensor<16xi32> loc(#loc2)
        %p = tt.addptr %base, %sum : tensor<16x!tt.ptr<i8>>, tensor<16xi32> loc(#loc3)
        %q = tt.addptr %base, %wide : tensor<16x!tt.ptr<i8>>, tensor<16xi64> loc(#loc3)""")
    for line in ("%p = tt.addptr %base, %row : !tt.ptr<i8>, i32 loc(#loc3)", "%n = arith.muli %row, %stride : i32 loc(#loc2)",
                 "%n = arith.muli %row, %stride : tensor<16xi32> loc(#loc2)"):
        assert _compiled.narrow(line) == [line]


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


def test_the_table_in_the_repository_is_of_all_kernels():
    table = json.loads(COMPILED.read_text(encoding="utf-8"))
    assert {row["kernel"] for row in table} == {kernel.name for kernel in KERNELS} and {row["arch"] for row in table} == {*_compiled.ARCHITECTURES}
