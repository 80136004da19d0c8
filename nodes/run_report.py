"""Run Report: what the sampling run behind a picture did."""
from ..compare.words import described
from ..core.attach import runs_on
from ..core.report import Report
from ._api import get_executing_context, io
from .notify import show

REPORT = io.Custom("REPRISE_REPORT")
STEP_CACHE = "Reprise_StepCache"


class RunReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_RunReport",
            display_name="Run Report",
            category="reprise",
            description="The record of the sampling run that just ended: what was computed, what was skipped, and how large the errors were.",
            search_aliases=["report", "log", "statistics", "step cache report", "evaluations"],
            inputs=[
                io.Model.Input("model", tooltip="The model that came out of Step Cache and went into the sampler."),
                io.AnyType.Input("trigger", tooltip="What the sampler made: its latent, or the image. The report waits for it and is about the run behind it."),
            ],
            outputs=[
                REPORT.Output("report", tooltip="For Compare Runs."),
                io.String.Output("text", tooltip="The report in words: the run, its settings and every evaluation."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, trigger) -> io.NodeOutput:
        node_id, graph = getattr(cls.hidden, "unique_id", None), getattr(cls.hidden, "dynprompt", None)
        reports = reports_of(model, node_id, graph)
        *before, last = reports
        text = described(last)
        if before:
            lines = [f"run {number}: {report.line()}" for number, report in enumerate(before, 1)]
            text = "\n".join([*lines, f"run {len(reports)}, the last, in full:", text])
        show(last.line(), node_id)
        return io.NodeOutput(last, text)


def reports_of(model, node_id: str | None, graph) -> list[Report]:
    """Reports of the runs that lead to the trigger of node `node_id`, oldest first and at least one; without a graph, of all runs."""
    runs = runs_on(model)
    if runs is None:
        if graph is not None and any(graph.get_node(node)["class_type"] == STEP_CACHE for node in behind(graph, node_id, "model")):
            return [Report(state="off", reason="the node is switched off")]
        raise ValueError("the model has no Step Cache on it; connect the model that comes out of Step Cache and goes into the sampler")
    if graph is None:
        found = runs.strays(())
    else:
        execution, leading = get_executing_context(), behind(graph, node_id, "trigger")
        found = runs.of(lambda node: node in leading or graph.get_real_node_id(node) in leading, execution and execution.list_index)
        found = found or runs.strays(graph.all_node_ids())
    if not found:
        raise ValueError("no run with this model lies behind 'trigger'; connect what its sampler made, and the model of the last Step Cache before it, as "
                         "a second one takes the place of the first; if ComfyUI took the picture from its cache, sample again with another seed")
    return found


def behind(graph, node_id: str, name: str) -> set[str]:
    """The nodes that the input `name` of a node depends on."""
    found, waiting = set(), links({name: graph.get_node(node_id)["inputs"].get(name)})
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += links(graph.get_node(node)["inputs"])
    return found


def links(inputs: dict) -> list[str]:
    return [value[0] for value in inputs.values() if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)]


NODES = [RunReport]
