"""The sweeps of launches: what they try, that they need a GPU, and what they keep, with stand-ins for its part."""

import json

import pytest
import torch

from pi0exp import compose

pytest.importorskip("triton", reason="Triton is there on Linux only")

from pi0exp.experiments.sweeps import attention, common, gemm, gemm_candidates, norms
from pi0exp.kernels import attention_launch, skinny_gemm
from pi0exp.kernels.kernel import arguments_of

SWEEPS = pytest.mark.parametrize("sweep", [attention, gemm, norms], ids=["attention", "gemm", "norms"])
CPU = torch.device("cpu")


class Pool:
    """For the pool of processes: all in this one."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


class Graph:
    """For a CUDA graph: what was called, once."""

    def __init__(self, call):
        self.out, self.graph = call(), self

    def replay(self):
        self.out = self.out.fill_(1.0) if isinstance(self.out, torch.Tensor) else self.out


@SWEEPS
def test_no_gpu_is_one_line_and_exit_code_3(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep.main([str(tmp_path / "out.json")]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "needs a GPU" in shown.err
    assert not list(tmp_path.iterdir())


@SWEEPS
def test_help_says_the_command(sweep, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--help"])
    assert stopped.value.code == 0
    assert f"python experiments/sweeps/{sweep.__name__.rpartition('.')[2]}.py OUT.json" in capsys.readouterr().out


@SWEEPS
@pytest.mark.parametrize("words", [[], ["a.json", "b.json"], ["no/such/folder/a.json"]])
def test_other_words_are_refused(sweep, words):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(words)
    assert stopped.value.code == 2


def test_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "this_machine", lambda: None)
    monkeypatch.setattr(common, "fingerprint", lambda machine: {"gpu": "Toy GPU"})
    assert common.run("Title\n\nMore", lambda keep: keep([1, 2]), [str(tmp_path / "out.json")]) == 0
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["found"] == [1, 2]
    assert kept["fingerprint"] == {"gpu": "Toy GPU"}
    assert kept["command"]


# ---- candidates


def test_the_table_of_few_rows_is_among_the_candidates():
    for (_, BM, C, K), launch in skinny_gemm.LAUNCH.items():
        M = {16: 11, 64: 51}[BM]
        product = next(one for one in gemm_candidates.SKINNY.values() if (one.C, one.K) == (C, K))
        assert launch in [one for _, one in gemm_candidates.skinny_candidates(M, product)]


def test_the_number_of_candidates_is_that_of_the_launch_table():
    """`kernels/skinny_gemm.py` says of how many its launches are the best."""
    few = sum(
        len(gemm_candidates.skinny_candidates(M, one)) for M in (11, 51) for one in gemm_candidates.SKINNY.values()
    )
    many = sum(len(gemm_candidates.large_candidates(one)) for one in gemm_candidates.LARGE.values())
    assert few + many == 453


def test_candidates_of_attention_differ_in_what_they_do():
    q_BTNH, k_BSKH = torch.empty(1, 11, 8, 16), torch.empty(1, 96, 1, 16)
    launches = [attention_launch.Launch(32, 32, 4, 1, programs=programs) for programs in (2, 6, 9, 10, 100)]
    # 3 tiles of rows and 3 blocks of keys: for 2 programs nothing is split, 6 are two parts, from 9 on three.
    found = attention.distinct(launches, q_BTNH, k_BSKH, True)
    assert [one.programs for one in found] == [6, 9]
    assert attention.distinct(launches, q_BTNH, k_BSKH, False) == launches[:1]


@pytest.mark.parametrize("one", attention.SWEEPS, ids=lambda one: f"{one.case}, split {one.split}")
def test_sweeps_of_attention_are_of_cases(one):
    assert one.case in attention.CASES
    assert one.launches in (attention.BEST, attention.COMBINED) or len(one.launches) > 10


# ---- whole sweeps, without a GPU


def test_attention_keeps_what_the_table_reads(monkeypatch):
    short = {"denoise, 10 actions": (11, 70), "vision, 3 cameras": (16, 16)}
    sweeps = (
        attention.Sweep("vision, 3 cameras", False, attention.VISION[:6]),
        attention.Sweep("denoise, 10 actions", True, attention.DENOISE[:6]),
        attention.Sweep("denoise, 10 actions", True, attention.BEST),
        attention.Sweep("denoise, 10 actions", True, attention.COMBINED),
    )

    def attend(launch, split, *given):
        if launch.block_n == 128:
            raise RuntimeError("too large")
        out = attention.CASES["denoise, 10 actions"][0].reference(*given)
        facts = type("Compiled", (), {"n_regs": 1, "n_spills": 0, "metadata": type("", (), {"shared": 2})})
        return out * (2 if launch.num_warps == 8 else 1), facts, 3

    def arguments(case, device, seed=0):
        T, S = short[case.name]
        q, k, v, *more = arguments_of(case, CPU, seed)
        return q[:1, :T], k[:1, :S], v[:1, :S], *more

    def medians(graphs, rounds):
        return [float(10 * rounds + i) for i in range(len(graphs))]

    monkeypatch.setattr(attention, "DEVICE", CPU)
    monkeypatch.setattr(attention, "SWEEPS", sweeps)
    monkeypatch.setattr(attention, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "arguments_of", arguments)
    monkeypatch.setattr(attention, "captured", lambda call, sets, calls, device: call(*sets[0]))
    monkeypatch.setattr(attention, "medians_us", medians)
    monkeypatch.setattr(attention, "LIBRARIES", {"good": lambda *given: given[0], "bad": declined})
    kept = []
    attention.sweep(lambda found: kept.append(json.loads(json.dumps(found))))
    assert len(kept) == 4
    final = [record for record in kept[-1] if "final" in record]
    assert [record["case"] for record in final] == [one.case for one in sweeps]
    assert all(name == "good" for record in final for _, name in record["libraries"])
    assert [launch["combine_rows"] for _, launch in final[3]["final"]] == [1, 2, 4]
    timed = [record for record in kept[-1] if "us" in record]
    assert all(record["num_warps"] == 4 and record["block_n"] != 128 for record in timed)  # neither wrong nor too large
    assert {record["facts"][0] for record in timed if record["facts"]} == {"ok"}


def declined(*_):
    raise NotImplementedError("takes no mask")


def test_gemm_keeps_what_the_table_reads(monkeypatch):
    tiny = gemm_candidates.Product

    def run(launch, product, x, w, counters, bias, residual):
        if launch == broken:
            raise RuntimeError("too large")
        return gemm.gemm_epilogue.reference(x, w, bias, residual, None, product.activation, product.gated)

    large = {name: tiny(8, 8, one.bias, one.residual, one.activation, one.gated) for name, one in gemm.LARGE.items()}
    broken = gemm.large_candidates(large["vis qkv"])[0]
    skinny = {
        "qkv": tiny(2560, 1024),
        "out": tiny(1024, 2048, residual=True),
        "gate_up": tiny(64, 1024, activation="gelu_tanh", gated=True),
        "down": tiny(1024, 64, residual=True),
    }
    tried = [("a", skinny_gemm.OTHERS), ("b", skinny_gemm.FLOAT32)]
    replaced = {
        "DEVICE": CPU, "ProcessPoolExecutor": Pool, "Captured": Graph, "run": run, "WEIGHTS": 1, "LAYERS": 1,
        "STEPS": 1, "ROWS": (2,), "LARGE_ROWS": {"vis": 2, "pre": 2}, "LARGE": large, "SKINNY": skinny,
        "LARGE_BYTES": 0, "skinny_candidates": lambda M, product: tried,
        "medians_ms": lambda graphs, rounds: {name: float(i + 1) for i, name in enumerate(graphs)},
    }  # fmt: skip
    for attribute, value in replaced.items():
        monkeypatch.setattr(gemm, attribute, value)
    gemm._truth.cache_clear()
    kept = []
    gemm.sweep(lambda found: kept.append(json.loads(json.dumps(found))))
    gemm._truth.cache_clear()
    last = kept[-1]
    assert len(kept) == 4 + 1 + 8
    assert set(last) == {*(f"single 2 {name}" for name in skinny), "chain 2", *(f"gemm {name}" for name in large)}
    assert [row[1] for row in last["single 2 qkv"]["ranked"]] == ["a", "b"]
    assert last["chain 2"]["same"] == 0  # a replay of the stand-in leaves ones
    assert last["chain 2"]["choice"]["out"]["BN"] == skinny_gemm.OTHERS.BN
    assert gemm.short(broken) not in last["gemm vis qkv"]
    assert {"cublas product", "cublas all"} <= set(last["gemm vis qkv"])


def test_overflow_of_the_chain_is_an_error(monkeypatch):
    monkeypatch.setattr(gemm, "Captured", Graph)
    monkeypatch.setattr(gemm, "medians_ms", lambda graphs, rounds: {})
    monkeypatch.setattr(gemm, "chain", lambda *_: lambda: torch.full((2,), float("inf")))
    monkeypatch.setattr(gemm, "cublas_chain", lambda *_: lambda: torch.zeros(2))
    with pytest.raises(RuntimeError, match="overflow"):
        gemm.chain_times({}, {}, torch.zeros(1), torch.zeros(1))


def test_chain_of_cublas_is_that_of_the_kernels(monkeypatch):
    """Both chains compute the same, so that their times may be compared; and its values stay of order one."""
    monkeypatch.setattr(gemm, "DEVICE", CPU)
    monkeypatch.setattr(gemm, "STEPS", 1)
    monkeypatch.setattr(gemm, "LAYERS", 2)
    reference = gemm.gemm_epilogue.reference
    monkeypatch.setattr(
        gemm,
        "run",
        lambda launch, product, x, w, counters, bias, residual: reference(
            x, w, bias, residual, None, product.activation, product.gated
        ),
    )
    weights = {name: [gemm.weight(name, one, seed) for seed in range(2)] for name, one in gemm.SKINNY.items()}
    x0 = gemm.normal(2, 1024, seed=7)
    launches = dict.fromkeys(weights, skinny_gemm.OTHERS)
    ours, theirs = gemm.chain(launches, weights, x0, x0)(), gemm.cublas_chain(weights, x0, True)()
    assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 2.0**-6
    assert ours.abs().max() < 10


def test_norms_keep_what_the_table_reads(monkeypatch):
    module = norms.rms_norm
    kernel = next(one for one in module.KERNELS if one.name == "add_rms_norm")
    case = next(one for one in kernel.cases if one.pi0)
    before, seen = dict(module.LAUNCH), []

    def captured(call, sets, calls, device):
        seen.append(dict(module.LAUNCH))
        return len(seen)

    monkeypatch.setattr(norms, "DEVICE", CPU)
    monkeypatch.setattr(norms, "captured", captured)
    monkeypatch.setattr(norms, "sample_us", lambda graph, device: 1e3 / graph)
    properties = type("Properties", (), {"L2_cache_size": 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rank = norms.ranked(module, kernel, case)
    assert module.LAUNCH == before == seen[0]  # the table first, and as it was in the end
    assert [set(map(str, one.values())) for one in seen[1:]] == [{str(launch)} for launch in norms.ROWS]
    assert [name for _, name in rank] == [*(str(launch) for launch in reversed(norms.ROWS)), "table"]


def test_committed_data_are_small():
    """They are evidence for the launch tables, not all that a sweep prints."""
    files = sorted((compose.PACKAGE / "experiments" / "times" / "nvidia-h200").glob("sweep_*.json"))
    assert len(files) == 3
    for file in files:
        assert file.stat().st_size < 150_000, file
        assert {"command", "fingerprint", "remark", "found"} <= set(json.loads(file.read_text())), file
