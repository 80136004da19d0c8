"""Workflow files become prompts for the tiny models, and nothing else about them changes."""
import pytest

from testbed.client import afresh, line_of, rejection
from testbed.workflow import (
    LATENTS,
    REFERENCES,
    STEP_CACHE,
    WorkflowError,
    convert,
    is_trained,
    model_of,
    steps_of,
    substitute,
    system_of,
    without_reprise,
)


def prompt() -> dict:
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "red heart", "clip": ["2", 0]}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
        "5": {"class_type": "Reprise_StepCache", "inputs": {"model": ["1", 0], "preset": "fast", "policy": "error control", "policy.tolerance": 0.1}},
        "6": {"class_type": "KSampler", "inputs": {"model": ["5", 0], "positive": ["3", 0], "latent_image": ["4", 0], "steps": 20, "seed": 7}},
    }


def changes(before: dict, after: dict) -> dict:
    """{(node, input): new value}, with "" for the class."""
    def flat(prompt: dict) -> dict:
        return {(key, name): value for key, node in prompt.items() for name, value in {"": node["class_type"], **node["inputs"]}.items()}

    old, new = flat(before), flat(after)
    return {place: new.get(place) for place in old | new if old.get(place) != new.get(place)}


def test_file_names_the_text_encoder_and_the_latent_size_are_replaced_and_nothing_else():
    assert changes(prompt(), substitute(prompt())) == {
        ("1", "unet_name"): "flux_tiny.safetensors",
        ("2", ""): "RepriseTestbed_TextEncoder", ("2", "clip_name1"): None, ("2", "clip_name2"): None,
        ("4", "width"): 128, ("4", "height"): 128,
    }


def test_a_stand_in_keeps_the_links_of_the_node_and_nothing_else():
    video = {
        "1": {"class_type": "CreateVideo", "inputs": {"images": ["9", 0], "fps": 16}},
        "2": {"class_type": "SaveVideo", "inputs": {"video": ["1", 0], "filename_prefix": "video/x", "format": "auto", "codec": "auto"}},
    }
    assert substitute(video) == {"1": video["1"], "2": {"class_type": "RepriseTestbed_SaveFrames", "inputs": {"video": ["1", 0]}}}


def test_the_model_of_a_prompt_is_found_behind_its_patches():
    patched = prompt()
    patched["7"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 8.0}}
    patched["5"]["inputs"]["model"] = ["7", 0]
    assert model_of(patched) == "flux1-dev.safetensors" and model_of(substitute(patched)) == "flux_tiny.safetensors"
    assert is_trained(substitute(patched))


@pytest.mark.parametrize("loader", [
    {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}},
    {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}},
])
def test_a_model_with_random_weights_is_known_as_one(loader):
    seeded = prompt()
    seeded["1"] = loader
    assert not is_trained(substitute(seeded))


def test_a_model_file_without_a_stand_in_is_named():
    real = prompt()
    real["1"]["inputs"]["unet_name"] = "some_model.safetensors"
    with pytest.raises(WorkflowError, match="'some_model.safetensors'"):
        substitute(real)


def test_substituting_leaves_the_given_prompt_alone():
    real = prompt()
    substitute(real)
    assert real == prompt()


def test_without_reprise_the_sampler_takes_the_loaders_model():
    assert changes(prompt(), without_reprise(prompt())) == {
        ("5", ""): None, ("5", "model"): None, ("5", "preset"): None, ("5", "policy"): None, ("5", "policy.tolerance"): None,
        ("6", "model"): ["1", 0],
    }


def test_without_reprise_a_chain_of_our_nodes_is_taken_out_whole():
    chained = prompt()
    chained["7"] = {"class_type": "Reprise_Other", "inputs": {"model": ["5", 0]}}
    chained["6"]["inputs"]["model"] = ["7", 0]
    baseline = without_reprise(chained)
    assert baseline["6"]["inputs"]["model"] == ["1", 0]
    assert not {"5", "7"} & baseline.keys()


def test_without_reprise_our_loaders_and_fixture_nodes_stay():
    own = substitute(prompt())
    own["1"]["class_type"] = "Reprise_Loader"
    assert {"1", "2"} <= without_reprise(own).keys()


def referred() -> dict:
    """A prompt whose model and conditionings pass Apply Reference Cache, with a condition image."""
    return {key: node for key, node in prompt().items() if key != "5"} | {
        "3n": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["3", 0]}},
        "6": {"class_type": "KSampler", "inputs": {"model": ["10", 0], "positive": ["10", 1], "negative": ["10", 2], "latent_image": ["4", 0], "steps": 20}},
        "7": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "8": {"class_type": "Reprise_EasyControlLoader", "inputs": {"file": "canny.safetensors"}},
        "9": {"class_type": "Reprise_EasyControlCondition", "inputs": {"adapter": ["8", 0], "image": ["7", 0], "vae": ["11", 0], "size": 512}},
        "10": {"class_type": "Reprise_ApplyReferenceCache", "inputs": {
            "model": ["1", 0], "positive": ["3", 0], "negative": ["3n", 0], "reference": ["9", 0], "keep": True}},
        "11": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "12": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["11", 0]}},
        "13": {"class_type": "SaveImage", "inputs": {"images": ["12", 0]}},
    }


