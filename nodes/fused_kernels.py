"""Fused kernels in the blocks of a model."""
from ..core.quant.fusion.attach import LAYERS, Settings, attach_fused_kernels
from ._api import io
from .notify import text_notifier


class FusedKernels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_FusedKernels",
            display_name="Fused Kernels",
            category="reprise/quantized",
            description="Runs what lies between the matrix products of FLUX.1, FLUX.2, Z-Image and Lumina 2 (norms, modulation, gates, residuals, "
                        "activations, rounding to int8) in few passes over memory. It pays most on int8 models. Where Triton does not work, "
                        "it passes through and says so.",
            search_aliases=["triton", "int8", "speed", "fusion", "kernel"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1, FLUX.2, Z-Image or Lumina 2, best with int8 layers. Others pass through."),
                io.Boolean.Input("enabled", default=True, optional=True,
                                 tooltip="Off passes the model through: the picture is bit-identical to the one without the node."),
                io.Combo.Input("layers", options=list(LAYERS), default="all", optional=True, advanced=True,
                               tooltip="all: int8 layers, and norm and modulation in one pass before all others. int8: before int8 layers alone."),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with fused kernels. LoRA, ControlNet, Step Cache and reference caches work on it.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, enabled: bool = True, layers: str = "all") -> io.NodeOutput:
        if not enabled:
            return io.NodeOutput(model)
        return io.NodeOutput(attach_fused_kernels(model, Settings(layers), text_notifier(getattr(cls.hidden, "unique_id", None))))


NODES = [FusedKernels]
