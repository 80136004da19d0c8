"""Quantization Report: measure what quantizing each layer costs, and save a plan for the loader."""
from ..core.quant import folders
from ..core.quant.measure import measure
from ..core.quant.plan import write_plan
from ..core.quant.score import SCORES
from ..core.quant.transcode import TRANSCODERS
from ._api import ProgressBar, io
from .choice import check_choices
from .notify import show
from .numbers import check_numbers

SMALLEST = {"int8 and fp8": ("int8", "fp8"), "nvfp4 too": tuple(TRANSCODERS)}


class QuantizationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_QuantizationReport",
            display_name="Quantization Report",
            category="reprise/quantized",
            description="Runs a short schedule, measures for each layer what int8, fp8 and nvfp4 would do to its output on the activations of that run, and "
                        "saves a plan within a memory budget for Quantized Model Loader.",
            search_aliases=["mixed precision", "layer selector", "quantize", "sensitivity", "lrq-dit"],
            inputs=[
                io.Model.Input("model", tooltip="The model at full precision, LoRAs included."),
                io.Conditioning.Input("positive", tooltip="A prompt like those you will use."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it does nothing at cfg 1."),
                io.Sampler.Input("sampler", tooltip="Any sampler."),
                io.Sigmas.Input("sigmas", tooltip="A short schedule, 4 to 8 steps; each is listened to."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you use."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True, tooltip="The CFG you use."),
                io.Float.Input("budget_mib", default=0.0, min=0.0, max=1e6, step=16.0, round=0.1, optional=True,
                               tooltip="Memory for all weights of the model. 0 gives every layer that is not sensitive 8 bits."),
                io.Combo.Input("smallest", options=list(SMALLEST), default="int8 and fp8", optional=True,
                               tooltip="Formats that the plan may use. nvfp4 takes 4.5 bits; GPUs before Blackwell unpack it for each product, which is slow."),
                io.Combo.Input("score", options=list(SCORES), default="output error", optional=True, advanced=True,
                               tooltip="What the budget is spent on: layers with the largest error, those with large activations (LRQ-DiT), or those in blocks "
                                       "that change their stream most (6Bit-Diffusion)."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, optional=True, tooltip="Of the run's noise."),
                io.String.Input("name", default="plan", optional=True,
                                tooltip="The plan's name, for Quantized Model Loader. An older one of that name is replaced."),
            ],
            outputs=[
                io.String.Output("plan", tooltip="The plan's name."),
                io.String.Output("text", tooltip="Errors of the formats, what the plan comes to, and the layers that mind most."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, sampler, sigmas, latent_image, cfg: float = 1.0, budget_mib: float = 0.0, smallest: str = "int8 and fp8",
                score: str = "output error", seed: int = 0, name: str = "plan") -> io.NodeOutput:
        check_choices(cls, smallest=smallest, score=score)
        check_numbers(cls, cfg=cfg, budget_mib=budget_mib, seed=seed)
        path = folders.new_plan(name)

        def bar(total: int):
            progress = ProgressBar(total)
            return lambda: progress.update(1)

        found = measure(model, positive, negative, sampler, sigmas, latent_image, cfg, seed, SMALLEST[smallest], score, bar)
        plan = found.plan(budget_mib)
        write_plan(path, plan, score=score, budget_mib=budget_mib, errors={layer.name: dict(layer.errors) for layer in found.layers})
        text = found.text(plan)
        show(text.splitlines()[-min(len(found.layers), 12) - 2], getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(name, text)


NODES = [QuantizationReport]
