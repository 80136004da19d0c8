"""Workflow files as users open them, turned into prompts that the tiny models can run.

A workflow names the real models. `substitutions.json` is all that changes: file names, nodes that a fixture stands in
for (loaders of text encoders and of whole checkpoints, and the video file) and the size of the latent. Steps, cfg,
sampler and every setting of our own nodes stay as the file has them. Models listed as seeded have random weights.
"""
import copy
import json
from pathlib import Path

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def read_workflow(file: Path, object_info: dict) -> dict:
    """The prompt over the tiny models of a workflow file; whatever is wrong with the file is one sentence that names it."""
    try:
        return substitute(convert(read(file), object_info))
    except (ValueError, WorkflowConversionError) as error:      # bytes that are no text, text that is no JSON, JSON that is no workflow
        raise WorkflowError(f"'{file.name}' cannot be used: {error}") from error


SUBSTITUTIONS = read(Path(__file__).with_name("substitutions.json"))
MODEL_FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pth", ".pt")
OURS = "Reprise_"


class WorkflowError(ValueError):
    pass


def convert(workflow: dict, object_info: dict) -> dict:
    """The API prompt of a UI workflow; an unknown node is an error here, where it can still be named."""
    prompt = convert_ui_to_api(workflow, object_info)
    unknown = sorted({node["class_type"] for node in prompt.values()} - object_info.keys())
    if unknown:
        raise WorkflowError(f"the server has no node {', '.join(unknown)}; did its node pack load?")
    return prompt


def substitute(prompt: dict) -> dict:
    """The same prompt over the tiny models. A stand-in for a node keeps its links and nothing else."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        stand_in = SUBSTITUTIONS["nodes"].get(node["class_type"])
        if stand_in:
            node.update(class_type=stand_in, inputs={name: value for name, value in node["inputs"].items() if is_link(value)})
        node["inputs"].update(SUBSTITUTIONS["sizes"].get(node["class_type"], {}))
        for name, value in node["inputs"].items():
            if isinstance(value, str) and value.endswith(MODEL_FILES):
                node["inputs"][name] = tiny_file(value)
    return prompt


def tiny_file(name: str) -> str:
    if name not in SUBSTITUTIONS["files"]:
        raise WorkflowError(f"no tiny model stands in for '{name}'; add a row to testbed/substitutions.json")
    return SUBSTITUTIONS["files"][name]


def without_reprise(prompt: dict) -> dict:
    """The baseline: our model patches taken out and their consumers linked to the model they patched."""
    ours = {key: node["inputs"]["model"] for key, node in prompt.items() if node["class_type"].startswith(OURS) and "model" in node["inputs"]}

    def unpatched(link: list) -> list:
        while link[0] in ours:
            if link[1] != 0:
                raise WorkflowError(f"node {link[0]} gives more than a model; a graph without it cannot be made")
            link = ours[link[0]]
        return link

    kept = {key: copy.deepcopy(node) for key, node in prompt.items() if key not in ours}
    for node in kept.values():
        for name, value in node["inputs"].items():
            if is_link(value):
                node["inputs"][name] = unpatched(value)
    return kept


def model_of(prompt: dict) -> str:
    """What the model that Step Cache is on comes from: the file that a loader opens, or the fixture in its place."""
    [node, *_] = nodes_of(prompt, OURS)
    while "model" in node["inputs"]:
        node = prompt[node["inputs"]["model"][0]]
    files = [value for value in node["inputs"].values() if isinstance(value, str) and value.endswith(MODEL_FILES)]
    return files[0] if files else node["class_type"]


def is_trained(model: str) -> bool:
    """Whether the pictures of a model, told as `model_of` does, mean anything."""
    return model not in SUBSTITUTIONS["seeded"]


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def nodes_of(prompt: dict, prefix: str) -> list[dict]:
    """The nodes whose class begins with `prefix`."""
    return [node for node in prompt.values() if node["class_type"].startswith(prefix)]
