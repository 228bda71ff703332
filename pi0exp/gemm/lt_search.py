"""Which of cuBLASLt's algorithms is the fastest for a product, tried on the operands that it is for.

Those that the heuristics suggest are tried, then neighbours of the best with one number changed, such as the shape of
clusters, and once more their neighbours. Each must give what PyTorch gives, the same bits each time, and is timed as a
graph of products whose operands come from where they do in the policy: weights of many layers in turns, and an x that
is written anew before each product. (With an x that many products had read before, an algorithm without clusters took
70 us that takes 105 in the policy: prefill's w_down on an H100.) The time of the writing is taken off. The best and the
first suggestion, which is what PyTorch takes, are then timed in turns.

Shapes: M rows of x, K width in, N width out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0exp.cublaslt import WORKSPACE, Algorithm, CublasLtError, Problem, Product
from pi0exp.timing import device_sample_ms

SUGGESTED, BEST, FINALISTS, ROUNDS = 32, 3, 4, 11
"""Suggestions that are asked for; of how many the neighbours are tried; how many are timed in turns, and how often."""
CLUSTERS = range(2, 10)
"""CUBLASLT_CLUSTER_SHAPE_ of 1x1, 2x1, 4x1, 1x2, 2x2, 4x2, 1x4 and 2x4 blocks."""
CUSTOM = range(8)
"""Forms of one tile, to cuBLASLt itself only known by number."""
SPLITS = ((1, 0), *((parts, 2) for parts in (2, 3, 4, 6, 8, 16)))
"""Parts of K, and how they are added: not at all, or in float32 (CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)."""
LAYERS_BYTES = 256 * 2**20
"""Of weights of one shape that are multiplied in turns: several times the L2 cache."""
SHORTEST_US, LAUNCHES = 200.0, 64
"""A sample is of so many microseconds, or of so many products."""
APART = 2**-7
"""Relative L2 distance from PyTorch's result: either rounds a sum of float32 to bf16, which is 2^-8 together; the
double, for sums in another order."""


@dataclass(frozen=True)
class Shape:
    """A product, as far as the choice of an algorithm goes."""

    M: int
    N: int
    K: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.M} x {self.N} x {self.K}{' + bias' if self.bias else ''}"


@dataclass(frozen=True)
class Found:
    """The fastest. us, first_us: microseconds of a product, with it and with the first suggestion; medians of ROUNDS.
    tried: how many algorithms were.
    """

    algorithm: Algorithm
    us: float
    first_us: float
    tried: int


def layers_in_turns(N: int, K: int) -> int:
    """How many weights [N, K] of bf16 are enough."""
    return max(1, LAYERS_BYTES // (2 * N * K))


def fastest(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Found:
    """x: [M, K]. weights: [N, K] of different layers (`layers_in_turns`), to be used in turns. bias: [N] or None.

    Raises CublasLtError where none of cuBLASLt's algorithms gives what PyTorch gives.
    """
    search = _Search(x, weights, bias)
    suggested = search.problem.suggestions(SUGGESTED)
    for one in suggested:
        search.try_(one)
    for _ in range(2):
        for best in search.best(BEST):
            for one in neighbours(best):
                search.try_(one)
    if not search.us:
        raise CublasLtError(f"cuBLASLt has no algorithm for {search.shape} that gives what PyTorch gives")
    first = next((one for one in suggested if one in search.us), search.best(1)[0])
    finalists = list(dict.fromkeys([first, *search.best(FINALISTS)]))
    graphs = [search.graph(None), *(search.graph(search.problem.product(one)) for one in finalists)]
    written, *times = (median(samples) for samples in in_turns(graphs, ROUNDS))
    us = {one: time - written for one, time in zip(finalists, times, strict=True)}
    best = min(finalists, key=lambda one: us[one])
    return Found(best, us[best], us[first], len(search.us))


def neighbours(algorithm: Algorithm) -> Iterator[Algorithm]:
    """Those with another shape of clusters, form, or number of parts."""
    for cluster in CLUSTERS:
        yield replace(algorithm, cluster=cluster)
    for custom in CUSTOM:
        yield replace(algorithm, custom=custom)
    for split, reduction in SPLITS:
        yield replace(algorithm, split_k=split, reduction=reduction)


Timed = Callable[[], float]
"""Microseconds of a product, by one replay."""


def in_turns(graphs: Sequence[Timed], rounds: int) -> list[list[float]]:
    """Samples of each, which take turns."""
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, times in zip(graphs, samples, strict=True):
            times.append(graph())
    return samples


class _Search:
    """us: microseconds of each algorithm that is right, by its first samples, x written included."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None):
        self.given, self.x, self.weights, self.bias = x, x.clone(), weights, bias
        (M, K), N = x.shape, weights[0].shape[0]
        self.shape = Shape(M, N, K, bias is not None)
        self.problem = Problem(M, N, K, bias is not None)
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
        self.out = x.new_empty(2, M, N)
        self.truth = F.linear(x, weights[0], bias).float()
        self.us: dict[Algorithm, float] = {}
        self._seen: set[Algorithm] = set()
        self._launches = len(weights)

    def best(self, count: int) -> list[Algorithm]:
        return sorted(self.us, key=lambda one: self.us[one])[:count]

    def try_(self, algorithm: Algorithm) -> None:
        """Time it if it has not been tried, is one for this product, and gives what PyTorch gives."""
        if algorithm in self._seen:
            return
        self._seen.add(algorithm)
        try:
            product = self.problem.product(algorithm)
            for out in self.out:
                out.fill_(torch.nan)
                product(self.x, self.weights[0], self.bias, out, self.workspace)
        except CublasLtError:
            return
        apart = (self.out[0].float() - self.truth).norm() / self.truth.norm()
        if not (float(apart) <= APART and torch.equal(*self.out)):
            return
        replay = self.graph(product)
        replay()
        self.us[algorithm] = min(replay() for _ in range(3))
        wanted = int(SHORTEST_US / self.us[algorithm]) + 1
        self._launches = min(LAUNCHES, -(-wanted // len(self.weights)) * len(self.weights))

    def graph(self, product: Product | None) -> Timed:
        """x written and multiplied, with all weights in turns; with None only written."""
        launches = self._launches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                torch.mul(self.given, 1.0, out=self.x)  # a kernel, as what writes it in the policy; no copy
                if product is not None:
                    weight = self.weights[i % len(self.weights)]
                    product(self.x, weight, self.bias, self.out[i % 2], self.workspace)
        return lambda: 1e3 * device_sample_ms(lambda _: graph.replay(), 0, self.x.device) / launches
