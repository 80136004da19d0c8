"""EasyControl: condition images for FLUX.1-dev, encoded once."""
from ..core.knob import shown
from ..core.reference.easycontrol import KINDS, EasyControl, prepared, read_adapter
from ..core.reference.folders import model_files, model_path, model_stamp
from ..core.reference.handle import Handle, Reference
from ..core.reference.inputs import samples_of
from ..core.reference.weights import read_weights
from ._api import io
from .numbers import check_numbers
from .references import REFERENCE

ADAPTER = io.Custom("REPRISE_EASYCONTROL")
FOLDER = "loras"
PADDINGS = {"gray": 0.5, "black": 0.0, "white": 1.0}


class EasyControlLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_EasyControlLoader",
            display_name="EasyControl Loader",
            category="reprise/references",
            description="Reads an EasyControl adapter for FLUX.1-dev, such as canny, depth, pose, subject or Ghibli, from the folder of LoRAs. "
                        "It goes to EasyControl Condition; the model's own LoRA loader cannot use it.",
            search_aliases=["easycontrol", "controlnet", "condition lora"],
            inputs=[io.Combo.Input("file", options=model_files(FOLDER), tooltip="An EasyControl file as published, .safetensors, in models/loras.")],
            outputs=[ADAPTER.Output("adapter", tooltip="For EasyControl Condition.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file=None, **others) -> str:
        """The host reads the adapter again when its file is another one."""
        return model_stamp(FOLDER, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        weights = read_weights(model_path(FOLDER, file), "an EasyControl adapter")
        return io.NodeOutput(read_adapter(weights.tensors, weights.digest, weights.name))


class EasyControlCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_EasyControlCondition",
            display_name="EasyControl Condition",
            category="reprise/references",
            description="A condition image for an EasyControl adapter. It is encoded once, in the first step, and its tokens pass through no layer after that. "
                        "Exact: the picture is the one that carrying the condition through every step gives.",
            search_aliases=["easycontrol", "canny", "depth", "pose", "subject", "reference"],
            inputs=[
                ADAPTER.Input("adapter", tooltip="From EasyControl Loader."),
                io.Image.Input("image", optional=True, tooltip="The condition: edges, depth, pose, or the subject. Needs the VAE. Of a batch, the first."),
                io.Vae.Input("vae", optional=True, tooltip="FLUX's VAE, to encode the image with."),
                io.Latent.Input("latent", optional=True, tooltip="An encoded condition, in the place of image and VAE."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[0], optional=True,
                               tooltip="spatial lies over the whole picture, squashed to a square; subject stands beside it, fitted and padded."),
                io.Int.Input("size", default=512, min=64, max=1024, step=16, optional=True,
                             tooltip="Pixels a side that the image is encoded at. 512 is as trained; memory grows with the square."),
                io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, optional=True,
                               tooltip="Of the adapter's LoRA. 1 is as trained; another value encodes anew."),
                io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.05, optional=True,
                               tooltip="How much attention the condition gets, beside what it would get: 1 is as trained, 0 is none. Encodes nothing anew."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Acts from this share of the schedule on."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Acts up to this share of the schedule."),
                io.Int.Input("slot", default=0, min=0, max=15, optional=True, advanced=True,
                             tooltip="Which of the adapter's LoRAs, for files trained with several conditions at once. The published ones have slot 0."),
                io.Combo.Input("padding", options=list(PADDINGS), default="gray", optional=True, advanced=True,
                               tooltip="What a subject that is no square is padded with."),
                REFERENCE.Input("reference", optional=True, tooltip="References that this one is added to."),
            ],
            outputs=[REFERENCE.Output("reference", tooltip="For Apply Reference Cache.")],
        )

    @classmethod
    def execute(cls, adapter, image=None, vae=None, latent=None, kind: str = KINDS[0], size: int = 512, strength: float = 1.0, weight: float = 1.0,
                start_percent: float = 0.0, end_percent: float = 1.0, slot: int = 0, padding: str = "gray", reference=None) -> io.NodeOutput:
        check_numbers(cls, size=size, strength=strength, weight=weight, start_percent=start_percent, end_percent=end_percent, slot=slot)
        if padding not in PADDINGS:
            raise ValueError(f"padding is '{shown(padding)}'; choose one of {', '.join(PADDINGS)}")
        if (latent is None) == (image is None):
            raise ValueError(f"{'neither image nor' if image is None else 'both image and'} latent came; connect one of them")
        if latent is None and vae is None:
            raise ValueError("an image came without a VAE; connect FLUX's VAE, or a latent in the place of the image")
        samples = vae.encode(prepared(image, kind, size, PADDINGS[padding])) if latent is None else samples_of(latent)
        condition = EasyControl(adapter, samples[:1], kind, strength, slot)
        return io.NodeOutput((reference or Handle()) + Handle((Reference(condition, weight, start_percent, end_percent),)))


NODES = [EasyControlLoader, EasyControlCondition]
