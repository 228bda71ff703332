"""The least work of a call and the time below which no implementation can go on a given machine.

Counted from the configuration, with every exact rewrite taken for granted: only real prompt tokens and present cameras
are computed, the last prefill layer only makes keys and values, Pi0's state token is computed once, modulations and
time embeddings are constants, every weight is read once per use and activations stay on chip. So two stacks on the same
workload share one floor, and a share of it compares them.
"""

from dataclasses import dataclass

from pi0exp.model.config import ModelConfig
from pi0exp.subject import StageWork


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to reach: bytes copied per second (read + written) and matrix FLOP per second."""

    bytes_per_s: float
    flops_per_s: float


def floor_ms(work: list[StageWork], ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of every stage: the larger of its arithmetic and its memory traffic at the ceilings."""
    return {
        stage.name: 1e3
        * stage.count
        * max(stage.flops / ceilings.flops_per_s, stage.bytes_moved / ceilings.bytes_per_s)
        for stage in work
    }


class _Stage:
    """Adds up matrix products and attentions."""

    def __init__(self, bytes_per_value: int):
        self.size, self.flops, self.values = bytes_per_value, 0.0, 0.0

    def gemm(self, rows: float, n: int, k: int, *, times: int = 1, bias: bool = False) -> None:
        """[rows, k] x [k, n]: 2 FLOP a product, the weight read once."""
        self.flops += 2.0 * rows * n * k * times
        self.values += (n * k + (n if bias else 0)) * times

    def attention(self, pairs: float, width: int, times: int = 1) -> None:
        """`pairs` of a query and a key, over all heads: scores and mix, 2 FLOP a product each."""
        self.flops += 4.0 * pairs * width * times

    def work(self, name: str, count: int = 1) -> StageWork:
        return StageWork(name, self.flops, self.values * self.size, count)


def policy_work(
    config: ModelConfig, cameras: int, prompt_tokens: list[int], horizon: int, num_steps: int, bytes_per_value: int = 2
) -> list[StageWork]:
    """The stages of one call over a batch: as many cameras in every row, one prompt length a row."""
    vision, gemma, expert = config.vision, config.paligemma, config.expert
    batch, patches = len(prompt_tokens), vision.num_patches
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    v, rows = _Stage(bytes_per_value), batch * cameras * patches
    if cameras:
        pixels = 3 * vision.patch_size**2
        v.gemm(rows, vision.width, pixels, bias=True)
        v.gemm(rows, 3 * vision.width, vision.width, times=vision.depth, bias=True)
        v.attention(rows * patches, vision.width, vision.depth)
        v.gemm(rows, vision.width, vision.width, times=vision.depth, bias=True)
        v.gemm(rows, vision.mlp_dim, vision.width, times=vision.depth, bias=True)
        v.gemm(rows, vision.width, vision.mlp_dim, times=vision.depth, bias=True)
        v.gemm(rows, gemma.width, vision.width, bias=True)
        v.values += patches * vision.width + rows * (pixels + gemma.width)  # positions, pictures in, tokens out

    prefix = [cameras * patches + length for length in prompt_tokens]
    cache = sum(prefix) * 2 * key_value  # values of one layer's keys and values
    p, rows, full = _Stage(bytes_per_value), sum(prefix), gemma.depth - 1
    p.gemm(rows, query + 2 * key_value, gemma.width, times=full)
    p.attention(sum(length**2 for length in prefix), query, full)
    p.gemm(rows, gemma.width, query, times=full)
    p.gemm(rows, 2 * gemma.mlp_dim, gemma.width, times=full)
    p.gemm(rows, gemma.width, gemma.mlp_dim, times=full)
    p.gemm(rows, 2 * key_value, gemma.width)
    p.values += gemma.depth * cache + rows * gemma.width

    d, rows, state = _Stage(bytes_per_value), batch * horizon, config.suffix_prelude
    d.gemm(rows, expert.width, config.action_dim, bias=True)
    if not config.pi05:
        d.gemm(rows, expert.width, expert.width, bias=True)
    d.gemm(rows, query + 2 * key_value, expert.width, times=expert.depth)
    d.attention(sum(horizon * (length + state + horizon) for length in prefix), query, expert.depth)
    d.gemm(rows, expert.width, query, times=expert.depth)
    d.gemm(rows, 2 * expert.mlp_dim, expert.width, times=expert.depth)
    d.gemm(rows, expert.width, expert.mlp_dim, times=expert.depth)
    d.gemm(rows, config.action_dim, expert.width, bias=True)
    d.values += gemma.depth * (cache + batch * state * 2 * key_value)

    return [v.work("vision"), p.work("prefill"), d.work("denoise", num_steps)]
