"""What the nodes say outside of their schemas: a help page for each, and the Chinese texts."""
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from pack import nodes
from pack.nodes._api import io

ROOT = Path(__file__).resolve().parents[2]
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
SCHEMAS = {schema.node_id: schema for name in nodes.GROUPS for schema in (
    node.GET_SCHEMA() for node in import_module(f"{nodes.__name__}.{name}").NODES)}


@pytest.mark.parametrize("node", SCHEMAS)
def test_the_help_page_tells_of_every_input(node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {SCHEMAS[node].display_name}\n")
    rows = set(re.findall(r"\w+", " ".join(re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE))))
    first = {entry.id: re.sub(r"_\d$", "_2", entry.id) for entry in SCHEMAS[node].inputs}      # positive_2 to positive_4 are told as such
    assert [name for name in first if not {name, first[name]} & rows] == []


def test_there_is_a_help_page_and_a_chinese_text_for_the_nodes_and_for_nothing_else():
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == set(SCHEMAS) == set(CHINESE)


@pytest.mark.parametrize("node", SCHEMAS)
def test_the_chinese_texts_are_those_of_the_inputs_and_outputs(node):
    schema, told = SCHEMAS[node], CHINESE[node]
    ids = {entry.id for entry in schema.inputs}
    menus = tuple(f"{entry.id}_" for entry in schema.inputs if isinstance(entry, io.DynamicCombo.Input))    # texts of the settings below a menu
    assert told["display_name"] and told["description"]
    assert {name for name in told["inputs"] if name in ids or not name.startswith(menus)} == ids
    assert list(told["outputs"]) == [str(i) for i in range(len(schema.outputs))]
    assert all(text["name"] and text["tooltip"] for text in told["inputs"].values())
