"""Triton kernels against their references: under Triton's interpreter everywhere, as they are on a GPU.

TRITON_INTERPRET decides when a kernel's file is imported, so the interpreter has a process of its own: this file run as
a script, which prints a line of JSON for each case.
"""

import json
import math
import sys
import traceback
from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from interpreter import interprets
from torch._subclasses import FakeTensorMode

from pi0exp.kernels import kernel as contract
from pi0exp.kernels.kernel import INTERPRETED, Case, Kernel, arguments_of, check, compare, discover, results

CPU = torch.device("cpu")
KERNELS = discover()
SMALL = [(name, case.name) for name, kernel in KERNELS.items() for case in kernel.cases if case.small]
ALL = [(name, case.name) for name, kernel in KERNELS.items() for case in kernel.cases]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that torch can use; this machine has none"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: kernels cannot be traced")


def case_of(name: str, case: str) -> Case:
    return next(c for c in KERNELS[name].cases if c.name == case)


def forms(tensors: list[torch.Tensor]) -> list[list[Any]]:
    return [[str(x.dtype), list(x.shape), list(x.stride())] for x in tensors]


def used(kernel: Kernel, case: Case, device: torch.device) -> tuple[list[torch.Tensor], list[str]]:
    """Its results; what the op did to arguments that it does not own, and results that share memory with arguments."""
    given, before = arguments_of(case, device), arguments_of(case, device)
    made = results(kernel.op, case, given)
    returned = made[: -len(case.mutates) or None]
    inputs = {i: x for i, x in enumerate(given) if isinstance(x, torch.Tensor)}
    changed = [i for i, x in inputs.items() if i not in case.mutates and not torch.equal(x, before[i])]
    memory = {x.untyped_storage().data_ptr() for x in inputs.values()}
    shared = [i for i, x in enumerate(returned) if x.untyped_storage().data_ptr() in memory]
    return made, [f"argument {i} is changed" for i in changed] + [f"result {i} is an argument's memory" for i in shared]


def interpret(names: list[str]) -> None:
    """The other process: runs all small cases of these kernels on the CPU."""
    torch.set_num_threads(1)
    for name in names:
        for case in (c for c in KERNELS[name].cases if c.small):
            record: dict[str, Any] = {"kernel": name, "case": case.name, "error": ""}
            try:
                record["wrong"] = [f"{c.output}: {c.wrong}" for c in check(KERNELS[name], case, CPU) if c.wrong]
                made, record["misuse"] = used(KERNELS[name], case, CPU)
                record["forms"] = forms(made)
            except Exception:
                record["error"] = traceback.format_exc()
            print(json.dumps(record), flush=True)


@pytest.fixture(scope="module")
def interpreted(request) -> dict[tuple[str, str], dict[str, Any]]:
    """(kernel, case) -> record, of the kernels whose tests were asked for."""
    records = interpreter.lines(request.path, *sorted({*interpreter.asked(request, "name")}), timeout_s=500)
    return {(record["kernel"], record["case"]): record for record in records}


@interprets
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_interpreted(name, case, interpreted):
    record = interpreted[name, case]
    assert record["error"] == ""
    assert record["wrong"] == []
    assert record["misuse"] == []


@interprets
@compiles
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_fake_tensors_have_the_results_form(name, case, interpreted):
    """What torch.compile believes of the op, without running it, is what it does."""
    with FakeTensorMode() as mode:
        given = tuple(
            mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for x in case_of(name, case).make(torch.Generator(), CPU)
        )
        found = forms(results(KERNELS[name].op, case_of(name, case), given))
    assert found == interpreted[name, case]["forms"]


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_tested_and_timed(name):
    kernel = KERNELS[name]
    small = [case for case in kernel.cases if case.small]
    dtypes = {x.dtype for case in small for x in case.make(torch.Generator(), CPU) if isinstance(x, torch.Tensor)}
    # A layer of stream_layers rounds six times: the interpreter, which cuts off, is past the limit. bf16 is for a GPU.
    # What stream_embed computes is float32 in every precision. What no interpreter runs, only a GPU can test.
    wanted = {torch.float32} | ({torch.bfloat16} if name not in ("stream_layers", "stream_embed") else set())
    assert wanted <= dtypes if kernel.interpretable else not small
    assert len({case.name for case in kernel.cases}) == len(kernel.cases)
    assert all(case.bytes_moved > 0 for case in kernel.cases if case.pi0)
    assert any(case.pi0 for case in kernel.cases)
    assert kernel.ahead_of_time


def spoilt(call, spoil):
    """`call`, whose first result, or what it first wrote to, is spoilt behind it."""

    def wrong(*arguments):
        returned = call(*arguments)
        if isinstance(returned, torch.Tensor):
            return spoil(returned)
        return (spoil(returned[0]), *returned[1:])

    return wrong


