"""Kernels compile for every GPU that they are meant for, without one, as their launches would compile them."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pack.kernels import KERNELS

PROGRAM = Path(__file__).with_name("compile_kernels.py")
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    found = importlib.util.find_spec("triton")
    if found is None:
        pytest.skip("there is no Triton on this system")
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    for tool in ("ptxas", "cuobjdump"):
        if not list(tools.glob(f"{tool}*")):
            pytest.skip(f"this Triton comes without {tool}")
    folder = tmp_path_factory.mktemp("compiled")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, env=variables, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def told(row: dict) -> str:
    return f"{row['kernel']}, {row['case']}, {row['dtype']}, sm_{row['capability']}: {row}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_compiles_and_stays_in_registers(kernel, capability, compiled):
    rows = [row for row in compiled if row["kernel"] == kernel.name and row["capability"] == capability]
    assert {row["case"] for row in rows} == {case.name for case in kernel.cases if case.small}
    for row in rows:
        assert row["stack"] == row["local"] == 0 and row["reg"] <= 128, told(row)


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
