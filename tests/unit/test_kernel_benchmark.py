"""The benchmark of the kernels: right first, then timed, and without a GPU nothing is timed."""
import json
from dataclasses import replace

import pytest

from benchmarks import kernels as benchmark
from pack.kernels import KERNELS, _triton
from pack.kernels.spec import Case

pytestmark = pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")
COMBINE = next(kernel for kernel in KERNELS if kernel.name == "combine")
QUICK = replace(COMBINE, cases=(Case("small", (63,), K=2), Case("large", (129, 128), K=2)))
WRONG = replace(QUICK, name="wrong", fused=lambda **given: 1.03 * COMBINE.reference(**given))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "GPU", False)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "kernels.json")


def test_without_a_gpu_it_says_so_and_shows_what_is_right(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "KERNELS", (QUICK,))
    assert benchmark.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("There is no GPU") and len(said) == 1 + len(QUICK.dtypes) and not benchmark.RESULTS.exists()


def test_where_one_kernel_is_wrong_nothing_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "KERNELS", (QUICK, WRONG))
    monkeypatch.setattr(benchmark, "timed", lambda: pytest.fail("timed"))
    assert benchmark.main() == 1
    said = capsys.readouterr().out
    assert said.count("WRONG") == len(WRONG.dtypes) and "3 cases are wrong" in said


def test_rows_are_of_the_real_sizes_and_tell_the_share_of_the_roofline(monkeypatch):
    times = iter([8.0, 4.0] * len(QUICK.dtypes))
    monkeypatch.setattr(benchmark, "KERNELS", (QUICK,))
    monkeypatch.setattr(benchmark, "microseconds", lambda call: (call(), next(times))[1])
    monkeypatch.setattr(benchmark, "bytes_per_microsecond", lambda: 129 * 128 * 3 * 2.0)
    monkeypatch.setattr(benchmark.torch.cuda, "get_device_name", lambda: "a GPU")
    rows = benchmark.timed()
    assert [row["dtype"] for row in rows] == ["float32", "float16", "bfloat16"] and {row["case"] for row in rows} == {"large"}
    assert [row["roofline_us"] for row in rows] == [2.0, 1.0, 1.0] and [row["of_roofline"] for row in rows] == [0.5, 0.25, 0.25]
    assert all(row["speedup"] == 2 and row["gpu"] == "a GPU" for row in rows) and json.dumps(rows)
