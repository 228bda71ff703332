"""Every kernel compiles for the GPUs it is meant for, with no GPU there, and uses their registers, memory and matrix
units as intended. What this does not show: that it runs, is right or fast there.
"""

import inspect
import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from pi0exp.kernels import gather
from pi0exp.kernels.kernel import INTERPRETED, AheadOfTime, discover

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}
LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024, "sm_90": 227 * 1024}
"""What one block may have. Triton itself does not refuse more for AMD; the launch would."""
EVERY_DAY = {
    ("rms_norm", "prefill"): ("gfx942", "sm_90"),
    ("add_adarms_norm", "denoise"): ("gfx950",),
    ("add_rms_norm", "denoise, dependent"): ("sm_90",),
    ("attend_halves", "hidden keys, dependent"): ("sm_90",),
    ("attend_split", "attend, denoise, dependent"): ("sm_90",),
    ("add_layer_norm", "vision"): ("gfx942",),
    ("gather", "bytes"): ("gfx942", "sm_90"),
    ("gated_activation", "denoise"): ("gfx950",),
    ("rope_qkv_cached", "denoise"): ("gfx942", "sm_90"),
    ("gemm", "bias + residual + scale"): ("gfx950",),
    ("patch_embed", "pictures, dependent"): ("sm_90",),
    ("patch_embed", "pictures, small tiles"): ("gfx942",),
    ("skinny_gemm", "groups, held"): ("gfx950",),
    ("stream_attention", "10 actions, dependent launch"): ("sm_90",),
    ("stream_embed", "second, dependent"): ("sm_90",),
    ("stream_qkv", "held and split, offset"): ("gfx942",),
    ("stream_ring", "adaptive, hidden keys"): ("sm_90",),
    ("stream_wide", "adaptive, hidden keys"): ("sm_90",),
}
"""Kernel and entry -> targets that are compiled in every run; all others are `slow`."""
ENTRIES = {name: kernel.ahead_of_time for name, kernel in discover().items()} | {"gather": gather.AHEAD_OF_TIME}
EVERY = [(name, entry, target) for name, entries in ENTRIES.items() for entry in entries for target in entry.targets]


def compile_for(entry: AheadOfTime, target: str) -> CompiledKernel:
    """Types of arguments that are constants too are passed over."""
    names = entry.function.arg_names
    types = {name: entry.types[name] for name in names if name not in entry.constants}
    form = GluonASTSource if entry.function.is_gluon() else ASTSource
    source = form(
        entry.function,
        {name: types[name].split(":")[0] if name in types else "constexpr" for name in names},
        {(names.index(name),): value for name, value in entry.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.endswith(":16")},
    )
    # Fused multiply-add is what a launch gets; named here, since a later Triton will leave it out unless asked.
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def waits_as_told(entry: AheadOfTime, ptx: str) -> bool:
    """Only dependent launches wait for the kernel in front; a kernel that calls `wait_for_front` before it reads."""
    wait = ptx.find("griddepcontrol.wait")
    first = re.search(r"\b(?:ld|st)\.global|\bcp\.async", ptx)
    if not entry.constants.get("PDL"):
        return wait < 0
    launch = ptx.find("griddepcontrol.launch_dependents")
    if "wait_for_front(PDL)" in inspect.getsource(entry.function.fn):
        return 0 <= launch < wait < first.start()
    # A step's first kernel lets others start only when all in front of it have ended (`kernels/dependent.py`).
    return 0 <= wait < launch if entry.function.fn.__name__ == "stream_embed_kernel" else 0 <= launch < wait


def amd_facts(assembly: str) -> dict[str, int]:
    """The numbers in the metadata of AMD's code object."""
    names = ("vgpr_spill_count", "sgpr_spill_count", "wavefront_size")
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names}


@pytest.mark.parametrize(
    ("name", "entry", "target"),
    [
        pytest.param(
            name,
            entry,
            target,
            marks=() if target in EVERY_DAY.get((name, entry.name), ()) else pytest.mark.slow,
            id=f"{name}-{entry.name}-{target}",
        )
        for name, entry, target in EVERY
    ],
)
def test_compiles(name, entry, target, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compiled = compile_for(entry, target)
    assert compiled.metadata.shared <= LDS_BYTES[target]
    if target == "sm_90":
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert ".target sm_90a" in compiled.asm["ptx"]
        matrix = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\b", compiled.asm["ptx"])
        assert waits_as_told(entry, compiled.asm["ptx"])
    else:
        assembly = compiled.asm["amdgcn"]
        assert compiled.asm["hsaco"][:4] == b"\x7fELF"
        assert re.search(rf'\.amdgcn_target ".*{target}"', assembly)
        assert amd_facts(assembly) == {"vgpr_spill_count": 0, "sgpr_spill_count": 0, "wavefront_size": 64}
        matrix = re.findall(r"\bv_mfma_\w+", assembly)
    assert bool(matrix) == entry.dots


def test_every_day_entries_exist():
    """A renamed entry must not turn into one that is compiled by nobody."""
    wanted = {(*key, target) for key, targets in EVERY_DAY.items() for target in targets}
    assert wanted <= {(name, entry.name, target) for name, entry, target in EVERY}
