"""The README shows the repository as it is."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_policy_in_the_readme_is_the_real_file():
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block == (ROOT / "core" / "stepcache" / "policies" / "interval.py").read_text(encoding="utf-8")


LINKED = re.findall(r"\]\((?!http)([^)#]+)\)", README)
NAMED = re.findall(r"`((?:core|nodes|kernels|testbed|benchmarks|workflows)/[\w./]*)`", README)


@pytest.mark.parametrize("path", sorted({*LINKED, *NAMED}))
def test_every_file_that_the_readme_names_exists(path):
    assert (ROOT / path).exists()
