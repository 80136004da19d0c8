"""Writes files as nunchaku has them, for tests, benchmark and demo: SVDQuant quantized here, and packed one index at a time.

Nothing of the reader is used. Where an element goes is computed from its row and column, by the published descriptions:

    weights     a warp's tile is 128 x 64; `mma.m16n8k64` takes from lane 4 i + j eight codes of row i at column 8 j, and four such
                words of a lane (two halves of 16 rows, two of 64 columns) lie beside each other (deepcompressor, `pack_weight`)
    scales      the table of `pack_scale`: lane 0 loads rows 0 1 8 9, lane 1 rows 2 3 10 11, ... lane 4 rows 16 17 24 25
    micro       the table of `pack_micro_scale`: lane 0 loads rows 0 32 64 96, lane 1 rows 8 40 72 104, ... lane 4 rows 1 33 65 97
    branches    `mma.m16n8k16`: lane 4 i + j holds columns 2 j and 2 j + 1 of row i, then the four quarters of 16 x 16
    AWQ         the comment of `pack_w4`: [0 .. 31] becomes [0 8 16 24 1 9 17 25 ...], and four rows lie beside each other by 64

Two numbers come from there, too: the shift 0.171875 of what follows a GELU, and the 1 added to the bias of a scale.
"""
import json
from typing import NamedTuple

