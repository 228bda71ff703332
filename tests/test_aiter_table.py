"""Tables of aiter's tuned products: what is wrong with one, which row a shape gets, and what is shipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aiter_fake import COLUMNS, SHUFFLED, SPLIT, WIDE, FakeAiter, gemm_config, row, table

from pi0exp.aiter import Gpu
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gemm.aiter_gemm import SHIPPED
from pi0exp.gemm.tuned_table import KEY, READ, TunedProducts, padded_rows, read_table
from pi0exp.model.config import ModelConfig
from pi0exp.model.names import parameter_shapes
from pi0exp.model.precision import BF16

MI350X, MI300X = Gpu("gfx950", 256), Gpu("gfx942", 304)
BUILD = {"rocm": "7.2.0", "hipblaslt": "1100-abc"}


def test_columns():
    assert KEY + READ == COLUMNS


def test_table_that_is_right(tmp_path: Path):
    rows = read_table(
        table(tmp_path, row(), row(M=32, libtype="torch", kernelName=""), row(kernelName=SPLIT, M=64, splitK=4))
    )
    assert [(r.m, r.n, r.k, r.library) for r in rows] == [
        (16, 2048, 1024, "asm"),
        (32, 2048, 1024, "torch"),
        (64, 2048, 1024, "asm"),
    ]
    assert rows[0].gpu == MI350X


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"kernelName": SHUFFLED}, "takes a shuffled weight, but the row says bpreshuffle False"),
        ({"bpreshuffle": True}, "takes a plain weight, but the row says bpreshuffle True"),
        ({"bpreshuffle": True, "libtype": "skinny"}, "skinny takes no shuffled weight"),
        ({"K": 4304, "N": 1152}, "take K in multiples of 64, not 4304"),
        ({"N": 4304, "K": 1152}, "takes N in multiples of 64, not 4304"),
        ({"N": 1152, "K": 1152, "kernelName": WIDE}, "takes N in multiples of 256, not 1152"),
        ({"bias": True, "kernelName": WIDE}, "adds no bias"),
        ({"splitK": 4}, "cannot split K, but splitK is 4"),
        ({"kernelName": SPLIT}, "must split K, but splitK is 1"),
        ({"kernelName": "Cijk_Alik_Bljk"}, "'Cijk_Alik_Bljk' is no assembly kernel"),
        ({"libtype": "cublas"}, "libtype 'cublas' is none of asm, hipblaslt"),
        ({"M": "x"}, "not a row of a tuned table: invalid literal"),
        ({"bias": 0}, "not a row of a tuned table: '0'"),
    ],
)
def test_row_that_is_wrong(tmp_path: Path, cells: dict[str, Any], reason: str):
    path = table(tmp_path, row(M=1), row(**cells))
    with pytest.raises(UserError, match=f"tuned.csv, line 3: .*{reason}"):
        read_table(path)


def test_table_that_is_wrong(tmp_path: Path):
    columns = tuple(name for name in COLUMNS if name != "gfx")
    with pytest.raises(UserError, match=r"lacks the columns gfx: a table of aiter before v0\.1\.16"):
        read_table(table(tmp_path, row(), columns=columns))
    with pytest.raises(UserError, match=r"lacks the columns solidx, kernelName$"):
        read_table(table(tmp_path, columns=tuple(name for name in COLUMNS if name not in ("solidx", "kernelName"))))
    with pytest.raises(UserError, match="lines 2 and 4: two rows for one shape"):
        read_table(table(tmp_path, row(), row(M=32), row(kernelName=SPLIT, splitK=8)))
    with pytest.raises(UserError, match=r"none\.csv: cannot be read .*No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="several tables"):
        read_table(Path("a.csv:b.csv"))


def test_rows_of_the_fork_that_aiter_refuses(tmp_path: Path):
    """A bshuffle kernel for a plain weight, as a published table for the MI350 has it."""
    bad = row(M=788, N=2048, K=16384, kernelName=SHUFFLED)
    with pytest.raises(UserError, match="bshuffle"):
        read_table(table(tmp_path, bad))


def test_table_for_another_gpu(tmp_path: Path):
    path = table(tmp_path, row(gfx="gfx942", cu_num=256))
    with pytest.raises(
        UnsupportedError, match=r"tuned for gfx942 with 256 compute units; this is gfx942 with 304 compute"
    ):
        TunedProducts(path, MI300X, BUILD)
    mixed = table(tmp_path, row(gfx="gfx942", cu_num=304), row(M=32))
    assert TunedProducts(mixed, MI300X, BUILD).find(16, 2048, 1024, False, False) is not None
    assert TunedProducts(mixed, MI300X, BUILD).find(32, 2048, 1024, False, False) is None


def test_rows_of_hipblaslt_belong_to_one_build(tmp_path: Path):
    path = table(tmp_path, row(), row(M=32, libtype="hipblaslt", solidx=618300, kernelName=""))
    sidecar = path.with_suffix(".json")
    with pytest.raises(
        UnsupportedError, match=r"line 3: hipblaslt rows are valid for one build .*tuned\.json does not tell"
    ):
        TunedProducts(path, MI350X, BUILD)
    sidecar.write_text(json.dumps({**BUILD, "hipblaslt": "1000-xyz"}))
    with pytest.raises(UnsupportedError, match=r"1000-xyz.*this machine has .*1100-abc.*; tune here"):
        TunedProducts(path, MI350X, BUILD)
    sidecar.write_text(json.dumps(BUILD))
    assert len(TunedProducts(path, MI350X, BUILD).rows) == 2
    nothing = {"rocm": "", "hipblaslt": ""}
    sidecar.write_text(json.dumps(nothing))
    with pytest.raises(UnsupportedError, match="tune here"):
        TunedProducts(path, MI350X, nothing)


@pytest.mark.parametrize(
    ("m", "n", "padded"),
    [
        (1, 64, (16, 1)),
        (11, 64, (16, 16)),
        (51, 64, (64, 64)),
        (256, 64, (256, 256)),
        (257, 64, (288, 512)),
        (788, 64, (800, 1024)),
        (816, 64, (832, 1024)),
        (1025, 64, (1088, 2048)),
        (4097, 64, (4224, 8192)),
        (9000, 64, (9088, 16384)),
        (9000, 8192, (9088, 8192)),
    ],
)
def test_rows_are_padded_as_aiter_does(m: int, n: int, padded: tuple[int, int]):
    assert padded_rows(m, n) == padded


def test_exact_row_wins_then_the_finer(tmp_path: Path):
    ms = (788, 800, 1024, 16)
    products = TunedProducts(table(tmp_path, *(row(M=m) for m in ms)), MI350X, BUILD)

    def found(m: int, **other: int) -> int | None:
        line = products.find(m, other.get("n", 2048), 1024, False, False)
        return line and line.m

    assert [found(m) for m in (788, 787, 790, 900, 11, 17)] == [788, 800, 800, 1024, 16, None]
    assert found(788, n=4096) is None


def test_rows_of_other_numbers_are_not_for_bf16(tmp_path: Path):
    path = table(tmp_path, row(outdtype="torch.float32"), row(scaleAB=True), row(dtype="torch.float16"))
    assert TunedProducts(path, MI350X, BUILD).rows == {}


# ---- what is shipped


def test_shipped_tables():
    assert read_table(SHIPPED) == []
    header = SHIPPED.read_text().strip().split(",")
    assert header == [*KEY, "libtype", "solidx", "splitK", "us", "kernelName", "err_ratio", "tflops", "bw"]
    names, *lines = (SHIPPED.parent / "pi0_untuned.csv").read_text().split()
    assert names == "M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle"
    assert len(lines) == len(set(lines))
    assert {line.split(",", 4)[4] for line in lines} == {"torch.bfloat16,torch.bfloat16,False,False"}


@pytest.mark.parametrize("pi05", [False, True])
def test_untuned_list_has_every_weight(pi05: bool):
    shapes = parameter_shapes(ModelConfig(pi05=pi05))
    _, *lines = (SHIPPED.parent / "pi0_untuned.csv").read_text().split()
    listed = {(int(n), int(k), bias == "True") for _, n, k, bias, *_ in (line.split(",") for line in lines)}
    weights = {
        (*shape, name.replace("weight", "bias") in shapes)
        for name, shape in shapes.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and name != "embedding.weight"
        and BF16.dtype_of(name) == torch.bfloat16
    }
    assert weights <= listed
    heads = {(2560, 2048, False), (2560, 1024, False), (3456, 1152, True)}
    assert listed - weights == heads | {(32768, 2048, False), (8192, 1024, False)}, "the fused ones"


def test_fake_looks_rows_up_as_the_table_does(tmp_path: Path):
    """Two readings of aiter's source, made apart."""
    path = table(tmp_path, row(M=16), row(M=288), row(M=1024), row(M=8192, N=8192), row(M=2, N=512))
    fake = FakeAiter(table=str(path))
    products = TunedProducts(path, MI350X, BUILD)
    kind = "torch.bfloat16"
    for m in (*range(1, 40), *range(250, 300), 500, 513, 1000, 1023, 1025, 8000, 9000):
        for n in (512, 2048, 8192):
            found = products.find(m, n, 1024, False, False)
            answer = gemm_config(fake, m, n, 1024, False, kind, kind, False, False)
            assert (answer["libtype"], answer.get("M")) == (("asm", str(found.m)) if found else ("torch", None)), (m, n)
