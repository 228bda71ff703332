"""A breakdown as a person reads it."""

import io

from rich.console import Console
from rich.table import Table

from pi0exp.breakdown import STAGES, Breakdown
from pi0exp.kernel_table import CATEGORIES

_NAME_CHARACTERS = 72
_ROUNDING = 1e-3
"""Share of the span; Kineto's times carry less than a nanosecond, of slices of a microsecond."""


def text(found: Breakdown, top: int) -> str:
    """Sums, categories (by stage where stages are told), the top kernels and the top shapes."""
    per = "of one call" if found.calls > 1 else "in all"
    lines = [f"{found.format}: {found.calls} calls" if found.calls > 1 else found.format]
    lines.append(f"kernels, copies, fills   {found.launches:,.0f} {per}, {found.kernels_ms:.3f} ms")
    if found.span_ms is not None and found.overlap_ms is not None and found.idle_share is not None:
        lines.append(f"span                     {found.span_ms:.3f} ms, idle {100 * found.idle_share:.1f} %")
        if found.overlap_ms > _ROUNDING * found.span_ms:
            share = 100 * found.overlap_ms / found.span_ms
            lines.append(f"overlap                  {share:.1f} % of the span, counted for the one that began first")
    else:
        lines.append("span                     not told: the file has only sums, which count overlaps twice")
    lines.append(f"stages                   {found.stages_by}")
    parts = ["\n".join(lines), _rendered(_categories(found)), _rendered(_kernels(found, top))]
    if found.products_ms:
        parts.append(_rendered(_products(found, top)))
        known = 100 * found.products_ms / found.ms["gemm"]
        parts.append(f"The shapes of {known:.0f} % of the GEMM time are known.")
    elif found.ms["gemm"]:
        parts.append(
            "Shapes of products are not known: they need PyTorch's profiler with record_shapes, and kernels that are"
            " launched one by one."
        )
    return "\n\n".join(parts)


def _rendered(table: Table) -> str:
    screen = Console(file=io.StringIO(), width=140, highlight=False)
    screen.print(table, markup=False)
    assert isinstance(screen.file, io.StringIO)
    return "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines())


def _table(names: list[str], texts: int = 1) -> Table:
    """Columns of numbers behind `texts` columns of text."""
    made = Table(box=None, pad_edge=False)
    for i, name in enumerate(names):
        made.add_column(name, justify="left" if i < texts else "right", no_wrap=True)
    return made


def _categories(found: Breakdown) -> Table:
    stages = [stage for stage in STAGES if stage in found.stages]
    made = _table(["category", "ms", "share", *stages])
    for name in CATEGORIES:
        if found.ms[name]:
            inner = [f"{found.stages[stage][name]:.3f}" for stage in stages]
            made.add_row(name, f"{found.ms[name]:.3f}", f"{100 * found.shares()[name]:.1f} %", *inner)
    if stages:
        made.add_row("with gaps", "", "", *(f"{found.stage_ms[stage]:.3f}" for stage in stages))
    return made


def _kernels(found: Breakdown, top: int) -> Table:
    made = _table(["kernel", "category", "count", "ms", "share"], texts=2)
    for row in found.kernels[:top]:
        name = row.name if len(row.name) <= _NAME_CHARACTERS else row.name[: _NAME_CHARACTERS - 1] + "…"
        made.add_row(name, row.category, f"{row.count:,.0f}", f"{row.ms:.3f}", f"{100 * row.share:.1f} %")
    if rest := found.kernels[top:]:
        count, ms = sum(row.count for row in rest), sum(row.ms for row in rest)
        share = f"{100 * ms / found.kernels_ms:.1f} %"
        made.add_row(f"{len(rest)} more", "", f"{count:,.0f}", f"{ms:.3f}", share)
    return made


def _products(found: Breakdown, top: int) -> Table:
    made = _table(["m x n x k", "dtype", "batch", "count", "ms", "TFLOP/s", "of ceiling", "of roofline"], texts=2)
    for row in found.products[:top]:
        one = row.product
        shares = ["-" if share is None else f"{100 * share:.0f} %" for share in (row.of_ceiling, row.of_roofline)]
        made.add_row(
            f"{one.m} x {one.n} x {one.k}",
            one.dtype,
            str(one.batch),
            f"{row.count:,.0f}",
            f"{row.ms:.3f}",
            "-" if row.tflop_per_s is None else f"{row.tflop_per_s:.1f}",
            *shares,
        )
    return made
