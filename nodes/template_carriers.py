"""Diffusion Templates that are no references: a LoRA for the model or for one prompt, and text behind the prompt."""
from ..core.reference.templates.lora import SIDES, SUMS, applied, chosen, merged
from ..core.reference.templates.text import with_text
from ._api import io
from .numbers import check_numbers
from .templates import CATEGORY, TEMPLATE, for_node


class TemplateLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_TemplateLora",
            display_name="Template (LoRA)",
            category=CATEGORY,
            description="Puts a template that is a LoRA, or LoRAs of a bank of them (Aesthetic), on the model, or on the positive or the negative prompt "
                        "alone.",
            search_aliases=["diffusion templates", "aesthetic", "lora bank"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the template was made for: FLUX.2 klein."),
                TEMPLATE.Input("template", tooltip="From Template Loader: LoRA."),
                io.Conditioning.Input("positive", optional=True, tooltip="The prompt; needed where the LoRA acts on it alone."),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt; needed where the LoRA acts on it alone."),
                io.Combo.Input("side", options=list(SIDES), default="both", optional=True,
                               tooltip="both changes the model. positive and negative change it for that prompt alone, which switches weights on every step."),
                io.Float.Input("scale", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001, optional=True, tooltip="How strongly the LoRAs act."),
                io.String.Input("ids", default="", optional=True, tooltip="Which LoRAs of a bank, counted from 0: 0, 3-5. Empty takes all."),
                io.Combo.Input("merge", options=list(SUMS), default="sum", optional=True,
                               tooltip="Several LoRAs of a bank: their changes are added, or their mean is taken."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model, with the LoRA where both sides have it."),
                io.Conditioning.Output("positive", tooltip="The prompt, with the LoRA where it is this side's."),
                io.Conditioning.Output("negative", tooltip="The negative prompt, with the LoRA where it is this side's."),
            ],
        )

    @classmethod
    def execute(cls, model, template, positive=None, negative=None, side: str = "both", scale: float = 1.0, ids: str = "", merge: str = "sum") -> io.NodeOutput:
        check_numbers(cls, scale=scale)
        loras = for_node(template, "Template (LoRA)").loras(chosen(ids, template.count))
        share = 1.0 / len(loras) if merge == "mean" else 1.0
        return io.NodeOutput(*applied(model, positive, negative, merged(loras, [share] * len(loras)), scale, side, f"template {template.file.name}"))


class TemplateText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_TemplateText",
            display_name="Template (text)",
            category=CATEGORY,
            description="Puts the text tokens of a template behind those of a prompt. Several such templates follow one another.",
            search_aliases=["diffusion templates", "text embedding"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt."),
                TEMPLATE.Input("template", tooltip="From Template Loader: text."),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt with the template's tokens behind it.")],
        )

    @classmethod
    def execute(cls, conditioning, template) -> io.NodeOutput:
        return io.NodeOutput(with_text(conditioning, for_node(template, "Template (text)")))


NODES = [TemplateLora, TemplateText]
