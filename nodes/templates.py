"""Diffusion Templates for FLUX.2 klein: load one, and make a reference of numbers or of a picture with it."""
from ..core.knob import shown
from ..core.reference.inputs import image_of, samples_of
from ..core.reference.templates import template_of
from ..core.reference.templates.folder import find, names, stamp
from ..core.reference.templates.image import WEIGHTS
from ..core.reference.templates.merge import referred
from ..core.reference.told import mib
from ._api import ProgressBar, io
from .notify import show
from .numbers import check_numbers

TEMPLATE = io.Custom("REPRISE_TEMPLATE")
REFERENCE = io.Custom("REPRISE_REFERENCE")
CATEGORY = "reprise/references"
NEGATIVES = ("own value", "none")
NODES_OF = {"scalar": "Template (scalar)", "constant": "Template (scalar)", "image": "Template (image)", "LoRA": "Template (LoRA)", "text": "Template (text)"}


def for_node(template, node: str):
    """The template, where this is the node for its kind."""
    if NODES_OF[template.name] != node:
        raise ValueError(f"{template.file.name} is a template of the kind '{template.name}' and came into {node}; connect it to {NODES_OF[template.name]}")
    return template


def in_use() -> list:
    """The inputs that every reference made of a template has."""
    return [
        io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.05, round=0.001, optional=True,
                       tooltip="The attention that the template's tokens get is multiplied by this. 1 is as trained, 0 is none."),
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                       tooltip="The template acts from this share of the schedule on."),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                       tooltip="The template acts up to this share of the schedule."),
        REFERENCE.Input("reference", optional=True, tooltip="References that act beside this one, for example another template."),
    ]


class TemplateLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_TemplateLoader",
            display_name="Template Loader",
            category=CATEGORY,
            description="Loads a Diffusion Template for FLUX.2 klein from models/templates. Its kind is told by its weights; the model.py that comes with it "
                        "is never run.",
            search_aliases=["diffusion templates", "diffsynth", "brightness", "sharpness", "softrgb", "age", "pandameme", "controlnet", "klein"],
            inputs=[
                io.Combo.Input("name", options=names(), tooltip="The template's model.safetensors, in a folder of its own name under models/templates."),
                io.Combo.Input("weight_dtype", options=list(WEIGHTS), default="default", optional=True, advanced=True,
                               tooltip="How the weights of an image template are kept, as in Load Diffusion Model. Others are small and stay as they are."),
            ],
            outputs=[TEMPLATE.Output("template", tooltip="For the Template node of its kind.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name=None, **others) -> str:
        """The host loads the template again when its file is another one."""
        return stamp(name) if isinstance(name, str) else ""

    @classmethod
    def execute(cls, name: str, weight_dtype: str = "default") -> io.NodeOutput:
        if weight_dtype not in WEIGHTS:
            raise ValueError(f"weight_dtype is '{shown(weight_dtype)}'; choose one of {', '.join(WEIGHTS)}")
        template = template_of(find(name), weights=weight_dtype)
        show(f"{template.name}: goes to {NODES_OF[template.name]}", getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(template)


class TemplateScalar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def value(name: str, default: float, tooltip: str, **more):
            return io.Float.Input(name, default=default, min=-1000.0, max=1000.0, step=0.01, round=0.0001, optional=True, tooltip=tooltip, **more)

        return io.Schema(
            node_id="Reprise_TemplateScalar",
            display_name="Template (scalar)",
            category=CATEGORY,
            description="Makes a reference of a template of numbers (Brightness, Sharpness, Age, SoftRGB) or of a constant one (PandaMeme), which takes none. "
                        "Exact: the keys and values are the template's own, made once for any number of pictures.",
            search_aliases=["diffusion templates", "brightness", "sharpness", "softrgb", "age", "pandameme"],
            inputs=[
                TEMPLATE.Input("template", tooltip="From Template Loader: scalar or constant."),
                value("value", 0.5, "What the template is to show: 0 to 1 for Brightness and Sharpness, 0.5 neutral; years for Age; red for SoftRGB."),
                value("value_2", 0.5, "The second of several values: green for SoftRGB. Others do not use it."),
                value("value_3", 0.5, "The third of several values: blue for SoftRGB. Others do not use it."),
                io.Combo.Input("negative", options=list(NEGATIVES), default=NEGATIVES[0], optional=True,
                               tooltip="What the negative prompt gets: the template with values of its own, which guidance then steers away from, or nothing."),
                value("negative_value", 0.5, "The negative prompt's value: 0.5 for Brightness and Sharpness, 45 for Age. Does nothing at cfg 1."),
                value("negative_value_2", 0.5, "The negative prompt's second value.", advanced=True),
                value("negative_value_3", 0.5, "The negative prompt's third value.", advanced=True),
                *in_use(),
            ],
            outputs=[REFERENCE.Output("reference", tooltip="For Apply Reference Cache, or for the next Template node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, template, value: float = 0.5, value_2: float = 0.5, value_3: float = 0.5, negative: str = NEGATIVES[0], negative_value: float = 0.5,
                negative_value_2: float = 0.5, negative_value_3: float = 0.5, weight: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0,
                reference=None) -> io.NodeOutput:
        check_numbers(cls, value=value, value_2=value_2, value_3=value_3, negative_value=negative_value, negative_value_2=negative_value_2,
                      negative_value_3=negative_value_3, weight=weight, start_percent=start_percent, end_percent=end_percent)
        many = for_node(template, "Template (scalar)").values
        entry = template.entry((value, value_2, value_3)[:many])
        null = template.entry((negative_value, negative_value_2, negative_value_3)[:many]) if negative == NEGATIVES[0] else None
        told(cls, entry)
        return io.NodeOutput(referred(entry, null, weight, start_percent, end_percent, reference))


class TemplateImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_TemplateImage",
            display_name="Template (image)",
            category=CATEGORY,
            description="Makes a reference of pictures and a prompt with an image template (ControlNet, Edit, Upscaler, Inpaint), which runs once, here. "
                        "Exact, and the same pictures and prompts are not run again. A picture of 1024 x 1024 takes 1350 MiB of host memory for each prompt.",
            search_aliases=["diffusion templates", "controlnet", "edit", "upscaler", "inpaint"],
            inputs=[
                TEMPLATE.Input("template", tooltip="From Template Loader: image."),
                io.Conditioning.Input("positive", tooltip="The prompt, which the template reads beside the pictures. Of it the text alone is used."),
                io.Image.Input("image", optional=True, tooltip="The picture, in the size that is to be generated; several of a batch are several references."),
                io.Vae.Input("vae", optional=True, tooltip="FLUX.2's VAE, which encodes the image."),
                io.Latent.Input("latent", optional=True, tooltip="Pictures that are encoded already. They come before those of the image input."),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt, for which the template runs once more; without it the negative "
                                                                         "side samples without the template."),
                *in_use(),
            ],
            outputs=[REFERENCE.Output("reference", tooltip="For Apply Reference Cache, or for the next Template node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, template, positive, image=None, vae=None, latent=None, negative=None, weight: float = 1.0, start_percent: float = 0.0,
                end_percent: float = 1.0, reference=None) -> io.NodeOutput:
        check_numbers(cls, weight=weight, start_percent=start_percent, end_percent=end_percent)
        for_node(template, "Template (image)")
        latents = pictures(image, vae, latent)
        prompts = [prompt(conditioning) for conditioning in (positive, negative) if conditioning is not None]
        bar, unique_id = ProgressBar(len(prompts) * sum(template.depth)), getattr(cls.hidden, "unique_id", None)
        made = [template.entry(text, latents, tell=lambda size: show(f"{mib(size)} for each prompt", unique_id), tick=lambda: bar.update(1))
                for text in prompts]
        told(cls, made[0])
        return io.NodeOutput(referred(made[0], made[1] if len(made) > 1 else None, weight, start_percent, end_percent, reference))


def pictures(image, vae, latent) -> list:
    """Each picture's latent, [1, C, h, w]."""
    found = [] if latent is None else list(samples_of(latent).split(1))
    if image is not None:
        if vae is None:
            raise ValueError("an image came and no VAE to encode it; connect FLUX.2's VAE, or encode the picture and connect the latent")
        found += list(vae.encode(image_of(image)).split(1))
    return found


def prompt(conditioning):
    """The text of a CONDITIONING of one prompt, [1, N, C]."""
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise ValueError(f"an image template reads one prompt and {max(len(conditioning), len(conditioning[0][0]))} came; "
                         "connect one that is not combined or a batch")
    return conditioning[0][0]


def told(node, entry) -> None:
    show(f"{entry.tokens} tokens, {mib(entry.bytes)}", getattr(node.hidden, "unique_id", None))


NODES = [TemplateLoader, TemplateScalar, TemplateImage]
