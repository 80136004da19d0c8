"""GGUF files for tests, benchmark and demo: by the package's writer, their blocks by its quantizer or, for K-quants, which it has none for, by this one.

This encoder shares nothing with the pack: it searches the range of each sub-block and lays the bits out as ggml's format says.
test_gguf_files checks it by the package's dequantizer.
"""
import gguf
import numpy as np

PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
SHRINK = np.linspace(0.75, 1.05, 13, dtype=np.float32)


def half(x):
    return x.astype(np.float16)


def raw(x):
    return np.ascontiguousarray(x).view(np.uint8)


def best(tries):
    """Of (error [...], *results) the results with the least error, each for itself."""
    least, *chosen = tries[0]
    for error, *results in tries[1:]:
        better = error < least
        least = np.where(better, error, least)
        chosen = [np.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old) for new, old in zip(results, chosen, strict=True)]
    return chosen


def affine(x, top: int, scale_top: int, size: int):
    """x: [B, 256] ~ d sc q - dmin m, q in 0..top. Returns d, dmin [B], sc, m [B, S] and q [B, S, size]."""
    x = x.reshape(len(x), -1, size)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)

    def ranged(shrink):
        scale, least = (high - low) * shrink / top, -low * shrink
        q = np.clip(np.rint((x + least[..., None]) / np.maximum(scale, 1e-30)[..., None]), 0, top)
        return ((scale[..., None] * q - least[..., None] - x) ** 2).sum(-1), scale, least

    scale, least = best([ranged(shrink) for shrink in SHRINK])
    d, dmin = half(scale.max(-1) / scale_top), half(least.max(-1) / scale_top)
    sc = np.clip(np.rint(scale / np.maximum(d.astype(np.float32), 1e-30)[:, None]), 0, scale_top)
    m = np.clip(np.rint(least / np.maximum(dmin.astype(np.float32), 1e-30)[:, None]), 0, scale_top)
    step, base = (d[:, None] * sc).astype(np.float32), (dmin[:, None] * m).astype(np.float32)
    q = np.clip(np.rint((x + base[..., None]) / np.where(step > 0, step, 1e30)[..., None]), 0, top)
    return d, dmin, sc.astype(np.uint8), m.astype(np.uint8), q.astype(np.uint8)


def symmetric(x, below: int, scale_below: int):
    """x: [B, 256] ~ d sc q, q in -below..below-1 in sub-blocks of 16. Returns d [B], sc [B, 16] and q [B, 16, 16]."""
    x = x.reshape(len(x), 16, 16)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]

    def ranged(shrink):
        scale = largest * shrink / -below
        q = np.clip(np.rint(x / np.where(scale == 0, 1e30, scale)[..., None]), -below, below - 1)
        return ((scale[..., None] * q - x) ** 2).sum(-1), scale

    (scale,) = best([ranged(shrink) for shrink in SHRINK])
    most = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0]
    d = half(most / -scale_below)
    sc = np.clip(np.rint(scale / np.where(d == 0, 1e30, d.astype(np.float32))[:, None]), -scale_below, scale_below - 1)
    step = (d.astype(np.float32)[:, None] * sc)[..., None]
    q = np.clip(np.rint(x / np.where(step == 0, 1e30, step)), -below, below - 1)
    return d, sc.astype(np.int8), q.astype(np.int8)


def six_bits(sc, m):
    """Eight scales and eight minima of 6 bits each in 12 bytes."""
    high = lambda v: (v[:, 4:] >> 4) << 6  # noqa: E731
    return np.concatenate([sc[:, :4] | high(sc), m[:, :4] | high(m), (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def q4_k(x):
    d, dmin, sc, m, q = affine(x, 15, 63, 32)
    q = q.reshape(-1, 4, 2, 32)
    return np.concatenate([raw(d[:, None]), raw(dmin[:, None]), six_bits(sc, m), (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)], 1)


def q5_k(x):
    d, dmin, sc, m, q = affine(x, 31, 63, 32)
    fifth = np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], 1)
    q = (q & 15).reshape(-1, 4, 2, 32)
    return np.concatenate([raw(d[:, None]), raw(dmin[:, None]), six_bits(sc, m), fifth, (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)], 1)


def two_bits(q):
    """[B, 256] of 2 bits -> [B, 64]: four runs of 32 in each byte."""
    q = q.reshape(-1, 2, 4, 32)
    return np.bitwise_or.reduce(q << (2 * np.arange(4, dtype=np.uint8))[:, None], 2).reshape(-1, 64)


def q2_k(x):
    d, dmin, sc, m, q = affine(x, 3, 15, 16)
    return np.concatenate([sc | (m << 4), two_bits(q), raw(d[:, None]), raw(dmin[:, None])], 1)


def q3_k(x):
    d, sc, q = symmetric(x, 4, 32)
    q, sc = (q + 4).astype(np.uint8).reshape(-1, 256), (sc.astype(np.int16) + 32).astype(np.uint8)
    mask = np.bitwise_or.reduce((q >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None], 1)
    low = (sc[:, :8] & 15) | ((sc[:, 8:] & 15) << 4)
    high = np.bitwise_or.reduce((sc >> 4).reshape(-1, 4, 4) << (2 * np.arange(4, dtype=np.uint8))[:, None], 1)
    return np.concatenate([mask, two_bits(q & 3), low, high, raw(d[:, None])], 1)


def q6_k(x):
    d, sc, q = symmetric(x, 32, 128)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = np.bitwise_or.reduce((q >> 4) << (2 * np.arange(4, dtype=np.uint8))[:, None], 2)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), raw(sc), raw(d[:, None])], 1)


K_QUANTS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
TYPES = (*PACKAGE, *K_QUANTS)


def encoded(x, type: str):
    """x: fp32 [..., K]. Returns uint8 [..., bytes of a row]."""
    x = np.ascontiguousarray(x, np.float32)
    if type in K_QUANTS:
        return K_QUANTS[type](x.reshape(-1, 256)).reshape(*x.shape[:-1], -1)
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[type])


def block(type: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]


def write(path, tensors: dict, architecture: str = "flux", settings=()):
    """tensors: name -> array, or (array or its blocks as bytes, type of blocks). settings: calls on the writer, (method, *arguments)."""
    writer = gguf.GGUFWriter(path, architecture)
    for method, *given in settings:
        getattr(writer, method)(*given)
    for name, value in tensors.items():
        x, type = value if isinstance(value, tuple) else (value, None)
        if type is None:
            writer.add_tensor(name, np.ascontiguousarray(x))
        elif type == "BF16":
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x, np.float32), gguf.GGMLQuantizationType.BF16),
                              raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, x if x.dtype == np.uint8 else encoded(x, type), raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


__all__ = ["K_QUANTS", "PACKAGE", "TYPES", "block", "encoded", "write"]
