"""UNet depth: on a skip only the shallow blocks run; what comes up from the deep ones is predicted.

    computed step:   H = what goes into output block L - 1 - b                          kept, per condition
    skipped step:    input blocks 0..b,   H',   output blocks L - 1 - b..L - 1

Branch b is the deepest skip connection that is still made. Of ControlNet's residuals the shallow ones are added as
ever and the deep ones are in H. DeepCache (arXiv 2312.00858), which holds H; any predictor does here. Its uniform
schedule is policy 'interval', its non-uniform one 'centred interval'.
"""
from dataclasses import dataclass

from ...knob import knob
from .unet import INDEX, UnetLevel, joined, nothing, patched, recalled, standing_in


@dataclass(frozen=True)
class UnetDepth(UnetLevel):
    name = "unet depth"
    branch: int = knob(
        0, "The deepest skip connection that a skip still makes, at most the last but one. 0 is the fastest; more follow the model more closely and "
        "save less. SDXL has 9 of them, SD 1.5 has 12.", 0, 11, 1)

    def running(self, call):
        kept = min(self.branch, len(call.network.output_blocks) - 2) + 1
        return kept, kept

    def watch(self, cache, call, compute):
        border, deep = self.border(call), []

        def look(h, hsp, options):
            if options["block"][1] == border:
                deep.extend(part.clone() for part in h.chunk(len(call.rows)))     # patches behind this one may write into h
                cache.notes[INDEX] = options[INDEX]
            return h, hsp

        result = compute(transformer_options=patched(call.arguments["transformer_options"], look))
        for row, part in zip(call.rows, deep, strict=False):
            cache.learn(row, part)
        return bool(deep), result

    def skip(self, cache, call, compute):
        border, kept, entered = self.border(call), self.running(call)[0], []

        def enter(h, hsp, options):
            place = options["block"][1]
            if place == border:
                entered.append(place)
                options[INDEX] = cache.notes[INDEX]
            return h, hsp if place >= border else None      # the host joins nothing to h then

        def runs(way, place):
            return place < kept if way == "input" else place >= border

        inputs, outputs = list(call.network.input_blocks), list(call.network.output_blocks)
        deep = recalled(joined([cache.predict(row) for row in call.rows]))
        with standing_in(call.network, inputs[:kept] + nothing(len(inputs) - kept), [deep] * border + outputs[border:]):
            result = compute(
                transformer_options=patched(call.arguments["transformer_options"], enter, runs),
                control=shallow(call.arguments.get("control"), kept, len(outputs)))
        return bool(entered), result

    def border(self, call) -> int:
        """The output block that the deep feature goes into."""
        return len(call.network.output_blocks) - self.running(call)[1]


def shallow(control: dict | None, kept: int, blocks: int) -> dict | None:
    """ControlNet's residuals without those of the blocks that do not run. The host takes them from the end of each list."""
    if control is None:
        return None
    inputs, outputs = control.get("input", ()), control.get("output", ())
    return {
        **control,
        "input": [r if len(inputs) - 1 - n < kept else None for n, r in enumerate(inputs)],
        "middle": [],
        "output": [r if len(outputs) - 1 - n >= blocks - kept else None for n, r in enumerate(outputs)],
    }
