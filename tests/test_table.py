"""The tables of the READMEs: what they say of made-up measurements, and that they leave out no option of conf/."""

import json
from dataclasses import asdict, fields

import pytest
import torch

from pi0exp import compose, point
from pi0exp.config import GROUPS
from pi0exp.experiments import table
from pi0exp.experiments.tables import benches, conf, points, sweeps
from pi0exp.fusion.fusion import Fusion
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.load import write_record
from pi0exp.result import Outcome, Result, record

PRINTS = {"gpu": "Toy GPU", "driver": "1.2", "versions": {"torch": "2.11.0"}, "date": "2026-01-02", "commit": "abcdef"}
ERRORS = {"error/rel_l2": 0.004, "error/rel_l2_plain_bf16": 0.007, "error/ratio_max": 1.25, "error/ratio_mean": 0.5}
LATENCIES = {"latency_ms/p50": 12.34, "latency_ms/p90": 23.45, "latency_host_ms/p50": 34.56, "throughput_hz": 81.04}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(points, "RESULTS", tmp_path)
    return tmp_path


def keep(results, key, words=(), metrics=None, outcome=Outcome.OK, reasons=()):
    """The record that these words would have left."""
    plain = compose.from_words(words)
    names = {name: plain["names"][name] for name in ("model", "workload", "stack") if name in plain["names"]}
    samples = {"latency_ms": [12.0] * 7} if outcome is Outcome.OK else {}
    made = Result(outcome, list(reasons), "REORDERED", metrics=metrics or {}, samples=samples, fingerprint=PRINTS)
    write_record(record(key * 16, "toy", point.stack_params(plain) | names, point.experiment_of(plain), made), results)


