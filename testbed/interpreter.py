"""Triton's interpreter, put right where it computes otherwise than a GPU: it cuts bf16 off where a GPU rounds to the nearest."""
import numpy
import torch


def round_as_a_gpu_does() -> None:
    """For this process. Import it where TRITON_INTERPRET is set; to repeat it changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float
    if getattr(cut_off, "rounds", False):
        return

    def convert(values, of, to, rounding):
        if of != tl.float32 or to != tl.bfloat16:
            return cut_off(values, of, to, rounding)
        rounded = torch.from_numpy(numpy.array(values, dtype=numpy.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16).reshape(values.shape)

    convert.rounds = True
    interpreter._convert_float = convert
