"""Text encoders from GGUF files."""
from ..core.quant import folders
from ..core.quant.text_encoder import TYPES, line, load
from ._api import io
from .choice import check_choices
from .notify import show

KIND = "text_encoders"
NONE = "none"
DEVICES = ("default", "cpu")


class GGUFTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folders.model_files(KIND)
        return io.Schema(
            node_id="Reprise_GGUFTextEncoderLoader",
            display_name="GGUF Text Encoder Loader",
            category="reprise/quantized",
            description="Loads T5 or Qwen from a GGUF file as an ordinary CLIP. Its layers stay packed in memory and give what the unpacked ones give.",
            search_aliases=["gguf", "clip loader", "dual clip", "t5", "qwen", "text encoder"],
            inputs=[
                io.Combo.Input("text_encoder", options=files, tooltip="A GGUF file of models/text_encoders: T5 (FLUX.1, SD3.5, Chroma) or "
                               "Qwen (Z-Image, FLUX.2 klein, Qwen-Image)."),
                io.Combo.Input("type", options=list(TYPES), default="flux", tooltip="The model that the text is for, as in Load CLIP. Z-Image takes lumina2."),
                io.Combo.Input("second", options=[NONE, *files], default=NONE, optional=True,
                               tooltip="The encoder beside it where a model has two, such as clip_l for FLUX.1. Safetensors or GGUF."),
                io.Combo.Input("device", options=list(DEVICES), default="default", optional=True, advanced=True,
                               tooltip="default: as ComfyUI decides. cpu: keep the text encoder off the GPU."),
            ],
            outputs=[io.Clip.Output("clip", tooltip="An ordinary CLIP, for CLIP Text Encode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder=None, second=NONE, **others) -> str:
        """The host loads again when a file is another one."""
        return " ".join(folders.stamp(name, KIND) for name in (text_encoder, second) if isinstance(name, str) and name != NONE)

    @classmethod
    def execute(cls, text_encoder: str, type: str, second: str = NONE, device: str = "default") -> io.NodeOutput:
        check_choices(cls, type=type, device=device)
        paths = [folders.model_path(name, KIND) for name in (text_encoder, second) if name != NONE]
        clip = load([str(path) for path in paths], type, device, folders.embeddings())
        show(line(clip, paths), getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(clip)


NODES = [GGUFTextEncoderLoader]
