"""The least work of a call and the time below which no implementation can go on a given machine.

Counted from the configuration, with every exact rewrite taken for granted: only real prompt tokens and present cameras
are computed, the last prefill layer only makes keys and values, Pi0's state token is computed once, modulations and
time embeddings are constants, every weight is read once per use and activations stay on chip. So two stacks on the same
workload share one floor, and a share of it compares them. What a stack does beyond it is counted in
`pi0exp.stack_work`.
"""

from dataclasses import dataclass

from pi0exp.model.config import ModelConfig
from pi0exp.subject import StageWork

VALUE_BYTES = {"bf16": 2, "fp32": 4, "tf32": 4, "fp8": 1}
"""Of a weight and of whatever else moves, by the kind of product. In fp8 some of it is wider: the floor lies lower."""


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


class StageSum:
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
    gemma, expert = config.paligemma, config.expert
    batch, patches = len(prompt_tokens), config.vision.num_patches
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    vision = vision_work(config, batch * cameras, bytes_per_value)

    prefix = [cameras * patches + length for length in prompt_tokens]
    cache = sum(prefix) * 2 * key_value  # values of one layer's keys and values
    p, rows, full = StageSum(bytes_per_value), sum(prefix), gemma.depth - 1
    p.gemm(rows, query + 2 * key_value, gemma.width, times=full)
    p.attention(sum(length**2 for length in prefix), query, full)
    p.gemm(rows, gemma.width, query, times=full)
    p.gemm(rows, 2 * gemma.mlp_dim, gemma.width, times=full)
    p.gemm(rows, gemma.width, gemma.mlp_dim, times=full)
    p.gemm(rows, 2 * key_value, gemma.width)
    p.values += gemma.depth * cache + rows * gemma.width

    d, rows, state = StageSum(bytes_per_value), batch * horizon, config.suffix_prelude
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

    return [vision, p.work("prefill"), d.work("denoise", num_steps)]


def vision_work(config: ModelConfig, pictures: int, bytes_per_value: int, passes: int = 1) -> StageWork:
    """The vision tower over so many pictures, its weights read `passes` times."""
    vision, patches = config.vision, config.vision.num_patches
    v, rows = StageSum(bytes_per_value), pictures * patches
    if pictures:
        pixels = 3 * vision.patch_size**2
        v.gemm(rows, vision.width, pixels, bias=True)
        v.gemm(rows, 3 * vision.width, vision.width, times=vision.depth, bias=True)
        v.attention(rows * patches, vision.width, vision.depth)
        v.gemm(rows, vision.width, vision.width, times=vision.depth, bias=True)
        v.gemm(rows, vision.mlp_dim, vision.width, times=vision.depth, bias=True)
        v.gemm(rows, vision.width, vision.mlp_dim, times=vision.depth, bias=True)
        v.gemm(rows, config.paligemma.width, vision.width, bias=True)
        v.values += patches * vision.width  # positions
        v.values *= passes
        v.values += rows * (pixels + config.paligemma.width)  # pictures in, tokens out
    return v.work("vision")


@dataclass(frozen=True)
class Rooflines:
    """Short bursts from a rested clock, which no call can pass, and what this machine keeps up for a second or more."""

    burst: Ceilings
    sustained: Ceilings


def least_time(work: list[StageWork], own: list[StageWork], roofs: Rooflines) -> dict[str, float]:
    """What can be said before a call is timed. work: the least of the workload; own: that of the stack.

    roofline/floor_ms and _STAGE: at burst ceilings. roofline/floor_sustained_ms and _STAGE: at sustained ones.
    roofline/flops, roofline/bytes: of the least work. roofline/stack_flops, stack_bytes: of the stack's own;
    roofline/stack_floor_ms: its floor at burst ceilings.
    """
    metrics = {}
    for name, ceilings in (("floor_ms", roofs.burst), ("floor_sustained_ms", roofs.sustained)):
        stages = floor_ms(work, ceilings)
        metrics[f"roofline/{name}"] = sum(stages.values())
        metrics |= {f"roofline/{name}_{stage}": value for stage, value in stages.items()}
    for prefix, stages_of in (("", work), ("stack_", own)):
        metrics[f"roofline/{prefix}flops"] = sum(stage.flops * stage.count for stage in stages_of)
        metrics[f"roofline/{prefix}bytes"] = sum(stage.bytes_moved * stage.count for stage in stages_of)
    metrics["roofline/stack_floor_ms"] = sum(floor_ms(own, roofs.burst).values())
    return metrics


def shares(metrics: dict[str, float]) -> dict[str, float]:
    """How much of the floor was reached, from the floors and times among the metrics.

    roofline/share and roofline/share_sustained of the whole call; with _STAGE behind them of each stage that has a
    stage_ms/STAGE, wherever that came from.
    """
    found = {}
    for name, floor in (("share", "floor_ms"), ("share_sustained", "floor_sustained_ms")):
        found[f"roofline/{name}"] = metrics[f"roofline/{floor}"] / metrics["latency_ms/p50"]
        for stage in ("vision", "prefill", "denoise"):
            if (taken := metrics.get(f"stage_ms/{stage}")) and (least := metrics.get(f"roofline/{floor}_{stage}")):
                found[f"roofline/{name}_{stage}"] = least / taken
    return found
