"""GELU by tanh, as the blocks of FLUX have it. torch's is `gelu(..., approximate="tanh")`."""
from ._triton import tl, triton


@triton.jit
def gelu_tanh(b_a):
    """a (1 + tanh u) / 2 = a / (1 + exp(-2u)),  u = sqrt(2 / pi) (a + 0.044715 a^3). In fp32."""
    return b_a / (1.0 + tl.exp2(b_a * (-2.302208198 - 0.1029432397 * b_a * b_a)))     # times log2 e, as exp2 is the one that GPUs have
