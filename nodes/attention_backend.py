"""Attention Backend: attention in 8 bits, or by another library, on the steps where it does little harm."""
from ..core.quant.attention import AUTOMATIC, CHOICES, OFF, Settings, attach_attention
from ._api import io
from .notify import text_notifier
from .numbers import check_numbers


class AttentionBackend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_AttentionBackend",
            display_name="Attention Backend",
            category="reprise",
            description="Chooses who computes this model's attention: SageAttention or comfy_kitchen in 8 bits, which is faster and approximate, or xformers "
                        "or SDPA in full precision. The first and last steps can stay in full precision. The line under the node says how many calls were "
                        "served, and how many fell back and why.",
            search_aliases=["sage attention", "sageattention", "int8 attention", "xformers", "sdpa", "flash attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Combo.Input(
                    "backend", options=list(CHOICES), default=AUTOMATIC, optional=True,
                    tooltip="automatic: the first that is installed and serves the GPU of SageAttention 2, comfy_kitchen int8 and SageAttention 1; if none "
                            "is, nothing changes. off changes nothing. SageAttention and comfy_kitchen int8 are approximate, xformers and SDPA are not. One "
                            "that is not installed is an error that says what to install."),
                io.Int.Input("first_steps", default=1, min=0, max=1000, optional=True,
                             tooltip="So many steps at the start stay in full precision: they decide the layout of the picture."),
                io.Int.Input("last_steps", default=1, min=0, max=1000, optional=True,
                             tooltip="So many steps at the end stay in full precision: they decide its finest detail."),
                io.Boolean.Input("measure", default=False, optional=True,
                                 tooltip="Compute attention both ways in the first evaluation that is served, to tell the error under the node. The picture "
                                         "stays the same."),
            ],
            outputs=[io.Model.Output(tooltip="The model with this attention.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, backend: str = AUTOMATIC, first_steps: int = 1, last_steps: int = 1, measure: bool = False) -> io.NodeOutput:
        check_numbers(cls, first_steps=first_steps, last_steps=last_steps)
        settings = Settings(backend, first_steps, last_steps, measure)
        if backend == OFF:
            return io.NodeOutput(model)
        return io.NodeOutput(attach_attention(model, settings, text_notifier(getattr(cls.hidden, "unique_id", None))))


NODES = [AttentionBackend]
