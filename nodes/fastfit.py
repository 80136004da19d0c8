"""FastFit: virtual try-on with several garments, each encoded once."""
import torch

from ..core.reference.fastfit import CLASSES, FastFitReference
from ..core.reference.fastfit_checkpoint import WEIGHTS, load_fastfit
from ..core.reference.folders import model_files, model_path, model_stamp
from ..core.reference.handle import Handle, Reference
from ..core.reference.tryon import encoded, framed, pasted, shown
from ._api import io
from .numbers import check_numbers

CATEGORY = "reprise/references"
REFERENCE = io.Custom("REPRISE_REFERENCE")
LICENCE = ("FastFit's weights and the authors' code are licensed for non-commercial use only. "
           "This is an independent implementation, written from the paper's description; it contains none of their code.")
TEXT_WIDTH = 768
FOLDER = "diffusion_models"


class FastFitLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_FastFitLoader",
            display_name="FastFit Loader",
            category=CATEGORY,
            description=f"Loads a FastFit UNet for virtual try-on with several garments. {LICENCE}",
            search_aliases=["virtual try-on", "vton", "catvton", "garment", "outfit", "load fastfit"],
            inputs=[
                io.Combo.Input("unet_name", options=model_files(FOLDER),
                               tooltip="unet/diffusion_pytorch_model.safetensors of FastFit-MR-1024 or FastFit-SR-1024, in models/diffusion_models "
                                       "under any name. Its VAE is that of SD 1.5."),
                io.Combo.Input("weight_dtype", options=list(WEIGHTS), default="default", optional=True, advanced=True,
                               tooltip="How the weights are kept: default is what suits this GPU, the others halve their memory."),
            ],
            outputs=[io.Model.Output(tooltip="A model for KSampler. Garments reach it through Apply Reference Cache.")],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name=None, **others) -> str:
        """The host loads the model again when its file is another one."""
        return model_stamp(FOLDER, unet_name)

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(load_fastfit(model_path(FOLDER, unet_name), weight_dtype))


class FastFitPerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_FastFitPerson",
            display_name="FastFit Person",
            category=CATEGORY,
            description="Shows a FastFit model whom to dress, and where. There is no prompt: the garments go to Apply Reference Cache.",
            search_aliases=["virtual try-on", "person", "inpaint"],
            inputs=[
                io.Image.Input("image", tooltip="The person. FastFit was trained at 768 x 1024; crop and scale to that for the best result."),
                io.Mask.Input("mask", tooltip="What is painted anew: the clothes that change, and some room around them."),
                io.Vae.Input("vae", tooltip="The VAE of SD 1.5, which FastFit uses."),
                io.Image.Input("pose", optional=True, tooltip="The person's skeleton on black, as DWPose draws it. It is shown inside of the mask. "
                                                              "Without one the mask is filled with grey, as for a skeleton that was not found."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For Apply Reference Cache, which adds the garments."),
                io.Conditioning.Output(display_name="negative", tooltip="For Apply Reference Cache, which adds null garments."),
                io.Latent.Output(display_name="latent", tooltip="Empty, of the person's size. Sample it whole, at denoise 1."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, vae, pose=None) -> io.NodeOutput:
        picture, inside = shown(image, mask, pose)
        latent = encoded(vae, picture)
        said = {"concat_latent_image": latent, "concat_mask": inside}
        positive, negative = ([[torch.zeros(1, 1, TEXT_WIDTH), dict(said)]] for _ in range(2))
        return io.NodeOutput(positive, negative, {"samples": torch.zeros_like(latent)})


class FastFitGarment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_FastFitReference",
            display_name="FastFit Reference",
            category=CATEGORY,
            description="A garment for FastFit, encoded once and used on every step, for every person, size and seed. Exact: the result is that of encoding "
                        "it anew. Chain several of these for an outfit; their order does not matter.",
            search_aliases=["virtual try-on", "garment", "clothes", "outfit", "reference"],
            inputs=[
                io.Image.Input("image", tooltip="The garment, best on a plain background. Several images of a batch are several references of the same class."),
                io.Combo.Input("garment", options=list(CLASSES), default=CLASSES[0],
                               tooltip="What it is: overall is a dress or a suit, and goes with neither upper nor lower: Apply Reference Cache says so."),
                io.Vae.Input("vae", tooltip="The VAE of SD 1.5, which FastFit uses."),
                io.Int.Input("height", default=512, min=0, max=2048, step=64, optional=True,
                             tooltip="The image is fitted into 3 x 4 of this height, on white. FastFit knows 512, 768 and 1024, and 512 for shoes and bags. "
                                     "The cache grows with its square: 33 MiB at 512 and 132 MiB at 1024, twice that with guidance. 0 leaves it as it is."),
                io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.05, optional=True,
                               tooltip="Multiplies the attention that the garment gets. 1 is as trained, 0 leaves it out."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="The garment is seen from this share of the schedule on."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="The garment is seen up to this share of the schedule."),
                REFERENCE.Input("previous", optional=True, tooltip="The other references of the outfit."),
            ],
            outputs=[REFERENCE.Output(display_name="reference", tooltip="For Apply Reference Cache, or for the next reference of the outfit.")],
        )

    @classmethod
    def execute(cls, image, garment: str, vae, height: int = 512, weight: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0,
                previous: Handle | None = None) -> io.NodeOutput:
        check_numbers(cls, height=height, weight=weight, start_percent=start_percent, end_percent=end_percent)
        latents = encoded(vae, framed(image, height))
        return io.NodeOutput((previous or Handle()) + Handle(tuple(
            Reference(FastFitReference(latent[None], garment), weight, start_percent, end_percent) for latent in latents)))


class FastFitPasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_FastFitPasteBack",
            display_name="FastFit Paste Back",
            category=CATEGORY,
            description="Puts the sampled picture back into the original one, inside of the mask. Outside of it and of the feathered edge "
                        "the original stays as it was, pixel for pixel.",
            search_aliases=["virtual try-on", "composite", "feather", "inpaint paste"],
            inputs=[
                io.Image.Input("result", tooltip="The decoded picture. One of another size is scaled to that of the person."),
                io.Image.Input("image", tooltip="The person, as FastFit Person got it."),
                io.Mask.Input("mask", tooltip="The mask, as FastFit Person got it."),
                io.Int.Input("feather", default=8, min=0, max=256, optional=True,
                             tooltip="The edge becomes a ramp of so many pixels to either side. 0 is the hard edge of the authors' own pipeline."),
            ],
            outputs=[io.Image.Output(tooltip="The person in the new clothes.")],
        )

    @classmethod
    def execute(cls, result, image, mask, feather: int = 8) -> io.NodeOutput:
        check_numbers(cls, feather=feather)
        return io.NodeOutput(pasted(result, image, mask, feather))


NODES = [FastFitLoader, FastFitPerson, FastFitGarment, FastFitPasteBack]
