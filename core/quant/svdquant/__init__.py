"""SVDQuant files of nunchaku: 4-bit weights and activations beside a low-rank branch at full precision.

    y = Q((x + t) / s) Q(R)^T + (x D) U^T + b

R: the residual in 4 bits, s: the smoothing of each input, D [K, r] and U [N, r]: the branch, t: a shift that makes what GELU
gave positive, 0 elsewhere. SVDQuant (Li et al., 2411.05007); the files' layout follows nunchaku and deepcompressor (both
Apache-2.0), whose descriptions are told in tiles.py and names.py.
"""