def rows(text):
    """Cells of each row under the head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# ---- points


def test_machine_line_has_all_versions_that_occur():
    other = PRINTS | {"driver": "1.3", "versions": {"torch": "2.12.0"}, "date": "2026-01-03"}
    assert points.machine_line([other, PRINTS, other]) == (
        "Toy GPU, driver 1.2, 1.3, torch 2.11.0, 2.12.0, 2026-01-02, 2026-01-03, commit abcdef"
    )
    assert points.machine_line([PRINTS | {"driver": ""}]).startswith("Toy GPU, driver -, torch 2.11.0, ")


def test_latencies_slowest_first_and_failures_with_their_reason(results):
    keep(results, "a", ["stack=2_sdpa"], ERRORS | LATENCIES)
    keep(results, "b", [], ERRORS | LATENCIES | {"latency_ms/p50": 99.0, "roofline/share": 0.256})
    keep(results, "c", ["gemm=triton"], ERRORS, Outcome.WRONG_NUMERICS, ["observation 3 is too far"])
    text = points.times("toy")
    assert text.startswith("Toy GPU, driver 1.2, torch 2.11.0, 2026-01-02, commit abcdef; 7 calls back to back.\n\n")
    plain, sdpa, wrong = rows(text)
    error = "4.0e-03 (7.0e-03)"
    times = ["23.45", "34.56", "81.0"]
    assert plain == ["pi0", "default", "none: plain PyTorch", "REORDERED", "99.00", *times, "26 %", error]
    assert sdpa == ["pi0", "default", "`2_sdpa`", "REORDERED", "12.34", *times, "-", error]
    assert wrong[2:5] == ["`gemm=triton`", "REORDERED", "wrong_numerics"]
    assert wrong[5:] == ["-"] * 4 + [f"{error}; observation 3 is too far"]


def test_checks_show_no_latency(results):
    shallow = ["model.expert.depth=2", "model.paligemma.depth=2"]
    keep(results, "a", [*shallow, "workload.num_steps=3"], ERRORS | LATENCIES)
    keep(results, "b", [*shallow, "model.vision.depth=1"], None, Outcome.UNSUPPORTED, ["needs a | b", "and more"])
    text = points.checks("toy")
    assert "2 points: 1 ok, 1 unsupported. All with model.expert.depth=2, model.paligemma.depth=2.\n" in text
    assert not any(time in text for time in ("12.34", "23.45", "34.56", "81.0", "12.0"))
    ok, unsupported = rows(text)
    assert ok[:2] == ["pi0", "default num_steps=3"]
    assert ok[4:] == ["4.0e-03 (7.0e-03)", "1.25", "0.50", "ok"]
    assert unsupported[0] == "pi0 vision.depth=1"
    assert unsupported[4:] == ["-", "-", "-", "unsupported: needs a &#124; b; and more"]


def test_two_machines_two_tables(results):
    keep(results, "a", [], ERRORS | LATENCIES)
    folder = results / "toy" / "toy-gpu"
    (results / "toy" / "other").mkdir()
    (results / "toy" / "other" / "file.json").write_text((folder / f"{'a' * 16}.json").read_text())
    assert points.times("toy").count("calls back to back") == points.checks("toy").count("1 points") == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "none: plain PyTorch"),
        (["attention=sdpa", "graphs=manual"], "`attention=sdpa graphs=manual`"),
        (["attention=sdpa", "attention.denoise=eager"], "`attention=sdpa attention.denoise=eager`"),
        (["attention=sdpa", "attention.denoise=sdpa"], "`attention=sdpa`"),
        (
            ["attention=sdpa", "attention.backend=math", "attention.denoise=sdpa"],
            "`attention=sdpa attention.denoise=sdpa attention.backend=math`",
        ),
        (["fusion=projections", "fusion.rewrites.hoist_time=true"], "`fusion=projections +hoist_time`"),
        (["stack=5_cameras"], "`5_cameras`"),
        (["stack=5_cameras", "fusion.rewrites.rope_tables=true"], "`5_cameras +rope_tables`"),
        (["stack=5_cameras", "fusion.rewrites.batch_cameras=false"], "`5_cameras -batch_cameras`"),
        (["stack=5_cameras", "fusion=kernels"], "`5_cameras fusion=kernels`"),
        (
            ["stack=5_cameras", "fusion=kernels", "fusion.rewrites.batch_cameras=false"],
            "`5_cameras fusion=kernels -batch_cameras`",
        ),
        (["stack=8_compiled", "compile_mode.region=stage"], "`8_compiled compile_mode.region=stage`"),
        (["stack=8_compiled", "compile_mode=none"], "`8_compiled compile_mode=none`"),
        (["stack=mi350_best", "attention.prefill=null"], "`mi350_best attention.prefill=sdpa`"),
    ],
)
def test_options_in_few_words(words, text):
    plain = compose.from_words(words)
    names = {"stack": plain["names"]["stack"]} if "stack" in plain["names"] else {}
    assert points.short(names | point.stack_params(plain)) == text


def test_stack_that_is_gone_hides_nothing():
    params = point.stack_params(compose.from_words(["stack=5_cameras"]))
    text = points.short({"stack": "old"} | params)
    assert text.startswith("`old image_masking=skip")
    assert "+batch_cameras" in text
    assert text.endswith("attention=sdpa graphs=manual`")


# ---- kernels


def test_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "TIMES", tmp_path)
    assert benches.kernels("toy") == points.NONE_YET
    states = {"op": "ok", "eager": "ok", "compile": "error", "cudnn": "ok", "flash": "declined"}
    common = {"kernel": "attend", "flops": 1e6, "bytes_moved": 2e6}
    found = {
        "fingerprint": PRINTS,
        "ceilings": {"bytes_per_s": 1e12, "flops_per_s": 1e15},
        "settings": {"rounds": 5},
        "rows": [
            common
            | {
                "case": "good",
                "contestants": [{"name": name, "state": state, "reason": ""} for name, state in states.items()],
                "us": {"op": 8.0, "eager": 20.0, "compile": None, "cudnn": 6.0, "flash": None},
            },
            common
            | {
                "case": "bad",
                "contestants": [{"name": "op", "state": "wrong", "reason": "out: NaN"}],
                "us": {"op": None},
            },
        ],
    }
    (tmp_path / "toy.json").write_text(json.dumps(found))
    text = benches.kernels("toy")
    assert "commit abcdef; medians of 5 rounds; copy 1.00 TB/s, products 1000 TFLOP/s.\n" in text
    good, bad = rows(text)
    assert good == ["attend", "good", "8.00", "25 %", "2.50 x", "error", "cudnn 0.75 x, flash declined"]
    assert bad == ["attend", "bad", "wrong", "-", "-", "-", "out: NaN"]


def test_kernels_read_what_the_bench_writes():
    bench = pytest.importorskip("pi0exp.kernels.bench", reason="Triton is there on Linux only")
    names = {one.name for one in fields(bench.Row)} | {"us"}
    assert {"kernel", "case", "flops", "bytes_moved", "contestants", "us"} <= names
    assert {"name", "state", "reason"} <= {one.name for one in fields(bench.Contestant)}
    assert {"bytes_per_s", "flops_per_s"} <= {one.name for one in fields(bench.Ceilings)}
    assert set(bench.contestants(next(iter(bench.discover().values())), True)) >= {*benches.OWN}


# ---- sweeps


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Writes a made-up file of times."""
    monkeypatch.setattr(benches, "TIMES", tmp_path)

    def write(found):
        about = {"command": [], "fingerprint": PRINTS | {"arch": "sm_90"}}
        (tmp_path / "toy.json").write_text(json.dumps(about | found))

    return write


@pytest.mark.parametrize("kind", ["attention", "gemm", "norms", "chain"])
def test_sweeps_that_are_not_there(kind, times):
    assert table.made(kind, "toy") == points.NONE_YET


