"""Reference Latent Cache: the references of edit models, out of the sequence after a few steps or from the first one on."""
from ..core.reference.latents import MODES, STORAGE, Settings, attach_reference_latents
from ._api import io
from .notify import text_notifier
from .numbers import check_numbers


class ReferenceLatentCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_ReferenceLatentCache",
            display_name="Reference Latent Cache",
            category="reprise/references",
            description="Takes the reference latents of edit models out of the sequence and keeps their keys and values: FLUX.1 Kontext, FLUX.2, "
                        "Qwen-Image-Edit, Krea 2, Z-Image Omni. 'freeze' is approximate and can measure its error. 'exact' is exact for FLUX.2 "
                        "checkpoints that were trained for it, FLUX.2-klein-9b-KV, and makes another picture with any other.",
            search_aliases=["kv cache", "flux kv cache", "kontext", "klein", "qwen image edit", "omni", "reference latent", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="The edit model to sample with. Its references come from Set Reference Latent on the conditioning, as ever."),
                io.Combo.Input(
                    "mode", options=list(MODES), default="off", optional=True,
                    tooltip="off changes nothing. exact: references see one another alone, at t = 0, and are encoded once; only for checkpoints that were "
                            "trained so, which nothing in a file tells: you decide. freeze: the first evaluations in full, then the references stay as "
                            "they were; approximate, for every edit model named above."),
                io.Int.Input("full_evaluations", default=2, min=1, max=1000, optional=True,
                             tooltip="freeze: so many evaluations have the references in the sequence, as without the node. More is closer and slower."),
                io.Int.Input("refresh_every", default=0, min=0, max=1000, optional=True,
                             tooltip="freeze: after so many evaluations one is computed in full again, and the error measured there. "
                                         "0 is never, 1 freezes nothing."),
                io.Boolean.Input("measure", default=False, optional=True,
                                 tooltip="freeze: compute the first frozen evaluation in full too, to tell the error on the node. The picture stays the same."),
                io.Combo.Input("storage", options=list(STORAGE), default="same", optional=True, advanced=True,
                               tooltip="freeze: how keys and values are kept: as they came, or in 8 bits, which is half the memory and more approximate."),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache on it.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, mode: str = "off", full_evaluations: int = 2, refresh_every: int = 0, measure: bool = False,
                storage: str = "same") -> io.NodeOutput:
        check_numbers(cls, full_evaluations=full_evaluations, refresh_every=refresh_every)
        settings = Settings(mode, full_evaluations, refresh_every, measure, storage)
        if mode == "off":
            return io.NodeOutput(model)
        return io.NodeOutput(attach_reference_latents(model, settings, text_notifier(getattr(cls.hidden, "unique_id", None))))


NODES = [ReferenceLatentCache]
