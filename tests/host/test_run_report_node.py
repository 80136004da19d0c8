"""Run Report: the record of the run behind a picture, as the host's graph and cache have it."""
import copy
import json

import comfy.model_patcher
import pytest
from comfy_execution.graph import DynamicPrompt
from comfy_execution.utils import CurrentNodeContext
from harness import attached, model, sample

from pack.core.attach import runs_on
from pack.core.report import Report
from pack.nodes._api import io
from pack.nodes.run_report import RunReport

# 1 loads, 2 is Step Cache, 3 samples, 4 samples what 3 made, 5 decodes it; 6 to 8 are Run Reports behind 3, behind 5, and behind nothing
GRAPH = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "x"}},
    "2": {"class_type": "Reprise_StepCache", "inputs": {"model": ["1", 0], "enabled": True}},
    "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "steps": 12}},
    "4": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "latent_image": ["3", 0]}},
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0]}},
    "6": {"class_type": "Reprise_RunReport", "inputs": {"model": ["2", 0], "trigger": ["3", 0]}},
    "7": {"class_type": "Reprise_RunReport", "inputs": {"model": ["2", 0], "trigger": ["5", 0]}},
    "8": {"class_type": "Reprise_RunReport", "inputs": {"model": ["2", 0], "trigger": ["1", 0]}},
    "9": {"class_type": "Reprise_RunReport", "inputs": {"model": ["1", 0], "trigger": ["3", 0]}},
}


def cached(**more):
    return attached(model("flux"), policy="interval", **more)


def sampled(patcher, node: str = "3", prompt: str = "p1", item: int | None = 0, steps: int = 12):
    """The node `node` samples, as the host calls it."""
    with CurrentNodeContext(prompt, node, item):
        return sample(patcher, "flux", steps=steps)


def report(patcher, node: str = "6", graph=GRAPH, prompt: str = "p1", item: int | None = 0) -> tuple[Report, str]:
    """What the Run Report `node` of the graph gives."""
    dynamic = graph if isinstance(graph, DynamicPrompt) else DynamicPrompt(graph)
    prepared = RunReport.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: node, io.Hidden.dynprompt: dynamic}})
    with CurrentNodeContext(prompt, node, item):
        return prepared.execute(patcher, object()).result


def refusal(*arguments, **more) -> str:
    with pytest.raises(ValueError) as caught:
        report(*arguments, **more)
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 250
    return str(caught.value)


def test_the_report_is_that_of_the_run_and_its_words_have_every_evaluation():
    reports = []
    patcher = cached(reports=reports)
    sampled(patcher)
    found, text = report(patcher)
    assert found is reports[0] and found.computed < len(found.each) == 12
    assert text.startswith(found.line()) and len(text.splitlines()) == 4 + 12
    assert "policy interval (interval 2, warm up 3)" in text.replace("_", " ") and json.loads(json.dumps(found.as_dict()))["steps"] == 12


def options_cloned(patcher):
    clone = patcher.clone()
    clone.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    return clone


def options_copied_deeply(patcher):
    clone = patcher.clone()
    clone.model_options = copy.deepcopy(patcher.model_options)
    return clone


@pytest.mark.parametrize("copied", [lambda patcher: patcher.clone(), lambda patcher: patcher.clone().clone(), options_cloned, options_copied_deeply])
def test_a_copy_of_the_model_is_sampled_and_the_model_knows_and_the_other_way_round(copied):
    patcher = cached()
    other = copied(patcher)
    sampled(other, steps=12)
    assert report(patcher)[0].steps == 12
    sampled(patcher, steps=14, prompt="p2")
    assert report(other)[0].steps == 14


def test_a_second_step_cache_begins_its_own_record():
    patcher = cached()
    sampled(patcher)
    again = attached(patcher, policy="interval")
    assert "no run" in refusal(again) and report(patcher)[0].steps == 12


def test_of_two_samplers_the_one_behind_the_trigger_is_told_whichever_ran_last():
    patcher = cached()
    sampled(patcher, "3", steps=12)
    sampled(patcher, "4", steps=14)
    first, text = report(patcher, "6")
    assert first.steps == 12 and "run 1" not in text
    last, text = report(patcher, "7")
    assert last.steps == 14 and text.startswith(f"run 1: {first.line()}\nrun 2, the last, in full:\n{last.line()}\n")


