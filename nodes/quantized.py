"""Load a model in any format that is read here, and save one in ComfyUI's own."""
from ..core.quant import folders
from ..core.quant.formats import known_formats
from ..core.quant.loader import load
from ..core.quant.plan import COMPUTE, DEVICES, Settings, patterns, read_plan
from ..core.quant.save import save
from ._api import io
from .notify import show, text_notifier

CATEGORY = "reprise/quantized"
NO_PLAN = "none"


class QuantizedModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_QuantizedModelLoader",
            display_name="Quantized Model Loader",
            category=CATEGORY,
            description="Loads a diffusion model in any format (bf16, fp16, fp8, int8, nvfp4, mxfp8, GGUF, SVDQuant) as an ordinary MODEL, and turns it into "
                        "what the GPU computes fastest. Layers that are sensitive keep their precision.",
            search_aliases=["gguf", "nunchaku", "svdquant", "int8", "fp8", "unet loader", "load diffusion model"],
            inputs=[
                io.Combo.Input("model_name", options=folders.model_files(), tooltip="A file of models/diffusion_models: .safetensors or .gguf."),
                io.Combo.Input("format", options=["auto", *known_formats()], default="auto", optional=True, advanced=True,
                               tooltip="The format that the file must have. auto takes what is there."),
                io.Combo.Input("compute", options=list(COMPUTE), default="auto", optional=True,
                               tooltip="auto: int8 where the GPU multiplies int8 fast, else as the file has it. int8: 8 bits for weights and activations, "
                                       "rotated. fp8: a scale for each layer. bf16: full precision. host: as ComfyUI loads it. GGUF's blocks stay packed."),
                io.String.Input("exclude", default="", optional=True, advanced=True,
                                tooltip="Layers that stay as the file has them, as patterns: double_blocks.0.*, *txt_mlp*"),
                io.Combo.Input("device", options=list(DEVICES), default="default", optional=True, advanced=True,
                               tooltip="default: the GPU, as ComfyUI decides. cpu: keep the model off the GPU."),
                io.Combo.Input("plan", options=[NO_PLAN, *folders.plans()], default=NO_PLAN, optional=True, advanced=True,
                               tooltip="A plan that Quantization Report saved: which layer is stored how. It stands above compute and exclude."),
            ],
            outputs=[io.Model.Output("model", tooltip="An ordinary model: LoRA, saving and low VRAM are ComfyUI's own.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name=None, plan=NO_PLAN, **others) -> str:
        """The host loads again when the file or the plan is another one."""
        return f"{folders.stamp(model_name)} {folders.plan_stamp(plan)}" if isinstance(model_name, str) else ""

    @classmethod
    def execute(
        cls, model_name: str, format: str = "auto", compute: str = "auto", exclude: str = "", device: str = "default", plan: str = NO_PLAN,
    ) -> io.NodeOutput:
        layers = {} if plan == NO_PLAN else read_plan(folders.plan_path(plan))
        settings = Settings(compute=compute, exclude=patterns(exclude), format=format, device=device, layers=layers)
        return io.NodeOutput(load(folders.model_path(model_name), settings, report=text_notifier(getattr(cls.hidden, "unique_id", None))))


class SaveQuantizedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_SaveQuantizedModel",
            display_name="Save Quantized Model",
            category=CATEGORY,
            description="Writes a model with its LoRAs in ComfyUI's own formats, so that Load Diffusion Model opens it without Reprise. "
                        "Layers of GGUF and SVDQuant become int8, and the file says which they were.",
            search_aliases=["save model", "export int8", "convert gguf"],
            inputs=[
                io.Model.Input("model", tooltip="Any model, quantized or not."),
                io.String.Input("filename_prefix", default="diffusion_models/reprise", optional=True, tooltip="Folder and name below ComfyUI's output folder."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix: str = "diffusion_models/reprise") -> io.NodeOutput:
        path = folders.output_path(filename_prefix)
        turned = save(model, path)
        more = f", {len(turned)} packed layers as int8" if turned else ""
        show(f"{path.name}: {path.stat().st_size / 2**30:.2f} GiB{more}", getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput()


NODES = [QuantizedModelLoader, SaveQuantizedModel]
