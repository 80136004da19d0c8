"""The usual machines, with nothing installed beside what ComfyUI brings, and the README's tables of what Reprise does on them.
"""
from .features import FEATURES
from .machine import EAGER, EIGHT_BIT_ATTENTION, INT8, NVFP4, SVDQUANT, Machine

RTX_40, RTX_50 = {"gpu": "RTX 4090", "capability": (8, 9)}, {"gpu": "RTX 5090", "capability": (12, 0), "nvfp4": True}
NO_TRITON = "Triton is not installed, or does not fit this torch"
NOT_HERE = dict.fromkeys(EIGHT_BIT_ATTENTION, "not installed")
SERVED = dict.fromkeys((INT8, *SVDQUANT), "cuda")
TYPICAL = {     # with nothing installed beside what ComfyUI brings
    "Linux, CUDA 13, RTX 40": Machine(
        kind="cuda", cuda="13.0", fp8=True, kitchen={"cuda": "", EAGER: ""}, serves={**SERVED, NVFP4: EAGER}, attention=NOT_HERE, **RTX_40),
    "Linux, CUDA 13, RTX 50": Machine(
        kind="cuda", cuda="13.0", fp8=True, kitchen={"cuda": "", EAGER: ""}, serves={**SERVED, NVFP4: "cuda"}, attention=NOT_HERE, **RTX_50),
    "Windows portable, CUDA 13": Machine(
        "Windows", kind="cuda", cuda="13.0", fp8=True, kitchen={"cuda": "", EAGER: ""}, serves={**SERVED, NVFP4: EAGER}, triton=NO_TRITON,
        attention=NOT_HERE, **RTX_40),
    "Windows portable, CUDA 12": Machine(
        "Windows", kind="cuda", cuda="12.8", fp8=True, kitchen={"cuda": "ComfyUI switched it off", EAGER: ""},
        serves=dict.fromkeys((INT8, NVFP4, *SVDQUANT), EAGER), triton=NO_TRITON, attention=NOT_HERE, **RTX_40),
    "AMD, ROCm, RX 7000 or 9000": Machine(
        kind="cuda", gpu="Radeon RX 7900", hip="7.0", kitchen={"hip": "", EAGER: ""}, serves={**dict.fromkeys((INT8, *SVDQUANT), "hip"), NVFP4: EAGER},
        triton="Reprise's kernels are for NVIDIA GPUs, not for AMD's", attention=NOT_HERE),
    "Mac": Machine(
        "Darwin", kind="mps", gpu="Apple M3", kitchen={EAGER: ""}, serves=dict.fromkeys((INT8, NVFP4, *SVDQUANT), EAGER), fp8_weights=False,
        triton=NO_TRITON, attention=NOT_HERE),
    "CPU alone": Machine(
        kitchen={EAGER: ""}, serves=dict.fromkeys((INT8, NVFP4, *SVDQUANT), EAGER), triton="Reprise's kernels are for NVIDIA GPUs, not for cpu",
        attention=NOT_HERE),
}


def machines_table() -> str:
    """For the README: what does the work of each feature on the usual machines."""
    return table(["feature", *TYPICAL], [[feature.name, *(feature.on(machine).by for machine in TYPICAL.values())] for feature in FEATURES.values()])


def costs_table() -> str:
    """For the README: what each way costs that is not the best one."""
    return table(["feature", "way", "costs"], [[feature.name, way.by, way.cost] for feature in FEATURES.values() for way in feature.falls_back])


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)])