def test_attention_has_the_launch_of_today_beside_the_best_backend(times, monkeypatch):
    now, other = {"block_m": 64, "programs": 1}, {"block_m": 32, "programs": 1}
    monkeypatch.setattr(sweeps, "_attention_launch", lambda arch, case: now)

    def swept(case, final, *candidates):
        first = [{"case": case, "split": False, **launch, "us": us} for launch, us in candidates]
        libraries = [[9.0, "cudnn"], [6.0, "flash"]]
        return [*first, {"case": case, "split": False, "final": final, "libraries": libraries}]

    found = [
        *swept("a", [[3.0, other], [4.0, now]], (other, 3.5), (now, 4.5)),
        *swept("b", [[3.0, other]], (other, 3.5), (now, 8.0)),
        *swept("c", [[3.0, other]], (other, 3.5)),
        *swept("a", [[1.0, other]], (other, 1.5)),
    ]
    times({"found": found})
    text = table.made("attention", "toy")
    assert text.startswith("Toy GPU, driver 1.2, torch 2.11.0, 2026-01-02, commit abcdef; ours")
    assert rows(text) == [
        ["a", "flash", "4.00", "6.00", "1.50 x"],
        ["b", "flash", "8.00 *", "6.00", "0.75 x"],
        ["c", "-", "-", "-", "-"],
    ]


def test_gemm_has_the_launch_of_today_and_the_fastest_beside_cublas(times, monkeypatch):
    candidates = pytest.importorskip(
        "pi0exp.experiments.sweeps.gemm_candidates", reason="Triton is there on Linux only"
    )
    monkeypatch.setattr(sweeps, "_skinny_launch", lambda arch, M, product: {"BN": M})
    monkeypatch.setattr(sweeps, "_large_launch", lambda arch, M, product: "now" if product.bias else "gone")
    ranked = [[2.0, "held", {"BN": 1}], [4.0, "held", {"BN": 11}]]
    found = {
        f"single {M} {name}": {"cublas_us": 5.0, "ranked": ranked}
        for M in candidates.ROWS
        for name in candidates.SKINNY
    }
    us = {"cublas product": 3.0, "cublas all": 6.0, "now": 4.0, "other": 2.0}
    times({"found": found | {f"gemm {name}": us for name in candidates.LARGE}})
    made = rows(table.made("gemm", "toy"))
    assert len(made) == 2 * 4 + 8
    assert made[0] == ["11", "qkv, 2560 x 1024", "-", "4.00", "2.00", "5.00", "1.25 x", "-", "-"]
    assert made[2][:3] == ["11", "gate_up, 8192 x 1024", "gated, gelu_tanh"]
    assert made[4] == ["51", "qkv, 2560 x 1024", "-", "-", "2.00", "5.00", "-", "-", "-"]
    bias = ["768", "vis out, 1152 x 1152", "bias, residual"]
    assert made[9] == [*bias, "4.00", "2.00", "3.00", "0.75 x", "6.00", "1.50 x"]
    assert made[15] == ["788", "pre down, 2048 x 16384", "residual", "-", "2.00", "3.00", "-", "6.00", "-"]


def test_norms_have_the_share_of_the_copy_rate_of_the_same_gpu(times, results):
    rank = [[2.0, "{'ROWS': 1, 'num_warps': 8}"], [1.5, "table"], [3.0, "{'ROWS': 4, 'num_warps': 8}"]]
    times({"found": {"copy": 9.0, "rows": [{"kernel": "norm", "case": "small", "rank": rank, "bytes": 2_000_000}]}})
    text = table.made("norms", "toy")
    assert "no point of `stacks` measured the copy rate" in text
    assert rows(text) == [["norm", "small", "ROWS 1, num_warps 8", "2.00", "1000", "-"]]
    for key, rate in (("a", 4.0), ("b", 2.0), ("c", 5.0)):
        keep(results, key, [], ERRORS | LATENCIES | {"ceilings/copy_tb_per_s": rate})
    (results / "toy").rename(results / "stacks")
    text = table.made("norms", "toy")
    assert "copy 4.00 TB/s, the median of 3 points of `stacks`" in text
    assert rows(text)[0][-1] == "25 %"
    other = results / "stacks" / "toy-gpu" / f"{'b' * 16}.json"
    other.write_text(other.read_text().replace("Toy GPU", "Other GPU"))
    assert "copy 4.50 TB/s, the median of 2 points" in table.made("norms", "toy")


def test_chain(times):
    ms = {"cublas": 4.5, "ours": 3.0, "ours without dependent launch": 5.0}
    one = {"samples_ms": {name: [value] * 15 for name, value in ms.items()}, "ms": ms, "same_of_20": 19, "speedup": 1.5}
    times({"M=11": one})
    text = table.made("chain", "toy")
    assert "commit abcdef; 15 rounds." in text
    assert rows(text) == [["11", "4.500", "3.000", "5.000", "1.50 x", "19 of 20"]]