def one_value_off(x):
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[x.abs().argmax()] *= 1.0625
    return x


def one_nan(x):
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[0] = math.nan
    return x


SPOILS = {
    "one value off": one_value_off,
    "all 5 % off": lambda x: x * 1.05,
    "one NaN": one_nan,
    "another dtype": lambda x: x.double(),
    "one row more": lambda x: torch.cat([x, x[:1]]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_reference_passes_its_own_comparison(name):
    for case in (c for c in KERNELS[name].cases if c.small):
        assert [c.wrong for c in check(KERNELS[name], case, CPU, KERNELS[name].reference) if c.wrong] == []


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", KERNELS)
def test_spoilt_result_is_found(name, spoil):
    reference = KERNELS[name].reference
    wrong = spoilt(reference, SPOILS[spoil])
    for case in (c for c in KERNELS[name].cases if c.small):
        if not results(reference, case, arguments_of(case, CPU))[0].numel():
            continue  # nothing to spoil
        assert any(c.wrong for c in check(KERNELS[name], case, CPU, wrong)), case.name


def test_comparison_at_its_limits():
    """One rounding is allowed to an op whose eager reference is exact; a little more is not."""
    exact = torch.full((64,), 1.0, dtype=torch.float64)
    eager, u = exact.bfloat16(), 2.0**-8
    assert torch.finfo(torch.bfloat16).eps / 2 == u
    assert compare("x", (exact - u).bfloat16(), eager, exact).wrong == ""  # numbers below 1 are u apart
    assert "value" in compare("x", (exact - 2 * u).bfloat16(), eager, exact).wrong
    slightly = torch.full((64,), 1.0 + u, dtype=torch.float32)
    found = compare("x", slightly, exact.float(), exact)
    assert "value" in found.wrong
    assert "L2" in found.wrong
    counts = torch.tensor([1, 2])
    assert compare("x", counts, counts, counts).wrong == ""
    assert compare("x", counts, counts + 1, counts).wrong == "2 of 2 differ"


def rms_norm(x, weight, eps):
    return KERNELS["rms_norm"].reference(x, weight, eps)


def interleaved(x, cos, sin):
    """Neighbours as pairs, as other models have them."""
    half = x.shape[-1] // 2
    a, b, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2).to(x.dtype)


def mutants() -> list[tuple[str, str, Any]]:
    """(kernel, fault, function): mistakes one makes in writing such a kernel."""
    r = {name: kernel.reference for name, kernel in KERNELS.items()}

    def a_row_beside(*arguments):
        q = r["rope_qkv_cached"](*arguments)
        for room in arguments[5:7]:
            room.copy_(room.roll(1, dims=1))
        return q

    def timed(mutant):
        """A mistake in both launches, where there are both."""
        return lambda *given: (mutant if len(given) > 3 else r["stream_embed"])(*given)

    def silu_without_a_time(*given):
        made = r["stream_embed"](*given)
        return made if len(given) > 3 else F.silu(made)

    def neighbours_squares(x, squares, *others):
        return r["stream_gated"](x, squares.roll(1, dims=1), *others)

    def without_scale(*arguments):
        x, _, squares = r["stream_residual"](*arguments)
        return x, x, squares

    def squares_of_the_branch(h, weight, x, *others):
        return (*r["stream_residual"](h, weight, x, *others)[:2], r["stream_residual"](h, weight, x * 0, *others)[2])

    def swapped_rooms(*a):
        return r["stream_qkv"](*a[:6], a[7], a[6], *a[8:])

    return [
        ("stream_qkv", "no offset", lambda *a: r["stream_qkv"](*a[:3], None, *a[4:])),
        ("stream_qkv", "keys and values swapped", swapped_rooms),
        ("stream_qkv", "no eps", lambda *a: r["stream_qkv"](*a[:9], 0.0, a[10])),
        ("stream_gated", "squares of the row beside", neighbours_squares),
        ("stream_residual", "no gate", lambda h, w, x, g, *m: r["stream_residual"](h, w, x, None, *m)),
        ("stream_residual", "xs without its scale", without_scale),
        ("stream_residual", "squares of the branch alone", squares_of_the_branch),
        ("stream_attention", "sees the future", lambda *a: r["stream_attention"](*a[:4], False, *a[5:])),
        ("stream_attention", "sees hidden keys", lambda *a: r["stream_attention"](*a[:3], None, *a[4:])),
        ("stream_begin", "no scale", lambda x, s, like: r["stream_begin"](x, s * 0, like)),
        ("stream_end", "no shift", lambda x, q, t, *m: r["stream_end"](x, q, None, *m)),
        ("stream_end", "the first tokens", lambda x, *m: r["stream_end"](x.flip(1), *m)),
        ("rms_norm", "weight without one", lambda x, w, e: r["rms_norm"](x, w - 1, e)),
        ("rms_norm", "no eps", lambda x, w, e: r["rms_norm"](x, w, 0.0)),
        ("rms_norm", "sum for mean", lambda x, w, e: r["rms_norm"](x * x.shape[-1] ** 0.5, w, e)),
        ("add_rms_norm", "norm of x alone", lambda x, b, w, e: (x + b, rms_norm(x, w, e))),
        ("add_rms_norm", "sum not kept", lambda x, b, w, e: (x, rms_norm(x + b, w, e))),
        ("adarms_norm", "no shift", lambda x, s, t, e: r["adarms_norm"](x, s, t * 0, e)),
        ("adarms_norm", "first modulation for all", lambda x, s, t, e: r["adarms_norm"](x, s[:1], t[:1], e)),
        ("add_adarms_norm", "no gate", lambda x, b, g, *m: r["add_adarms_norm"](x, b, None, *m)),
        (
            "add_adarms_norm",
            "one plus gate",
            lambda x, b, g, *m: r["add_adarms_norm"](x, b, None if g is None else g + 1, *m),
        ),
        ("layer_norm", "no mean", lambda x, w, b, e: (rms_norm(x, w - 1, e) + b).to(x.dtype)),
        ("layer_norm", "no bias", lambda x, w, b, e: r["layer_norm"](x, w, b * 0, e)),
        ("layer_norm", "no eps", lambda x, w, b, e: r["layer_norm"](x, w, b, 0.0)),
        ("add_layer_norm", "norm of x alone", lambda x, y, w, b, e: (x + y, r["layer_norm"](x, w, b, e))),
        ("gated_activation", "exact gelu", lambda g, u, k: (F.silu(g) if k == "silu" else F.gelu(g)) * u),
        ("gated_activation", "kinds swapped", lambda g, u, k: r["gated_activation"](g, u, "silu")),
        ("gated_activation", "gate and up swapped", lambda g, u, k: r["gated_activation"](u, g, k)),
        ("rope_qkv", "turned back", lambda q, k, v, c, s: r["rope_qkv"](q, k, v, c, -s)),
        ("rope_qkv", "keys as they are", lambda q, k, v, c, s: (r["rope_qkv"](q, k, v, c, s)[0], k, v)),
        ("rope_qkv", "neighbours as pairs", lambda q, k, v, c, s: (interleaved(q, c, s), interleaved(k, c, s), v)),
        ("stream_embed", "no time", timed(lambda x, a, b, t, *out: r["stream_embed"](x, a, b, 0 * t, *out))),
        (
            "stream_embed",
            "time behind silu",
            timed(lambda x, a, b, t, w, c: F.linear(F.silu(F.linear(x, a, b)) + t, w, c)),
        ),
        ("stream_embed", "second matrix turned", timed(lambda *a: r["stream_embed"](*a[:4], a[4].T, a[5]))),
        ("stream_embed", "silu without a time", silu_without_a_time),
        ("rope_qkv_cached", "a row beside", a_row_beside),
        ("rope_qkv_cached", "nothing kept", lambda *a: r["rope_qkv"](*a[:5])[0]),
    ]


@pytest.mark.parametrize(("name", "fault", "mutant"), mutants(), ids=lambda value: value if type(value) is str else "")
def test_wrong_maths_is_found(name, fault, mutant):
    found = [c.wrong for case in KERNELS[name].cases if case.small for c in check(KERNELS[name], case, CPU, mutant)]
    assert any(found)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def qkv(T: int, S: int, start: int) -> tuple[Any, ...]:
    turn = rows(1, T, 1, 8)
    return rows(1, T, 2, 8), rows(1, T, 1, 8), rows(1, T, 1, 8), turn, turn, rows(1, S, 1, 8), rows(1, S, 1, 8), start


REFUSED = {
    "float64": ("rms_norm", lambda: (rows(2, 8, dtype=torch.float64), rows(8), 1e-6), "float64"),
    "columns as rows": ("rms_norm", lambda: (rows(8, 2).T, rows(8), 1e-6), "adjacent"),
    "short weight": ("rms_norm", lambda: (rows(2, 8), rows(4), 1e-6), "weight"),
    "branch of another shape": ("add_rms_norm", lambda: (rows(2, 8), rows(1, 8), rows(8), 1e-6), "branch"),
    "bias of another width": ("layer_norm", lambda: (rows(2, 8), rows(8), rows(4), 1e-6), "bias"),
    "too many modulations": ("adarms_norm", lambda: (rows(2, 3, 8), rows(3, 1, 8), rows(3, 1, 8), 1e-6), "scale"),
    "no batch": ("adarms_norm", lambda: (rows(3, 8), rows(1, 1, 8), rows(1, 1, 8), 1e-6), "[B, T, D]"),
    "unknown kind": ("gated_activation", lambda: (rows(2, 8), rows(2, 8), "relu"), "gelu_tanh, silu"),
    "up of another width": ("gated_activation", lambda: (rows(2, 8), rows(2, 4), "silu"), "differ"),
    "rows beyond the room": ("rope_qkv_cached", lambda: qkv(3, 5, 3), "rows 3 to 6 of a room of 5"),
    "rows before the room": ("rope_qkv_cached", lambda: qkv(3, 5, -1), "rows -1"),
    "too many rows": (
        "stream_gated",
        lambda: (rows(1, 65, 8), rows(1, 65, dtype=torch.float32), rows(4, 8), None, 1e-6, torch.zeros(0)),
        "a stream takes 1 to 64",
    ),
    "squares of other rows": (
        "stream_gated",
        lambda: (rows(1, 3, 8), rows(1, 4, dtype=torch.float32), rows(4, 8), None, 1e-6, torch.zeros(0)),
        "[P, M]",
    ),
    "counters of another kind": (
        "stream_gated",
        lambda: (rows(1, 3, 8), rows(1, 3, dtype=torch.float32), rows(4, 8), None, 1e-6, torch.zeros(8)),
        "counters",
    ),
    "more settled keys than there are": (
        "stream_attention",
        lambda: (*[rows(1, 3, 1, 16)] * 3, None, False, 1.0, 4, torch.zeros(0, dtype=torch.int32)),
        "4 of 3 keys",
    ),
    "actions in bfloat16": (
        "stream_embed",
        lambda: (rows(1, 2, 4), *[rows(*shape, dtype=torch.float32) for shape in ((8, 4), (8,), (8,), (8, 8), (8,))]),
        "actions: torch.bfloat16",
    ),
    "time without a second matrix": (
        "stream_embed",
        lambda: [rows(*s, dtype=torch.float32) for s in ((1, 2, 4), (8, 4), (8,), (8,))],
        "together, or not at all",
    ),
    "time of another width": (
        "stream_embed",
        lambda: [rows(*s, dtype=torch.float32) for s in ((1, 2, 4), (8, 4), (8,), (1, 8), (8, 8), (8,))],
        "time is",
    ),
    "turns of other tokens": ("rope_qkv", lambda: (*qkv(3, 5, 0)[:3], rows(1, 2, 1, 8), rows(1, 2, 1, 8)), "turns no"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_arguments_that_do_not_fit_are_refused(fault):
    name, make, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        KERNELS[name].op(*make())


ORPHAN = "import torch\n@torch.library.custom_op('{0}::f', mutates_args=())\ndef f(x: int) -> None: ..."
NAMED = "from pi0exp.kernels.kernel import Kernel\nKERNEL = Kernel('same', None, None, (), ())"


@pytest.mark.parametrize(
    ("files", "message"),
    [({"orphan": ORPHAN}, "orphan"), ({"one": NAMED, "two": NAMED}, "same")],
    ids=["an op without a kernel", "two of one name"],
)
def test_discovery_leaves_nothing_out(files, message, tmp_path, monkeypatch):
    package = f"kernels_{message}"
    folder = tmp_path / package
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text.format(package))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(contract, "__file__", str(folder / "kernel.py"))
    monkeypatch.setattr(contract, "__package__", package)
    with pytest.raises(TypeError, match=message):
        discover()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "case"), ALL)
