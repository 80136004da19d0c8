"""References on a sampling: put on model and conditioning, combined, saved, loaded, looked at and forgotten."""
from ..core.reference.files import names, no_name, read, stamp, write
from ..core.reference.folders import references_folder
from ..core.reference.handle import Handle, Reference, handle_in, unfit, with_references
from ..core.reference.injector import BANK, attach_references
from ..core.reference.inspect import described, stored
from ..core.reference.run import PLACES, STORAGE, Keeping
from ..core.reference.told import MIB, many, mib
from ._api import io
from .notify import show, text_notifier
from .numbers import check_numbers

REFERENCE = io.Custom("REPRISE_REFERENCE")
NONE_SAVED = "none saved yet"
ANY = "*"


class ApplyReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_ApplyReferenceCache",
            display_name="Apply Reference Cache",
            category="reprise/references",
            description="Puts references on a sampling: EasyControl conditions, FastFit garments, Diffusion Templates, saved references. Each is encoded once, "
                        "in the first step that needs it, and injected on every step. Sample with the model and both conditionings that come out.",
            search_aliases=["reference", "kv cache", "easycontrol", "fastfit", "template"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, LoRAs included."),
                io.Conditioning.Input("positive", tooltip="Gets the reference."),
                io.Conditioning.Input("negative", tooltip="Gets its other side: the negative reference, or what the system was trained with."),
                REFERENCE.Input("reference", tooltip="From EasyControl Condition, FastFit Reference, a Template node, Load or Combine Reference Cache."),
                REFERENCE.Input("negative_reference", optional=True,
                                tooltip="For the negative alone. Left out, EasyControl and saved references act on both sides, FastFit has its empty garment "
                                        "there, and a template acts on the positive side alone unless it was given a negative value."),
                io.Boolean.Input("keep", default=True, optional=True,
                                 tooltip="Entries stay in host memory for the next run, whatever its seed or sampler. Off forgets them when the run ends, "
                                         "and what earlier runs left of the same references."),
                io.Combo.Input("place", options=list(PLACES), default=PLACES[0], optional=True, advanced=True,
                               tooltip="Where entries are during a run: on the GPU, streamed to it a block ahead, or by size."),
                io.Combo.Input("storage", options=list(STORAGE), default=STORAGE[0], optional=True, advanced=True,
                               tooltip="How keys and values are kept: as they came, which is exact, or in 8 bits, which is approximate: how far off they are "
                                       "is told under the node."),
                io.Int.Input("limit_mib", default=8192, min=0, max=1 << 20, optional=True, advanced=True,
                             tooltip="Most host memory for all kept entries of all workflows, in MiB; that of the run that began last holds. "
                                     "The least recently used leave first."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model that can read the references."),
                io.Conditioning.Output("positive", tooltip="With the reference."),
                io.Conditioning.Output("negative", tooltip="With its other side."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, reference, negative_reference=None, keep: bool = True, place: str = PLACES[0],
                storage: str = STORAGE[0], limit_mib: int = 8192) -> io.NodeOutput:
        check_numbers(cls, limit_mib=limit_mib)
        network = model.model.diffusion_model
        reference = handle_in(reference, "reference")
        other = reference.other_side() if negative_reference is None else handle_in(negative_reference, "negative_reference")
        for one in (*reference.references, *other.references):
            if why := unfit(one.recipe, network):
                raise ValueError(why)
        attached = attach_references(model, Keeping(place, keep, storage, limit_mib * MIB), text_notifier(getattr(cls.hidden, "unique_id", None)))
        return io.NodeOutput(attached, with_references(positive, reference), with_references(negative, other))


class CombineReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_CombineReferenceCache",
            display_name="Combine Reference Cache",
            category="reprise/references",
            description="Several references as one: conditions of several adapters, a whole outfit, several templates.",
            inputs=[REFERENCE.Input("first", tooltip="References."), REFERENCE.Input("second", tooltip="Further references.")],
            outputs=[REFERENCE.Output("reference", tooltip="All of them.")],
        )

    @classmethod
    def execute(cls, first, second) -> io.NodeOutput:
        return io.NodeOutput(handle_in(first, "first") + handle_in(second, "second"))


class SaveReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_SaveReferenceCache",
            display_name="Save Reference Cache",
            category="reprise/references",
            description="Writes what a reference was encoded to into a file, by name, for Load Reference Cache: a library of garments, or a template to share.",
            inputs=[
                io.Model.Input("model", tooltip="The model that came out of Apply Reference Cache and went into the sampler."),
                REFERENCE.Input("reference", tooltip="The reference that went into Apply Reference Cache."),
                io.AnyType.Input("trigger", tooltip="What the sampler made. References are encoded while it samples, so this waits for it."),
                io.String.Input("name", default="reference", optional=True, tooltip="The file's name. An older one of that name is replaced."),
            ],
            outputs=[io.AnyType.Output("name", tooltip="For Load Reference Cache.")],      # a text may not be linked to a menu
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, reference, trigger, name: str = "reference") -> io.NodeOutput:
        if fault := no_name(name):
            raise ValueError(f"name is '{str(name)[:100]}'; {fault}")
        found = stored(model, handle_in(reference, "reference"))
        if len(found) < len(reference.references):
            raise ValueError("nothing of a reference is kept; sample with the model first, with 'keep' on, and connect what the sampler made to 'trigger'")
        seams = {one.seam for one in found}
        if len(seams) > 1:
            raise ValueError(f"references for {len(seams)} kinds of model came; save those of each model by themselves")
        path = write(references_folder(), name, found)
        entries = [entry for one in found for entry in (*one.entries, *one.nulls)]
        size = mib(sum(entry.bytes for entry in entries))
        told = f"{many(len(found), 'reference', 'references')}, {many(len(entries), 'entry', 'entries')}, {size}, in {path.name}"
        show(told, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(name)


class LoadReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_LoadReferenceCache",
            display_name="Load Reference Cache",
            category="reprise/references",
            description="Reads a reference that Save Reference Cache wrote. It is used with the model, and where that matters the prompt and size, that "
                        "it was made for, and refused with the field that differs otherwise.",
            inputs=[
                io.Combo.Input("name", options=names(references_folder()) or [NONE_SAVED], tooltip="A saved reference."),
                io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.05, optional=True,
                               tooltip="How much attention it gets: 1 is as trained, 0 is none."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Acts from this share of the schedule on."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Acts up to this share of the schedule."),
                REFERENCE.Input("reference", optional=True, tooltip="References that this one is added to."),
            ],
            outputs=[REFERENCE.Output("reference", tooltip="For Apply Reference Cache.")],
        )

    @classmethod
    def validate_inputs(cls, name=None, input_types=None) -> bool | str:
        """The name may be of a file that is saved in the same prompt, and come from a text; `read` says what is wrong with it.

        Where a node looks at the types of its links the host does not, so the others are looked at too.
        """
        kinds = {entry.id: {entry.get_io_type(), ANY} for entry in cls.define_schema().inputs}
        kinds["name"].add(io.String.io_type)
        for linked, came in (input_types or {}).items():
            if linked in kinds and not kinds[linked] & set(str(came).split(",")):
                return f"{linked} is linked to a {came}; link it to a {' or '.join(sorted(kinds[linked] - {ANY}))}"
        return True

    @classmethod
    def fingerprint_inputs(cls, name=None, **others) -> str:
        return stamp(references_folder(), name) if isinstance(name, str) else ""

    @classmethod
    def execute(cls, name: str, weight: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0, reference=None) -> io.NodeOutput:
        check_numbers(cls, weight=weight, start_percent=start_percent, end_percent=end_percent)
        if name == NONE_SAVED and not names(references_folder()):
            raise ValueError("no reference is saved yet; save one with Save Reference Cache first")
        loaded = Handle(tuple(Reference(one, weight, start_percent, end_percent) for one in read(references_folder(), name)))
        return io.NodeOutput((reference or Handle()) + loaded)


class InspectReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_InspectReferenceCache",
            display_name="Inspect Reference Cache",
            category="reprise/references",
            description="What references come to: size, what they hang on, whether they are exact, where they are and how often they were used.",
            inputs=[
                io.Model.Input("model", tooltip="The model that came out of Apply Reference Cache."),
                REFERENCE.Input("reference", tooltip="The reference that went into it."),
                io.AnyType.Input("trigger", optional=True, tooltip="What the sampler made, to look after the run."),
            ],
            outputs=[io.String.Output("text", tooltip="The same in words.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, reference, trigger=None) -> io.NodeOutput:
        text = described(model, handle_in(reference, "reference"))
        show(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(text)


class ClearReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_ClearReferenceCache",
            display_name="Clear Reference Cache",
            category="reprise/references",
            description="Forgets every kept entry and gives the memory back. Saved files stay.",
            inputs=[io.AnyType.Input("trigger", optional=True, tooltip="Clears when this is there.")],
            outputs=[io.Float.Output("mib", tooltip="MiB that were given back.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, trigger=None) -> io.NodeOutput:
        freed = BANK.clear()
        show(f"{mib(freed)} given back", getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(freed / MIB)


NODES = [ApplyReferenceCache, CombineReferenceCache, SaveReferenceCache, LoadReferenceCache, InspectReferenceCache, ClearReferenceCache]
