"""The products of Pi0 that sweeps/gemm.py times, and the launches that it tries for each."""

import random
from dataclasses import dataclass
from itertools import product as combinations

from pi0exp.kernels import gemm as large
from pi0exp.kernels import skinny_gemm as skinny


@dataclass(frozen=True)
class Product:
    """N columns of y from K of x. C: rows of the weight, twice N if gated."""

    N: int
    K: int
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    gated: bool = False

    @property
    def C(self) -> int:  # noqa: N802  (called as the axis that it is the size of)
        return 2 * self.N if self.gated else self.N

    def epilogue(self) -> str:
        """What follows the product: `bias, residual`."""
        parts = {"bias": self.bias, "gated": self.gated, self.activation: self.activation != "none"}
        return ", ".join(name for name, there in (parts | {"residual": self.residual}).items() if there) or "-"


SKINNY = {
    "qkv": Product(2560, 1024),
    "out": Product(1024, 2048, residual=True),
    "gate_up": Product(4096, 1024, activation="gelu_tanh", gated=True),
    "down": Product(1024, 4096, residual=True),
}
"""Of a layer of the action expert, in their order."""
ROWS = (51, 11)
LARGE = {
    "vis qkv": Product(3456, 1152, bias=True),
    "vis out": Product(1152, 1152, bias=True, residual=True),
    "vis fc1": Product(4304, 1152, bias=True, activation="gelu_tanh"),
    "vis fc2": Product(1152, 4304, bias=True, residual=True),
    "pre qkv": Product(2560, 2048),
    "pre out": Product(2048, 2048, residual=True),
    "pre gate_up": Product(16384, 2048, activation="gelu_tanh", gated=True),
    "pre down": Product(2048, 16384, residual=True),
}
LARGE_ROWS = {"vis": 768, "pre": 788}
"""Three cameras of 256 tokens; those and a prompt of 20."""

# Above these, Triton finds no room: shared memory of a program, and bytes of registers a warp for a held weight.
SHARED_BYTES, HELD_BYTES = 200_000, 512 * 32
MANY = {"x left stream": 14, "x left held": 12, "w left held": 9, "w left stream": 7}
FEW = {"groups held": 22, "w left held": 8, "x left held": 7}
"""Candidates of each family with many rows and with few; 5 of the others. Families that lost early have few."""


def _fits(launch: skinny.Launch, M: int, product: Product) -> bool:
    """Whether it divides K, fits into the GPU, has enough programs, and is not another one with more instructions."""
    BM, R, chunk = skinny.padded(M), launch.BN * (2 if product.gated else 1), launch.GROUPS * launch.BK
    if launch.BN < 8 or product.K % (chunk * launch.SPLITS):
        return False
    steps = product.K // (chunk * launch.SPLITS)
    if not 60 <= product.C // R * launch.SPLITS <= 1100:
        return False
    if launch.HELD:
        widest = 256 if launch.GROUPS > 1 else 128
        if steps > 1 and widest > launch.BK:
            return False  # a wider chunk does the same with fewer instructions
        weight = 2 * R * chunk * steps
        return weight <= HELD_BYTES * launch.num_warps and weight + 2 * BM * chunk * steps <= SHARED_BYTES
    return steps >= max(2, launch.num_stages - 1) and launch.num_stages * 2 * (R + BM) * chunk <= SHARED_BYTES


def skinny_candidates(M: int, product: Product) -> list[tuple[str, skinny.Launch]]:
    """(family, launch), chosen at random but always the same, launches of about one wave of programs first."""
    found: dict[str, list[skinny.Launch]] = {}

    def add(family: str, R: int, BK: int, **more: int | bool) -> None:
        launch = skinny.Launch(R // 2 if product.gated else R, BK, **more)
        if _fits(launch, M, product):
            found.setdefault(family, []).append(launch)

    for splits in (1, 2, 4, 8, 16):
        for groups, R, BK in combinations((4, 8, 16), (16, 32, 64), (32, 64, 128, 256)):
            add("groups held", R, BK, GROUPS=groups, SPLITS=splits, HELD=True, num_warps=groups)
            for stages in (2, 3, 4):
                add("groups stream", R, BK, GROUPS=groups, SPLITS=splits, num_warps=groups, num_stages=stages)
        for R, BK in combinations((64, 128), (64, 128, 256)):
            add("w left held", R, BK, SPLITS=splits, HELD=True, num_warps=R // 16)
            for stages in (3, 4, 6):
                add("w left stream", R, BK, SPLITS=splits, num_stages=stages)
        for R, BK in combinations((16, 32, 64, 128), (64, 128, 256)):
            for warps in _warps(skinny.padded(M), R):
                add("x left held", R, BK, SPLITS=splits, HELD=True, X_LEFT=True, num_warps=warps)
                for stages in (3, 4, 6):
                    add("x left stream", R, BK, SPLITS=splits, X_LEFT=True, num_warps=warps, num_stages=stages)
    per_family, chosen = FEW if skinny.padded(M) == 16 else MANY, []
    for family, some in found.items():
        random.Random(0).shuffle(some)
        some.sort(key=lambda one: not 100 <= product.N // one.BN * one.SPLITS <= 540)
        chosen += [(family, one) for one in some[: per_family.get(family, 5)]]
    return chosen


def _warps(BM: int, R: int) -> tuple[int, ...]:
    if BM == 64:
        return (4,)
    return (4, 8) if R >= 64 else (2, 4)


def large_candidates(product: Product) -> list[large.Launch]:
    """A handful of tiles."""
    tiles = [(64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 4), (64, 64, 128, 4, 4)]
    if product.gated:
        tiles = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 64, 8, 4)]
    return [large.Launch(BM, BN, BK, 8, warps, stages) for BM, BN, BK, warps, stages in tiles]


def short(launch: skinny.Launch | large.Launch) -> str:
    """In a few letters, by which the file names launches of large products."""
    if isinstance(launch, large.Launch):
        return f"{launch.BM}x{launch.BN}x{launch.BK} w{launch.num_warps} s{launch.num_stages}"
    kind = ("held" if launch.HELD else f"s{launch.num_stages}") + (" xleft" if launch.X_LEFT else "")
    return f"BN{launch.BN} BK{launch.BK} G{launch.GROUPS} S{launch.SPLITS} w{launch.num_warps} {kind}"
