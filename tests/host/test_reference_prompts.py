"""Prompts with the nodes of the reference caches, as the host looks at them before anything runs."""
import asyncio
import os

import execution
import folder_paths
import pytest
from comfy_execution.graph import DynamicPrompt

import nodes as host_nodes

from pack.nodes.easycontrol import EasyControlLoader
from pack.nodes.fastfit import FastFitLoader
from pack.nodes.references import CombineReferenceCache, LoadReferenceCache, SaveReferenceCache

LOADERS = {"Reprise_EasyControlLoader": (EasyControlLoader, "loras", "file"), "Reprise_FastFitLoader": (FastFitLoader, "diffusion_models", "unet_name")}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    for node in (LoadReferenceCache, SaveReferenceCache, CombineReferenceCache):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.define_schema().node_id, node)
    for name, (node, kind, _) in LOADERS.items():
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def faults(inputs: dict, **others) -> list[str]:
    """What the host says of a Load Reference Cache that was sent so, beside nodes of these classes."""
    prompt = {"7": {"class_type": "Reprise_LoadReferenceCache", "inputs": inputs}, **{key: {"class_type": kind, "inputs": {}} for key, kind in others.items()}}
    checked = {key: (True, [], key) for key in others}
    _, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "7", checked))
    return [f"{error['message']}: {error['details']}" for error in errors]


def test_the_name_that_save_gives_may_be_linked_to_load():
    assert faults({"name": ["1", 0]}, **{"1": "Reprise_SaveReferenceCache"}) == []


def test_a_text_may_be_linked_to_load():
    assert LoadReferenceCache.validate_inputs(input_types={"name": "STRING"}) is True


def test_a_name_that_is_not_saved_yet_is_left_to_the_node():
    assert faults({"name": "saved in the same prompt"}) == []


def test_links_of_another_type_are_refused():
    assert any("name is linked to a REPRISE_REFERENCE" in said for said in faults({"name": ["1", 0]}, **{"1": "Reprise_CombineReferenceCache"}))
    said = faults({"name": "x", "reference": ["1", 0]}, **{"1": "Reprise_EasyControlLoader"})
    assert any("reference is linked to a REPRISE_EASYCONTROL; link it to a REPRISE_REFERENCE" in one for one in said)
    assert faults({"name": "x", "reference": ["1", 0]}, **{"1": "Reprise_CombineReferenceCache"}) == []


def test_a_load_without_a_name_is_told_what_is_missing_and_nothing_else():
    assert faults({}) == ["Required input is missing: name"]


@pytest.mark.parametrize("name", LOADERS)
def test_an_adapter_or_model_that_changed_on_disk_is_read_again(folder, name):
    _, _, key = LOADERS[name]
    path = folder / "x.safetensors"
    path.write_bytes(b"content")

    def fingerprint():
        prompt = DynamicPrompt({"7": {"class_type": name, "inputs": {key: "x.safetensors"}}})
        told = asyncio.run(execution.IsChangedCache("prompt", prompt, None).get("7"))
        assert told == told, "the host takes an exception for a node that changes always"
        return told

    first = fingerprint()
    assert first and first == fingerprint()
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))
    second = fingerprint()
    path.unlink()
    assert len({str(first), str(second), str(fingerprint())}) == 3
