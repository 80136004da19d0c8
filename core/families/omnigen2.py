"""OmniGen2: one stack over text ++ reference ++ image; small refiner stacks run before it on every step."""
from .base import Family, Stack

OMNIGEN2 = Family(
    name="omnigen2",
    models=("comfy.ldm.omnigen.omnigen2:OmniGen2Transformer2DModel",),
    stacks=(Stack("layers", inputs=("hidden_states",), stream="hidden_states", returns=("hidden_states",), joined=("hidden_states",)),),
    always=("noise_refiner", "context_refiner"),
    wrapped=False,
)
