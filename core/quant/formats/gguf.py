"""GGUF: blocks of 32 or 256 weights with scales of their own. Which types there are: core/quant/blocks.py."""
from ..blocks import TYPES, values, without_scale
from ..files import BadFile, Blocks, WeightFile
from ..layer import Layer
from ..packed import pack

WEIGHT = ".weight"
TRANSCODED = ("Q8_0",)      # as large as int8, so nothing is gained by keeping it


class GGUF:
    name = "GGUF " + ", ".join(TYPES)
    names = TYPES
    note = "Stays packed in memory, or is unpacked while it is loaded."

    def claim(self, file: WeightFile, left: dict):
        for key in [key for key, found in left.items() if isinstance(found, Blocks)]:
            found = left.pop(key)
            if bad := without_scale(found.bytes, found.type):
                raise BadFile(f"'{file.name}': '{key}' is stored as {found.type}, and {bad} of its blocks have scales that are no numbers; "
                              "download the file again")
            rows = found.bytes.shape[0]
            if key.endswith(WEIGHT) and len(found.shape) == 2 and found.shape[0] == rows:
                yield Layer(
                    name=key.removesuffix(WEIGHT), format=found.type, shape=found.shape, nbytes=found.bytes.nbytes,
                    unpack=lambda start, stop, found=found: values(found.bytes[start:stop], found.type),
                    packed=lambda dtype, found=found: pack(found, dtype), packed_int8=lambda dtype, found=found: pack(found, dtype, "int8"),
                    transcode=found.type in TRANSCODED)
            else:       # a bias, a norm, or a convolution laid flat: small
                left[key] = values(found.bytes, found.type).reshape(found.shape)
