"""What a user finds in ComfyUI: nodes with help, one script, templates with pictures; and errors one can read."""
from urllib.parse import quote

import pytest

from devtools.server import DIRECT, ROOT
from testbed.client import Server, ServerError

NODES = (
    "Reprise_StepCache", "Reprise_StepCacheCalibrate", "Reprise_RunReport", "Reprise_CompareRuns",
    "Reprise_EasyControlLoader", "Reprise_EasyControlCondition",
    "Reprise_FastFitLoader", "Reprise_FastFitPerson", "Reprise_FastFitReference", "Reprise_FastFitPasteBack",
    "Reprise_TemplateLoader", "Reprise_TemplateScalar", "Reprise_TemplateImage", "Reprise_TemplateLora", "Reprise_TemplateText",
    "Reprise_ReferenceLatentCache", "Reprise_ModulationCache",
    "Reprise_ApplyReferenceCache", "Reprise_CombineReferenceCache", "Reprise_SaveReferenceCache", "Reprise_LoadReferenceCache",
    "Reprise_InspectReferenceCache", "Reprise_ClearReferenceCache",
    "Reprise_QuantizedModelLoader", "Reprise_SaveQuantizedModel", "Reprise_QuantizationReport",
    "Reprise_AttentionBackend", "Reprise_Doctor", "Reprise_FusedKernels",
)
WORKFLOWS = sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))


def download(server: Server, path: str) -> bytes:
    with DIRECT.open(server.url + quote(path)) as response:
        return response.read()


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_every_knob_has_a_tooltip(object_info, node):
    def untold(inputs: dict, prefix: str) -> list[str]:
        names = []
        for name, (_, facts) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
            names += [] if facts.get("tooltip") else [prefix + name]
            for option in facts.get("options", []):
                if isinstance(option, dict):
                    names += untold(option["inputs"], f"{prefix}{name}.{option['key']}.")
        return names

    assert untold(object_info[node]["input"], "") == []


def test_no_node_is_listed_that_has_no_test_here(object_info):
    assert sorted(name for name in object_info if name.startswith("Reprise_")) == sorted(NODES)


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_of_a_node_is_served(server, node):
    assert download(server, f"/extensions/reprise/docs/{node}.md").decode("utf-8").strip()


def test_the_browser_loads_exactly_one_script_of_ours(server):
    assert [path for path in server.get("/extensions") if "reprise" in path] == ["/extensions/reprise/main.js"]


def test_the_templates_are_the_workflow_files(server):
    assert sorted(server.get("/workflow_templates")["reprise"]) == WORKFLOWS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_is_served_with_its_picture(server, name):
    assert download(server, f"/api/workflow_templates/reprise/{name}.json").startswith(b"{")
    assert download(server, f"/api/workflow_templates/reprise/{name}.jpg").startswith(b"\xff\xd8\xff")


def test_a_rejected_prompt_says_which_node_is_wrong(server):
    lonely = {
        "1": {"class_type": "VAEDecode", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    with pytest.raises(ServerError, match=r"node 1 \(VAEDecode\): Required input is missing: samples"):
        server.run(lonely)


def test_a_node_that_fails_is_named_with_its_message(server):
    outside = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../../elsewhere"}},
    }
    with pytest.raises(ServerError, match=r"node 2 \(SaveImage\) failed: .*outside the output folder"):
        server.run(outside)


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(ServerError, match="^no server answers at http://127.0.0.1:9"):
        Server("http://127.0.0.1:9").get("/system_stats")