def test_on_gpu(name, case):
    device = torch.device("cuda", 0)
    assert [c for c in check(KERNELS[name], case_of(name, case), device) if c.wrong] == []
    assert used(KERNELS[name], case_of(name, case), device)[1] == []
    torch.cuda.empty_cache()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_compiled_op_is_the_op(name, case):
    """Inductor may neither change the results nor lose what the op writes to.

    It compiles the kernel anew and may contract products and sums otherwise, which only float32 results show.
    """
    device, kernel = torch.device("cuda", 0), KERNELS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *arguments: kernel.op(*arguments), fullgraph=True, dynamic=False)
    found, plain = (results(call, case_of(name, case), arguments_of(case_of(name, case), device))
                    for call in (compiled, kernel.op))  # fmt: skip
    assert [c for c in check(kernel, case_of(name, case), device, compiled) if c.wrong] == []
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == torch.float32 or torch.equal(a, b)


if __name__ == "__main__":
    interpret(sys.argv[1:])


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.name)
def test_what_an_op_writes_to_is_always_given(kernel: Kernel):
    """torch 2.11 counts the versions of such an argument by its place in the call, and fails where it is left out."""
    schemas = torch._C._jit_get_schemas_for_operator(f"pi0exp::{kernel.name}")
    assert schemas
    for schema in schemas:
        written = [one for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        assert [one.name for one in written if one.has_default_value()] == []
