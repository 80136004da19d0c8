"""The nodes that `bench gpu` puts on a model, alone and together. Each notes in `told` what its run said it did."""
from pack.core.attach import attach_step_cache
from pack.core.presets import preset_settings
from pack.core.quant.attention import Settings as AttentionSettings
from pack.core.quant.attention import attach_attention
from pack.core.quant.fusion.attach import attach_fused_kernels
from pack.core.quant.modulation import attach_modulation_cache

PLAIN, FUSED, ATTENTION, STEP, MODULATION = "as it is", "Fused Kernels", "Attention Backend", "Step Cache, balanced", "Modulation Cache"


def lines(told: list[str]):
    return lambda record: told.append(record.line())


def modulation_cache(model, told: list[str]):
    clone, saving = attach_modulation_cache(model, lines(told))
    told.append(saving.line())
    return clone


NODES = {
    FUSED: lambda model, told: attach_fused_kernels(model, notify=lines(told)),
    ATTENTION: lambda model, told: attach_attention(model, AttentionSettings(), lines(told)),
    STEP: lambda model, told: attach_step_cache(model, preset_settings("balanced"), lines(told)),
    MODULATION: modulation_cache,
}


def put_on(model, names: tuple[str, ...], told: list[str]):
    for name in names:
        model = NODES[name](model, told)
    return model


def spoken(names: tuple[str, ...]) -> str:
    return " + ".join(names) or PLAIN