def test_a_sampler_that_the_host_serves_from_its_cache_still_has_its_report():
    patcher = cached()
    sampled(patcher, "3", "p1", steps=12)
    sampled(patcher, "4", "p1", steps=14)
    sampled(patcher, "4", "p2", steps=16)      # the second sampler's seed was changed; the first was not executed
    assert report(patcher, "6", prompt="p2")[0].steps == 12 and report(patcher, "7", prompt="p2")[0].steps == 16


def test_a_new_execution_takes_the_place_of_the_one_before():
    patcher = cached()
    sampled(patcher, prompt="p1", steps=12)
    sampled(patcher, prompt="p2", steps=14)
    found, text = report(patcher, prompt="p2")
    assert found.steps == 14 and "run 1" not in text


def test_all_tiles_of_one_execution_are_told_and_the_last_in_full():
    patcher = cached()
    with CurrentNodeContext("p1", "3", 0):
        for steps in (12, 13, 14):
            sample(patcher, "flux", steps=steps)
    found, text = report(patcher)
    assert found.steps == 14 and text.count("Step Cache: ") == 3 and "run 3, the last" in text


def test_items_of_a_list_have_their_own_reports():
    patcher = cached()
    sampled(patcher, item=0, steps=12)
    sampled(patcher, item=1, steps=14)
    assert report(patcher, item=0)[0].steps == 12 and report(patcher, item=1)[0].steps == 14


def test_a_sampler_inside_an_expanded_node_is_found_behind_that_node():
    patcher = cached()
    dynamic = DynamicPrompt(GRAPH)
    dynamic.add_ephemeral_node("3.0.0.1", {"class_type": "KSampler", "inputs": {"model": ["2", 0]}}, "3", "3")
    sampled(patcher, "3.0.0.1", steps=14)
    assert report(patcher, "6", dynamic)[0].steps == 14
    assert report(patcher, "6", GRAPH)[0].steps == 14, "when the host serves node 3 from its cache the inner node does not come back"


def test_a_sampler_that_got_another_number_keeps_its_report():
    """The host's cache does not look at a sampler's number."""
    patcher = cached()
    sampled(patcher, "33", steps=14)
    assert report(patcher)[0].steps == 14


def test_a_run_behind_something_else_is_not_taken_for_the_trigger_s():
    patcher = cached()
    sampled(patcher)
    assert "behind 'trigger'" in refusal(patcher, "8")


def test_before_any_run_it_says_what_to_connect():
    assert "behind 'trigger'" in refusal(cached())


def test_a_model_without_step_cache_is_refused_with_what_to_connect():
    assert refusal(model("flux"), "9") == "the model has no Step Cache on it; connect the model that comes out of Step Cache and goes into the sampler"
    with pytest.raises(ValueError, match="no Step Cache"):
        RunReport.execute(model("flux"), None)


def test_a_step_cache_that_is_switched_off_is_told_and_stops_nothing():
    """Off leaves nothing on the model, so only the graph knows."""
    found, text = report(model("flux"))
    assert found.state == "off" and text == "Step Cache is off: the node is switched off"


def test_a_run_that_was_left_alone_gives_its_reason():
    patcher = cached()
    sampled(patcher, steps=4)
    found, text = report(patcher)
    assert found.state == "off" and text == found.line() and "4 steps" in text


def test_a_run_that_was_interrupted_is_kept_as_that():
    patcher = cached()

    def interrupt(step, denoised, x, total):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CurrentNodeContext("p1", "3", 0):
        sample(patcher, "flux", callback=interrupt)
    assert "cut short" in report(patcher)[1].splitlines()[0]


def test_a_script_gets_every_run_without_a_graph():
    patcher = cached()
    sample(patcher, "flux", steps=12)
    sample(patcher, "flux", steps=14)
    found, text = RunReport.execute(patcher, None).result
    assert found.steps == 14 and "run 1: " in text


def test_no_tensor_rides_on_the_model_after_a_run():
    patcher = cached()
    sampled(patcher)
    for _, kept in runs_on(patcher).ended:
        json.dumps(kept.as_dict(), allow_nan=False)


def test_the_schema_is_valid_and_every_input_tells_what_it_is_for():
    schema = RunReport.GET_SCHEMA()
    schema.validate()
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs)) and not any(entry.optional for entry in schema.inputs)


def test_with_two_step_caches_in_a_row_the_second_one_acts_and_the_report_on_the_first_says_which_to_connect():
    first_reports, second_reports = [], []
    first = cached(reports=first_reports)
    second = attached(first, policy="interval", reports=second_reports)
    sampled(second)
    assert not first_reports and len(second_reports) == 1 and report(second)[0] is second_reports[0]
    assert "the model of the last Step Cache before it, as a second one takes the place of the first" in refusal(first)
