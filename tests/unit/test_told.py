"""Lines under a node: what is little does not read as nothing."""
import pytest

from pack.core.reference.told import MIB, many, mib, share


@pytest.mark.parametrize(("size", "said"), [(0, "0 MiB"), (512, "0.5 KiB"), (80 * 1024, "80.0 KiB"), (MIB, "1.0 MiB"), (684 * MIB, "684.0 MiB")])
def test_bytes(size, said):
    assert mib(size) == said


@pytest.mark.parametrize(("part", "said"), [(0.0, "0.00%"), (1e-9, "under 0.01%"), (0.00681, "0.68%"), (0.5, "50.00%")])
def test_shares(part, said):
    assert share(part) == said


def test_one_is_told_as_one():
    assert [many(count, "entry", "entries") for count in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