import torch
from torch import Tensor

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LANES = range(32)
SCALE_ROWS = torch.tensor([16 * (lane // 4) + 2 * (lane % 4) + one for lane in LANES for one in (0, 1, 8, 9)])
MICRO_ROWS = torch.tensor([lane // 4 + 8 * (lane % 4) + one for lane in LANES for one in (0, 32, 64, 96)])


# --- packing ---------------------------------------------------------------------------------------------------------------------

def pack_weight(codes: Tensor) -> Tensor:
    """int codes [N, K], of 4 bits, as int8 [N, K / 2]."""
    n, k = codes.shape
    row, column = torch.arange(n)[:, None], torch.arange(k)[None]
    tile = row // 128 * (k // 64) + column // 64
    lane = row % 8 * 4 + column % 32 // 8
    word = (row % 128 // 16 * 32 + lane) * 4 + row % 16 // 8 * 2 + column % 64 // 32
    nibble = ((tile * 1024 + word) * 8 + column % 8).flatten()
    flat = torch.zeros(n * k, dtype=torch.int64)
    flat[nibble] = (codes.long() & 15).flatten()
    return (flat[0::2] | flat[1::2] << 4).to(torch.uint8).view(torch.int8).view(n, k // 2)


def pack_scale(scale: Tensor) -> Tensor:
    """[N, groups] as [groups, N]; of a vector [N], [N]."""
    if scale.ndim == 1:
        return pack_scale(scale[:, None])[0]
    tiles = [scale[128 * tile + SCALE_ROWS, group] for tile in range(scale.shape[0] // 128) for group in range(scale.shape[1])]
    return torch.cat(tiles).view(scale.shape[1], scale.shape[0])


def pack_micro(scale: Tensor) -> Tensor:
    """float8 [N, K / 16] as [K / 16, N]."""
    codes, (n, groups) = scale.view(torch.uint8), scale.shape
    tiles = [codes[128 * tile + MICRO_ROWS, 4 * four:4 * four + 4].flatten() for tile in range(n // 128) for four in range(groups // 4)]
    return torch.cat(tiles).view(scale.dtype).view(groups, n)


def pack_branch(matrix: Tensor, down: bool) -> Tensor:
    """[r, K] of the way down, as [K, r]; [N, r] of the way up, as it is; both in tiles of 16 x 16."""
    rows, columns = matrix.shape
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tile = c // 16 * (rows // 16) + r // 16 if down else r // 16 * (columns // 16) + c // 16
    lane = r % 8 * 4 + c % 8 // 2
    at = (tile * 256 + lane * 8 + r % 16 // 8 * 4 + c % 16 // 8 * 2 + c % 2).flatten()
    flat = torch.empty(rows * columns, dtype=matrix.dtype)
    flat[at] = matrix.flatten()
    return flat.view(columns, rows) if down else flat.view(rows, columns)


def pack_awq(codes: Tensor) -> Tensor:
    """codes [N, K] of 0 .. 15 as int32 [N / 4, K / 2]."""
    n, k = codes.shape
    words = torch.zeros(n // 4, k, dtype=torch.int64)
    for column in range(k):
        word = column // 64 * 64 + column % 64 // 32 * 8 + column % 8
        for row in range(4):
            words[:, word + 16 * row] |= codes[row::4, column].long() << 4 * (column % 32 // 8)
    return words.to(torch.int32).to(torch.int16).view(torch.int32)


# --- quantizing ------------------------------------------------------------------------------------------------------------------

class Packed(NamedTuple):
    """What a layer is in the file, and the weight and bias that this stands for."""

    parts: dict[str, Tensor]
    weight: Tensor
    bias: Tensor


def branch_of(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [N, r], down [r, K]) of the largest singular values."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = min(rank, len(s))
    up, down = torch.zeros(weight.shape[0], rank), torch.zeros(rank, weight.shape[1])
    up[:, :kept], down[:kept] = (u[:, :kept] * s[:kept].sqrt()).float(), (s[:kept].sqrt()[:, None] * v[:kept]).float()
    return up, down


def svdquant(
    weight: Tensor, bias: Tensor | None, most: Tensor | None, rank: int, kind="int4", gelu=False, dtype=torch.bfloat16, branch=True,
) -> Packed:
    """A linear layer as its file has it. most: largest of each input in use, for the smoothing. branch: the residual without one else."""
    n, k = weight.shape
    smooth = torch.ones(k) if most is None else ((most + (SHIFT if gelu else 0)).clamp_min(1e-3) / weight.abs().amax(0).clamp_min(1e-3)).sqrt()
    smooth = smooth.to(dtype).float()
    up, down = branch_of(weight * smooth, rank) if branch else (torch.zeros(n, rank), torch.zeros(rank, k))
    up, down = up.to(dtype).float(), (down / smooth).to(dtype).float()       # the branch sees what is not smoothed
    residual = (weight - up @ down) * smooth
    out = {"smooth": pack_scale(smooth.to(dtype)), "smooth_orig": pack_scale(smooth.to(dtype)),
           "lora_up": pack_branch(up.to(dtype), down=False), "lora_down": pack_branch(down.to(dtype), down=True)}
    if kind == "int4":
        scale = (residual.view(n, -1, 64).abs().amax(-1) / 7).clamp_min(1e-8).to(dtype)
        codes = (residual.view(n, -1, 64) / scale.float()[..., None]).round().clamp(-8, 7).view(n, k)
        out |= {"qweight": pack_weight(codes), "wscales": pack_scale(scale)}
        kept = (codes.view(n, -1, 64) * scale.float()[..., None]).view(n, k) / smooth
    else:
        rows = (residual.abs().amax(1) / (6 * 448)).clamp_min(1e-8).to(dtype)
        even = residual / rows.float()[:, None]
        scale = (even.view(n, -1, 16).abs().amax(-1) / 6).clamp_min(2 ** -9).to(torch.float8_e4m3fn)
        codes = (even.view(n, -1, 16, 1) / scale.float()[..., None, None] - E2M1).abs().argmin(-1).view(n, k)
        out |= {"qweight": pack_weight(codes), "wscales": pack_micro(scale), "wcscales": pack_scale(rows)}
        kept = (E2M1[codes].view(n, -1, 16) * scale.float()[..., None]).view(n, k) * rows.float()[:, None] / smooth
    bias = torch.zeros(n) if bias is None else bias
    if gelu and kind == "int4":
        bias = (bias - SHIFT * (weight - up @ down).sum(1)).to(dtype)
        return Packed(out | {"bias": pack_scale(bias)}, kept + up @ down, bias.float() + SHIFT * kept.sum(1))
    bias = bias.to(dtype)
    return Packed(out | {"bias": pack_scale(bias)}, kept + up @ down, bias.float())


def awq(weight: Tensor, bias: Tensor, splits: int, dtype=torch.bfloat16) -> Packed:
    """A modulation layer: its outputs channel by channel, 1 added to the bias of each scale."""
    (n, k), ones = weight.shape, torch.zeros(splits)
    weight = weight.view(splits, n // splits, k).transpose(0, 1).reshape(n, k)
    bias = bias.view(splits, -1).t().clone()
    ones[[1, splits - 2]] = 1
    bias = (bias + ones).to(dtype)
    groups = k // 64
    scale = (weight.view(n, groups, 64).abs().amax(-1) / 7).clamp_min(1e-8).to(dtype)
    codes = (weight.view(n, groups, 64) / scale.float()[..., None] + 7).round().clamp(0, 15).view(n, k)
    padded = torch.zeros(-(-groups // 16) * 16, n, dtype=dtype)
    zeros = padded.clone()
    padded[:groups], zeros[:groups] = scale.t(), -7 * scale.t()
    kept = codes.view(n, groups, 64) * scale.float()[..., None] + (-7 * scale).float()[..., None]
    kept = kept.view(-1, splits, k).transpose(0, 1).reshape(n, k)
    parts = {"qweight": pack_awq(codes), "wscales": padded, "wzeros": zeros, "bias": bias.reshape(-1)}
    return Packed(parts, kept, (bias.float() - ones).t().reshape(-1))


# --- whole files -----------------------------------------------------------------------------------------------------------------

FLUX_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2", "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2", "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2", "final_layer.linear": "proj_out",
}
FLUX_DOUBLE = {
    "img_attn.qkv": "qkv_proj", "txt_attn.qkv": "qkv_proj_context", "img_attn.proj": "out_proj", "txt_attn.proj": "out_proj_context",
    "img_mlp.0": "mlp_fc1", "img_mlp.2": "mlp_fc2", "txt_mlp.0": "mlp_context_fc1", "txt_mlp.2": "mlp_context_fc2",
    "img_attn.norm.query_norm": "norm_q", "img_attn.norm.key_norm": "norm_k", "txt_attn.norm.query_norm": "norm_added_q",
    "txt_attn.norm.key_norm": "norm_added_k", "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
}


def header(kind: str, rank: int, model: str, config: str = "{}") -> dict[str, str]:
    four = {"dtype": "int4", "group_size": 64} if kind == "int4" else {"dtype": "fp4_e2m1_all", "group_size": 16}
    return {"config": config, "comfy_config": "{}", "model_class": model,
            "quantization_config": json.dumps({"method": "svdquant", "weight": four, "activation": four, "rank": rank})}


class File(NamedTuple):
    """tensors, metadata: of nunchaku. dense: {key of the host: what the quantized layers stand for}."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    dense: dict[str, Tensor]


def flux(sd: dict[str, Tensor], most: dict[str, Tensor], rank=32, kind="int4", branch=True) -> File:
    """A FLUX.1 checkpoint of the host's names as nunchaku has it. most: of each linear layer's inputs."""
    sd, out, dense = {key: tensor.float() for key, tensor in sd.items()}, {}, {}

    def put(name: str, packed: Packed) -> Packed:
        out.update({f"{name}.{part}": tensor for part, tensor in packed.parts.items()})
        return packed

    for key, tensor in sd.items():
        layer, _, end = key.rpartition(".")
        stack, number, local = (*layer.split(".", 2), "", "")[:3]
        block = f"{'single_' if stack == 'single_blocks' else ''}transformer_blocks.{number}"
        made = []
        if layer in FLUX_OUTSIDE:
            out[f"{FLUX_OUTSIDE[layer]}.{end}"] = tensor.bfloat16()
        elif layer == "final_layer.adaLN_modulation.1":
            out[f"norm_out.linear.{end}"] = torch.cat(tensor.bfloat16().chunk(2)[::-1])
        elif end != "weight":
            continue
        elif "norm" in local:
            short = FLUX_DOUBLE.get(local) or {"norm.query_norm": "norm_q", "norm.key_norm": "norm_k"}[local]
            out[f"{block}.{short}.weight"] = tensor.bfloat16()
        elif local in ("img_mod.lin", "txt_mod.lin", "modulation.lin"):
            made = [put(f"{block}.{FLUX_DOUBLE.get(local, 'norm.linear')}", awq(tensor, sd[f"{layer}.bias"], 6 if "_mod" in local else 3))]
        elif local == "linear1":
            three, bias = 3 * tensor.shape[1], sd[f"{layer}.bias"]
            made = [put(f"{block}.{short}", svdquant(tensor[rows], bias[rows], most[layer], rank, kind, branch=branch))
                    for short, rows in (("qkv_proj", slice(0, three)), ("mlp_fc1", slice(three, None)))]
        elif local == "linear2":
            h = tensor.shape[0]
            made = [put(f"{block}.out_proj", svdquant(tensor[:, :h], None, most[layer][:h], rank, kind, branch=branch)),
                    put(f"{block}.mlp_fc2", svdquant(tensor[:, h:], sd[f"{layer}.bias"], most[layer][h:], rank, kind, gelu=True, branch=branch))]
            dense[key], dense[f"{layer}.bias"] = torch.cat([one.weight for one in made], 1), made[1].bias
            continue
        else:
            gelu = local.endswith("mlp.2")
            made = [put(f"{block}.{FLUX_DOUBLE[local]}", svdquant(tensor, sd[f"{layer}.bias"], most[layer], rank, kind, gelu, branch=branch))]
        if made:
            dense[key], dense[f"{layer}.bias"] = torch.cat([one.weight for one in made]), torch.cat([one.bias for one in made])
    return File(out, header(kind, rank, "NunchakuFluxTransformer2dModel"), dense)


def z_image(sd: dict[str, Tensor], most: dict[str, Tensor], config: str, rank=32, kind="int4", branch=True, refiners=True) -> File:
    """A Z-Image checkpoint of the host's names as nunchaku has it. refiners: whether they are quantized, too."""
    out, dense = {}, {}

    def put(name: str, tensor: Tensor, whole: bool, *keys: str) -> None:
        """keys: of the host, for layers that stand above each other in the file."""
        if not whole:
            out[f"{name}.weight"] = tensor.bfloat16()
            return
        packed = svdquant(tensor, None, most[keys[0].removesuffix(".weight")], rank, kind, branch=branch)
        out.update({f"{name}.{RENAMED.get(part, part)}": value for part, value in packed.parts.items() if part != "bias"})
        dense.update(zip(keys, packed.weight.chunk(len(keys)), strict=True))

    for key, tensor in sd.items():
        layer, _, end = key.rpartition(".")
        block, local = ".".join(layer.split(".")[:2]), ".".join(layer.split(".")[2:])
        whole, tensor = refiners or "_refiner" not in block, tensor.float()
        if local in Z_IMAGE_BLOCK:
            if local == "attention.qkv" and not whole:
                out.update({f"{block}.attention.to_{one}.weight": part.bfloat16() for one, part in zip("qkv", tensor.chunk(3), strict=True)})
            else:
                put(f"{block}.{Z_IMAGE_BLOCK[local]}", tensor, whole, key)
        elif local == "feed_forward.w1":
            w3 = f"{block}.feed_forward.w3.weight"
            put(f"{block}.feed_forward.net.0.proj", torch.cat([sd[w3].float(), tensor]), whole, w3, key)
        elif local in ("attention.q_norm", "attention.k_norm"):
            out[f"{block}.attention.norm_{local[10]}.weight"] = tensor.bfloat16()
        elif local != "feed_forward.w3":
            out[f"{Z_IMAGE_OUTSIDE[layer]}.{end}" if layer in Z_IMAGE_OUTSIDE else key] = tensor.bfloat16()
    return File(out, header(kind, rank, "NunchakuZImageTransformer2DModel", config), dense)


Z_IMAGE_BLOCK = {"attention.qkv": "attention.to_qkv", "attention.out": "attention.to_out.0", "feed_forward.w2": "feed_forward.net.2"}
Z_IMAGE_OUTSIDE = {"x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
                   "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1"}
RENAMED = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "lora_down": "proj_down", "lora_up": "proj_up"}
