"""Doctor: what Reprise found on this machine and what it will use, on a node and in the log when the pack loads."""
import logging

from ..core.quant.doctor import findings
from ..core.quant.look import look
from ._api import io
from .notify import show

log = logging.getLogger("reprise")


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_Doctor",
            display_name="Doctor",
            category="reprise",
            description="What this machine has and what Reprise will use: GPU, torch, comfy_kitchen and why one of its backends is off, Triton, attention, "
                        "and for each feature who does the work, what that costs and what would help.",
            search_aliases=["diagnose", "system info", "triton", "cuda", "why is it slow", "capabilities"],
            inputs=[io.AnyType.Input("trigger", optional=True, tooltip="Looks when this is there. Nothing needs to be connected.")],
            outputs=[io.String.Output("text", tooltip="The findings, a line each: what was found, what is used, one line of advice.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, trigger=None) -> float:
        return float("nan")     # looks again every time

    @classmethod
    def execute(cls, trigger=None) -> io.NodeOutput:
        text = "\n".join(finding.line() for finding in findings(look()))
        show(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(text)


def log_machine() -> None:
    """One block in the log. Nothing is imported or compiled for it."""
    lines = (finding.line() for finding in findings(look(compiling=False, importing=False)))
    log.info("\n  ".join(["Reprise on this machine:", *lines]))


NODES = [Doctor]
