"""What the user sees: one module per group of nodes. A group that fails to import is logged, and the rest loads."""
import logging
from importlib import import_module

from ._api import ComfyExtension, io

log = logging.getLogger("reprise")

GROUPS = (
    "step_cache",
    "step_cache_calibrate",
    "run_report",
    "compare_runs",
    "references",
    "easycontrol",
    "fastfit",
    "templates",
    "template_carriers",
    "reference_latents",
    "quantized",
    "gguf",
    "quantization_report",
    "fused_kernels",
    "attention_backend",
    "doctor",
    "modulation_cache",
)


class Pack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = []
        for group in GROUPS:
            try:
                nodes += import_module(f".{group}", __package__).NODES
            except Exception:
                log.exception("Reprise: the nodes of '%s' could not be loaded and are missing from the menu", group)
        self.log_machine()
        return nodes

    @staticmethod
    def log_machine() -> None:
        """What was found on this machine, in the log. What goes wrong there must not cost the nodes."""
        try:
            import_module(".doctor", __package__).log_machine()
        except Exception:
            log.exception("Reprise: this machine could not be looked at")
