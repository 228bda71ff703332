"""The matrix products of the policy by themselves: all of one call in their order, and each shape apart.

A call multiplies with as many different weights as the policy has, so that they come from memory as they do there; the
activations of a shape are the same in each call. Where a shape is timed apart, weights and activations take turns, and
there are so many of them that they do not fit the cache three times over.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pi0exp import build
from pi0exp.checked import apply_checked
from pi0exp.config import MeasureConfig, Stack, subject_settings
from pi0exp.errors import UserError
from pi0exp.fusion.fusion import Fusion
from pi0exp.gemm.triton_gemm import TritonGemm
from pi0exp.graphs.capture import Capture
from pi0exp.machine import Machine
from pi0exp.option import STAGES, Numerics
from pi0exp.policy_subject import PolicySubject, synchronize
from pi0exp.precision.option import allow_tf32
from pi0exp.roofline import VALUE_BYTES, Ceilings, StageSum
from pi0exp.subject import Details, Progress, StageWork, Verdict
from pi0exp.subjects.measured import PartInstance
from pi0exp.subjects.part import Given, PartPolicy
from pi0exp.subjects.plain import PLAIN, foreign
from pi0exp.subjects.product_set import Products, cache_bytes, judged, set_count, true_result
from pi0exp.subjects.product_times import multiply, rates, repeats, rounds, totals
from pi0exp.subjects.shapes import Call, Product, recorded


@dataclass(frozen=True)
class ProductsConfig:
    """`subject.` of products. replay_us: how long a shape is multiplied for one sample, about."""

    replay_us: float = 1000.0

    def __post_init__(self) -> None:
        if not self.replay_us > 0:
            raise ValueError(f"replay_us is {self.replay_us}; it must be above 0")


@dataclass(frozen=True)
class ProductsSubject:
    """The products of `whole`, by its gemm option in its precision."""

    whole: PolicySubject
    config: ProductsConfig

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        made = cls(PolicySubject.from_plain(plain), subject_settings(plain, ProductsConfig))
        if reasons := made.excluded(plain["names"]):
            raise UserError(reasons[0])
        return made

    def excluded(self, names: Mapping[str, str]) -> list[str]:
        """Options that would change nothing here; names: their words."""
        stack = self.whole.stack
        reasons = foreign(stack, ("image_masking", "fusion", "precision", "gemm", "graphs"), "products", names)
        assert isinstance(stack.fusion, Fusion)
        reasons += [
            f"fusion.{name} changes no matrix product; leave it out with subject=products"
            for name in ("norms", "activation", "rope")
            if getattr(stack.fusion, name)
        ]
        for where, part in stack.parts():
            if isinstance(part, TritonGemm) and (part.activation or part.residual):
                reasons.append(f"{where}: activation and residual do more than multiply; leave them out")
        return reasons

    @cached_property
    def calls(self) -> list[Call]:
        return recorded(self.whole)

    @property
    def stack(self) -> Stack:
        """What is applied to the products. Image masking and fusion have said which there are, and are done."""
        return replace(self.whole.stack, image_masking=PLAIN["image_masking"], fusion=PLAIN["fusion"])

    @property
    def numerics(self) -> Numerics:
        return build.numerics(self.stack)

    def params(self) -> dict[str, str]:
        return self.whole.params()

    def preflight(self) -> None:
        self.whole.preflight()

    def unmet(self, machine: Machine) -> list[str]:
        return self.whole.unmet(machine)

    def environment(self) -> dict[str, str]:
        return self.whole.environment()

    def proofs(self) -> list[tuple[str, str]]:
        return self.whole.proofs()

    def matrix_rate(self) -> str:
        return self.whole.matrix_rate()

    def work(self) -> list[StageWork]:
        """Every product, its weight read once for each; activations as if they stayed on chip."""
        size, made = VALUE_BYTES[self.matrix_rate()], []
        for stage in STAGES:
            total = StageSum(size)
            for product, _ in self.calls:
                if product.stage == stage:
                    total.gemm(product.rows, product.out, product.inner, bias=product.bias)
            made.append(total.work(stage))
        return made

    def stack_work(self) -> list[StageWork]:
        return self.work()

    def files(self) -> dict[str, Path]:
        return {}

    def model(self, device: torch.device) -> Products:
        cache = cache_bytes(device)
        weights: dict[Product, int] = {}
        for product, which in self.calls:
            weights[product] = max(weights.get(product, 0), which + 1)
        sets = {product: set_count(product, count, cache) for product, count in weights.items()}
        return Products(self.calls, sets, self.whole.precision.model, device).eval()

    def build(self, device: torch.device, inputs: int, progress: Progress) -> "ProductsInstance":
        precision, stack = self.whole.precision, self.stack
        progress("which products")
        start = time.perf_counter()
        model = self.model(device)
        present = {stage: [model.stages[stage]] for stage in STAGES}
        policy = PartPolicy(model, 0, 1, what="products", on=device, present=present)
        synchronize(device)
        startup_s = {"build": time.perf_counter() - start}
        nothing = torch.zeros(1, device=device)

        progress("verify: truth")
        allow_tf32(False)
        with torch.inference_mode():
            truth = [true_result(model, product) for product in model.linears]
        progress("verify: plain products")
        allow_tf32(precision.tf32)

        @torch.inference_mode()
        def run(few: int) -> list[Tensor]:
            policy.compute(Given(), nothing)
            return model.each() if few > 1 else []

        plain = run(2)
        done = apply_checked(policy, stack, lambda few: run(few), plain, progress, "results")
        policy.settle()
        startup_s = {"build": startup_s["build"] + done.build_s, "first_call": done.first_call_s}

        def judge(found: Sequence[Tensor]) -> Verdict:
            return judged(model, found, plain, truth, self.numerics, build.bound(stack), precision.model.name)

        verdict = judge(done.found)
        verdict = Verdict([*done.failures, *verdict.wrong], verdict.metrics)
        shapes = f"{len(self.calls)} of {len(model.linears)} shapes"
        facts = {"products": shapes, "operands": "random, the weights of a call as many as the policy's"}
        if device.type != "cuda":
            facts["caches"] = "unknown: on a CPU weights of a shape take turns as they are in the policy"
        return ProductsInstance(
            policy,
            verdict,
            startup_s,
            facts,
            self.whole.workload.batch_size,
            Given(),
            [np.zeros(1, np.float32)],
            [nothing],
            isinstance(stack.graphs, Capture),
            lambda: judge(run(2)).wrong,
            calls=Counter(product for product, _ in self.calls),
            replay_us=self.config.replay_us,
        )


@dataclass
class ProductsInstance(PartInstance):
    """calls: how often a policy call computes each shape."""

    calls: dict[Product, int] = field(default_factory=dict)
    replay_us: float = 1000.0

    def details(self, settings: MeasureConfig, ceilings: Ceilings | None, progress: Progress) -> Details:
        """Each shape apart, and what their times come to in one policy call."""
        from pi0exp.kernels.bench import captured, sample_us

        made, times = Details(), dict[Product, float]()
        model, device = self.policy.model, self.policy.device
        for product, linears in model.linears.items():
            progress(f"measure {product.name}")
            sets = list(zip(linears, model.inputs[product], strict=True))
            calls = repeats(product, len(sets), ceilings, self.replay_us)
            with torch.inference_mode():
                graph = captured(multiply, sets, calls, device)
                samples = [sample_us(graph, device) / calls for _ in range(rounds(settings))]
            times[product] = median(samples)
            made.samples[f"case_us/{product.name}"] = samples
            made.metrics |= rates(product, times[product], ceilings)
        made.metrics |= totals(self.calls, times, ceilings)
        return made
