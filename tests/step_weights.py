"""Weights of a denoising step at Pi0's widths, two layers, for the kernels that keep them in an order of their own."""

import torch

from pi0exp.kernels.stream_pack import Weights

L, D, N, H, F = 2, 1024, 8, 256, 4096
C, P = (N + 2) * H, D // 8


def random_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    sizes = ((L, C, D), (L, D, N * H), (L, 2 * F, D), (L, D, F))
    return Weights(*(torch.randn(size, generator=generator).bfloat16() for size in sizes))
