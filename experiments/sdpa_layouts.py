"""Which kernel of SDPA, and which layout of shared heads and masks, is fast at Pi0's attention shapes?

    python experiments/sdpa_layouts.py [RESULTS_FOLDER]

Times every form in a CUDA graph of 36 launches and writes microseconds a call, with the error against float32, to
sdpa_layouts/<gpu>.csv. Forms that a kernel refuses are recorded as such. Needs a GPU.

B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

import csv
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0exp.load import gpu_slug
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.model.layers import eager_attend
from pi0exp.model.mask import Mask, suffix_mask

LAUNCHES, REPLAYS = 36, 11
BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """rows: T. prefix: keys before the rows' own. blind: the first row may not see the others (Pi0's state token)."""

    name: str
    rows: int
    prefix: int
    heads: int
    kv_heads: int
    head_dim: int
    blind: bool = False


SHAPES = (
    Shape("denoise pi0, horizon 10", 11, 788, 8, 1, 256, blind=True),
    Shape("denoise pi0, horizon 50", 51, 788, 8, 1, 256, blind=True),
    Shape("denoise pi05, horizon 50", 50, 968, 8, 1, 256),
    Shape("prefill, 788 tokens", 788, 0, 8, 1, 256),
    Shape("vision, one picture", 256, 0, 16, 16, 72),
)


def rows_form(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor | None) -> Tensor:
    """The heads that share a key/value head as rows of one attention."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKRH = q_BTNH.unflatten(2, (K, N // K)).permute(0, 2, 1, 3, 4).reshape(B, K, T * N // K, H)
    mask = None if visible_BTS is None else visible_BTS[:, None].repeat_interleave(N // K, dim=2)
    out_BKRH = F.scaled_dot_product_attention(q_BKRH, k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), attn_mask=mask)
    return out_BKRH.unflatten(2, (T, N // K)).permute(0, 2, 1, 3, 4).reshape(B, T, N, H)


def gqa_form(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor | None) -> Tensor:
    """Shared heads by `enable_gqa`."""
    mask = None if visible_BTS is None else visible_BTS[:, None]
    qkv = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    return F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def view_form(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor | None) -> Tensor:
    """Shared heads as a view of stride 0."""
    B, S, K, H = k_BSKH.shape
    N = q_BTNH.shape[2]
    k_BNSH, v_BNSH = (
        x.transpose(1, 2)[:, :, None].expand(B, K, N // K, S, H).reshape(B, N, S, H) for x in (k_BSKH, v_BSKH)
    )
    mask = None if visible_BTS is None else visible_BTS[:, None]
    return F.scaled_dot_product_attention(q_BTNH.transpose(1, 2), k_BNSH, v_BNSH, attn_mask=mask).transpose(1, 2)


Form = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
FORMS: dict[str, Form] = {"rows": rows_form, "gqa": gqa_form, "view": view_form}


def apart(form: Form) -> Form:
    """The first row as an attention of its own over what it may see, so that neither needs a mask."""

    def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor | None) -> Tensor:
        seen = k_BSKH.shape[1] - q_BTNH.shape[1] + 1
        first = form(q_BTNH[:, :1], k_BSKH[:, :seen], v_BSKH[:, :seen], None)
        return torch.cat([first, form(q_BTNH[:, 1:], k_BSKH, v_BSKH, None)], dim=1)

    return attend


def graph_us(call: Callable[[], object]) -> float:
    """Median microseconds of one call among `LAUNCHES` in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    samples = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(1e3 * start.elapsed_time(stop) / LAUNCHES)
    return median(samples[1:])


def measured(shape: Shape) -> list[dict[str, object]]:
    """A row for every form and backend."""
    keys = shape.prefix + shape.rows
    q_BTNH = torch.randn(1, shape.rows, shape.heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    k_BSKH, v_BSKH = (
        torch.randn(1, keys, shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    mask: Mask | None = None
    if shape.prefix:
        real = torch.ones(1, shape.prefix, dtype=torch.bool, device="cuda")
        mask = suffix_mask(real, shape.rows, full=True, blind=shape.blind)
    visible = mask.visible() if mask is not None and shape.blind else None
    scale = shape.head_dim**-0.5
    truth = eager_attend(q_BTNH.float(), k_BSKH.float(), v_BSKH.float(), mask, scale)

    def row(form: str, backend: str, call: Callable[[], Tensor]) -> dict[str, object]:
        at = {"shape": shape.name, "form": form, "backend": backend}
        try:
            error = ((call().float() - truth).norm() / truth.norm()).item()
            return at | {"us": graph_us(call), "rel_l2": error}
        except RuntimeError as refused:
            return at | {"refused": str(refused).splitlines()[0]}

    found = [row("eager", "-", lambda: eager_attend(q_BTNH, k_BSKH, v_BSKH, mask, scale))]
    forms = {name: (form, visible) for name, form in FORMS.items()}
    if shape.blind:
        forms |= {f"{name}, first row apart": (apart(form), None) for name, form in FORMS.items()}
    for name, (form, given) in forms.items():
        for backend, kernel in BACKENDS.items():

            def call(form: Form = form, given: Tensor | None = given, kernel: SDPBackend | None = kernel) -> Tensor:
                if kernel is None:
                    return form(q_BTNH, k_BSKH, v_BSKH, given)
                with sdpa_kernel(kernel):
                    return form(q_BTNH, k_BSKH, v_BSKH, given)

            found.append(row(name, backend, call))
    return found


def main() -> int:
    machine = this_machine()
    if not machine.has_gpu:
        print("sdpa_layouts needs a GPU; this machine has none", file=sys.stderr)
        return 3
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "experiments" / "results"
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="__main__")  # why kernels refuse is in the table
    rows = [row for shape in SHAPES for row in measured(shape)]
    target = results / "sdpa_layouts" / f"{gpu_slug(machine.gpu)}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = fingerprint(machine)
    where = {name: facts[name] for name in ("gpu", "driver", "commit", "dirty", "date")} | facts["versions"]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["shape", "form", "backend", "us", "rel_l2", "refused", *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)
    for row in rows:
        time = f"{row['us']:8.1f} us" if "us" in row else "   refused "
        print(f"{row['shape']:26} {row['form']:24} {row['backend']:10} {time}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