def test_launches_of_today_are_those_of_the_ops(monkeypatch):
    launches = pytest.importorskip("pi0exp.kernels.attention_launch", reason="Triton is there on Linux only")
    from pi0exp.experiments.sweeps.attention import CASES
    from pi0exp.kernels.kernel import arguments_of

    monkeypatch.setattr(launches, "architecture", lambda device: "sm_90")
    for name, (_, case) in CASES.items():
        expected = launches.launch_for(name.split(",")[0], arguments_of(case, torch.device("cpu"))[0])
        assert sweeps._attention_launch("sm_90", name) == asdict(expected)


@pytest.mark.parametrize("kind", ["attention", "gemm", "norms"])
def test_committed_sweeps_have_the_launches_of_today(kind, monkeypatch):
    """A launch table that is changed without a sweep would show here as a row without a time."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    monkeypatch.setattr(points, "RESULTS", compose.PACKAGE / "experiments" / "results")
    made = rows(table.made(kind, f"nvidia-h200/sweep_{kind}"))
    ours = {"attention": 2, "gemm": 3, "norms": 5}[kind]
    assert made
    assert all(row[ours] != "-" for row in made)


# ---- conf/


def test_every_option_has_a_row_of_full_cells():
    files = {group: {file.stem for file in (compose.CONF / group).glob("*.yaml")} for group in GROUPS}
    found = rows(conf.options())
    assert {row[0] for row in found} == {f"`{group}={name}`" for group, names in files.items() for name in names}
    assert all(len(row) == 5 and all(row) for row in found)
    assert [row[0] for row in found if row[0] in ("`attention=eager`", "`attention=aiter`")] == [
        "`attention=eager`",
        "`attention=aiter`",
    ]
    needs = {row[0]: row[3:] for row in found}
    assert needs["`attention=eager`"] == ["EXACT", "-"]
    assert needs["`graphs=manual`"] == ["EXACT", "a GPU"]
    assert needs["`gemm=hipblaslt`"] == ["REORDERED", "an AMD GPU"]
    assert needs["`gemm=aiter`"] == ["REORDERED", "AMD MI300 or MI350"]
    assert needs["`image_masking=ignore`"] == ["APPROXIMATE", "-"]


def test_every_stack_and_every_input_has_a_row():
    found = rows(conf.stacks())
    assert {row[0].strip("`") for row in found} == {file.stem for file in (compose.CONF / "stack").glob("*.yaml")}
    assert all(len(row) == 5 and all(row) for row in found)
    sets = {row[0].strip("`"): row[2] for row in found}
    assert sets["0_eager"] == "nothing"
    assert sets["3_skip"] == "`2_sdpa image_masking=skip`"
    assert sets["5_cameras"] == "`4_projections +batch_cameras`"
    folders = {group: compose.CONF / group for group in ("subject", "model", "workload", "measure")}
    folders["study"] = compose.PACKAGE / "experiments" / "study"
    names = {f"`{group}={file.stem}`" for group, folder in folders.items() for file in folder.glob("*.yaml")}
    assert {row[0] for row in rows(conf.inputs())} == names
    assert all(all(row) for row in rows(conf.inputs()))


def test_every_switch_of_fusion_has_a_row():
    own = [f"`fusion.{one.name}`" for one in fields(Fusion) if one.name != "rewrites"]
    rewrites = [f"`fusion.rewrites.{one.name}`" for one in fields(Rewrites)]
    assert [row[0] for row in rows(conf.switches())] == own + rewrites
    assert all(row[1] for row in rows(conf.switches()))


def test_packages_are_not_hardware():
    assert conf.needed([["needs x"], ["needs x"], ["needs x"], ["needs x"]]) == "-"
    assert conf.needed([["no GPU", "needs x"], ["needs x"], ["needs x"], ["needs x"]]) == "a GPU"


# ---- blocks


def test_blocks_are_replaced_and_nothing_else(results):
    text = "a\n<!-- table toy -->\nold\n<!-- end -->\nb <!-- example -->\n<!-- conf switches -->\n<!-- end -->\n"
    new = table.written(text)
    assert new.startswith(f"a\n<!-- table toy -->\n{points.NONE_YET}<!-- end -->\nb <!-- example -->\n<!-- conf")
    assert "`fusion.qkv`" in new
    assert table.written(new) == new
    keep(results, "a", [], ERRORS | LATENCIES)
    assert "12.34" in table.written(new)


@pytest.mark.parametrize("block", ["chart toy", "conf nothing", "card toy/abc"])
def test_unknown_blocks_are_refused(block):
    with pytest.raises(SystemExit, match=block.split()[0].replace("card", "no result abc")):
        table.written(f"<!-- {block} -->\n<!-- end -->")
