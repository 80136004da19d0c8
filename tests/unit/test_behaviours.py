"""BEHAVIOURS.md names tests that exist, and for every promise at least one."""
import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
TEXT = (TESTS / "BEHAVIOURS.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
PROMISES = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]


@cache
def collected(path: str) -> set[str]:
    """Functions of a file that pytest takes for tests, by their names alone."""
    body = ast.parse((TESTS / path).read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_every_test_that_is_named_exists(path, name):
    assert Path(path).name.startswith("test_") and name in collected(path)


def test_there_are_fifteen_promises_and_every_line_of_them_names_a_test():
    assert [int(promise.split(".")[0]) for promise in PROMISES] == list(range(1, 16))
    lines = [line for line in TEXT.splitlines() if line.startswith("- ")]
    assert all(re.search(r"`[\w/]+\.py::\w+`", line) for line in lines) and TEXT.count("::") == len(NAMED)
    assert all("\n- " in promise for promise in PROMISES)