def test_without_reprise_references_leave_model_and_conditionings_and_take_along_what_made_them():
    baseline = without_reprise(referred())
    assert baseline["6"]["inputs"] == {"model": ["1", 0], "positive": ["3", 0], "negative": ["3n", 0], "latent_image": ["4", 0], "steps": 20}
    assert baseline.keys() == {"1", "2", "3", "3n", "4", "6", "11", "12", "13"}


def test_an_output_that_stands_for_nothing_upstream_is_told():
    odd = referred()
    odd["14"] = {"class_type": "PreviewAny", "inputs": {"source": ["10", 3]}}
    with pytest.raises(WorkflowError, match="node 10 gives more than model and positive and negative"):
        without_reprise(odd)


def test_references_are_substituted_with_their_pictures_files_and_sizes():
    assert changes(referred(), substitute(referred())).items() >= {
        ("7", "image"): "testbed_heart.png", ("8", "file"): "easycontrol_tiny.safetensors", ("9", "size"): 128}.items()


def test_a_loader_of_a_file_without_a_tiny_one_is_replaced_by_a_fixture():
    real = referred()
    real["11"]["inputs"]["vae_name"] = "flux2-vae.safetensors"
    assert substitute(real)["11"] == {"class_type": "RepriseTestbed_Flux2VAE", "inputs": {}}


def test_a_picture_without_a_stand_in_is_named():
    real = referred()
    real["7"]["inputs"]["image"] = "holiday.png"
    with pytest.raises(WorkflowError, match="no tiny picture stands in for 'holiday.png'"):
        substitute(real)


@pytest.mark.parametrize(("graph", "system"), [(prompt, STEP_CACHE), (referred, REFERENCES)])
def test_a_graph_is_of_the_system_that_acts_on_its_sampling(graph, system):
    assert system_of(graph()) == system and model_of(graph()) == "flux1-dev.safetensors" and steps_of(graph()) == 20


def test_a_graph_with_two_systems_or_none_is_told():
    two = referred()
    two["14"] = {"class_type": LATENTS, "inputs": {"model": ["1", 0]}}
    for graph, count in ((two, 2), (without_reprise(two), 0)):
        with pytest.raises(WorkflowError, match=f"the graph has {count} nodes that are Step Cache"):
            system_of(graph)


def test_random_weights_anywhere_in_a_graph_are_told():
    seeded = substitute(referred())
    assert is_trained(seeded)
    seeded["8"]["inputs"]["file"] = "template_seeded/model.safetensors"
    assert not is_trained(seeded)


def test_lines_under_nodes_are_read_from_binary_messages_and_previews_are_not():
    assert line_of(b"\x00\x00\x00\x03\x00\x00\x00\x0210" + "26 °".encode()) == {"10": "26 °"}
    assert line_of(b"\x00\x00\x00\x01\x00\x00\x00\x02\xff\xd8\xff") == {}


def test_a_graph_without_our_nodes_is_its_own_baseline():
    plain = without_reprise(prompt())
    assert without_reprise(plain) == plain


WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "UNETLoader", "mode": 0, "inputs": [], "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}],
         "widgets_values": ["flux1-dev.safetensors", "default"]},
        {"id": 2, "type": "Reprise_StepCache", "mode": 0, "inputs": [{"name": "model", "type": "MODEL", "link": 1}], "outputs": [],
         "widgets_values": ["interval", 3, 0.5]},
        {"id": 3, "type": "MarkdownNote", "mode": 0, "inputs": [], "outputs": [], "widgets_values": ["a note"]},
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"]],
}
OBJECT_INFO = {
    "UNETLoader": {"input": {"required": {"unet_name": [["a.safetensors"]], "weight_dtype": [["default"]]}}},
    "Reprise_StepCache": {"input": {
        "required": {"model": ["MODEL", {}]},
        "optional": {
            "policy": ["COMFY_DYNAMICCOMBO_V3", {"options": [
                {"key": "hold", "inputs": {"required": {}}},
                {"key": "interval", "inputs": {"required": {"length": ["INT", {"default": 2}]}}}]}],
            "end_percent": ["FLOAT", {"default": 1.0}]}}},
}


def test_the_knobs_of_a_dynamic_combo_follow_its_selected_entry():
    assert convert(WORKFLOW, OBJECT_INFO)["2"]["inputs"] == {"model": ["1", 0], "policy": "interval", "policy.length": 3, "end_percent": 0.5}


def test_notes_are_not_part_of_the_prompt():
    assert convert(WORKFLOW, OBJECT_INFO).keys() == {"1", "2"}


def test_a_node_that_the_server_does_not_have_is_named():
    with pytest.raises(WorkflowError, match="no node Reprise_StepCache"):
        convert(WORKFLOW, {"UNETLoader": OBJECT_INFO["UNETLoader"]})


def test_a_run_marks_its_samplers_and_nothing_else():
    marked = changes(prompt(), afresh(prompt()))
    assert marked.keys() == {("6", "run")}
    assert marked != changes(prompt(), afresh(prompt()))


def test_a_rejection_tells_which_node_is_wrong_and_how():
    answer = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"6": {"class_type": "KSampler", "errors": [{"message": "Required input is missing", "details": "seed"}]}},
    }
    assert rejection(answer, prompt()).splitlines() == [
        "the server rejects the prompt: Prompt outputs failed validation",
        "  node 6 (KSampler): Required input is missing: seed",
    ]
