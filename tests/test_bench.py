"""The bench of kernels, as far as it needs no GPU: its words, its arithmetic, its table and its file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0exp.kernels import bench
from pi0exp.kernels.bench import OP, QUICK, Contestant, Row, Settings, call_count, exit_code, line, set_count
from pi0exp.kernels.kernel import Case, Comparison, Kernel, discover
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.roofline import Ceilings

CEILINGS = Ceilings(bytes_per_s=4e12, flops_per_s=8e14)
L2 = 50 * 2**20


def contestant(name: str, *samples_us: float, state: str = "ok", reason: str = "") -> Contestant:
    return Contestant(name, state, reason, list(samples_us))


def row(*contestants: Contestant, flops: float = 0.0, bytes_moved: float = 4e6) -> Row:
    return Row("norm", "prefill", flops, bytes_moved, sets=8, calls=16, contestants=list(contestants))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-m", "pi0exp.kernels.bench", *words],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_line_and_exit_code_3(tmp_path):
    done = run("rms_norm", "--quick", "--json", str(tmp_path / "bench.json"))
    assert (done.returncode, done.stdout) == (Outcome.UNSUPPORTED.exit_code, "")
    assert done.stderr == "pi0exp.kernels.bench needs a GPU, and torch can use none here\n"
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_tells_the_known_ones(capsys):
    assert bench.main(["rms_norm", "rmsnorm"]) == CONFIG_ERROR
    error = capsys.readouterr().err
    assert error.startswith("no kernel rmsnorm; there are: ")
    assert ", ".join(discover()) in error


def test_file_in_no_folder_is_refused_before_anything_runs(capsys, tmp_path):
    assert bench.main(["rms_norm", "--json", str(tmp_path / "none" / "bench.json")]) == CONFIG_ERROR
    assert "its folder does not exist" in capsys.readouterr().err


def test_unknown_word_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        bench.main(["--fast"])
    assert left.value.code == CONFIG_ERROR
    assert "--fast" in capsys.readouterr().err


def test_help_shows_what_is_measured(capsys):
    with pytest.raises(SystemExit) as left:
        bench.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for word in ("NAME", "--json FILE", "--quick", "of one CUDA graph", "Exit codes"):
        assert word in text


def test_words():
    given = bench.parser().parse_args(["gemm", "rms_norm", "--json", "x.json"])
    assert (given.names, given.json, given.quick) == (["gemm", "rms_norm"], Path("x.json"), False)
    assert bench.parser().parse_args(["--quick"]).names == []


def test_quick_still_has_seven_rounds():
    assert min(QUICK.rounds, Settings().rounds) >= 7


@pytest.mark.parametrize("bytes_moved", [1.0, L2, L2 + 1, 2 * L2, 3 * L2, 100 * L2])
def test_sets(bytes_moved):
    sets = set_count(bytes_moved, L2)
    if bytes_moved <= L2:
        assert sets == 8
    else:
        assert sets >= 2
        assert sets * bytes_moved > 3 * L2


def test_calls_fill_the_time_and_take_turns_evenly():
    small = Case("small", lambda generator, device: (), bytes_moved=4e3)
    assert call_count(small, 8, CEILINGS, 500.0) == 256  # 250 calls of 2 us or more, a multiple of 8
    large = Case("large", lambda generator, device: (), bytes_moved=4e9)  # 1000 us
    assert call_count(large, 2, CEILINGS, 500.0) == 2
    assert call_count(large, 2, CEILINGS, 2500.0) == 4


def test_least_time_is_the_longer_of_memory_and_arithmetic():
    case = Case("case", lambda generator, device: (), flops=8e9, bytes_moved=4e6)
    assert bench.least_us(case, CEILINGS) == pytest.approx(10.0)
    assert bench.least_us(replace(case, flops=8e6), CEILINGS) == pytest.approx(1.0)


def test_line_of_a_memory_bound_case():
    text = line(row(contestant(OP, 2.0, 4.0, 9.0), contestant("eager", 16.0), contestant("aten", 6.0)), CEILINGS)
    assert " ".join(text.split()) == "norm prefill 4.00 1000 GB/s 25.0% eager 4.00, aten 1.50"  # 4e6 B in 4 us
    assert text.index("25.0%") + len("25.0%") == bench.HEADER.index("of ceiling") + len("of ceiling")


def test_line_of_an_arithmetic_bound_case():
    text = line(row(contestant(OP, 20.0), flops=8e9), CEILINGS)
    assert " ".join(text.split()) == "norm prefill 20.00 400.0 TFLOP/s 50.0%"


def test_line_says_what_was_not_timed_and_why():
    others = contestant("eager", 8.0), contestant("cudnn", state="declined", reason="takes no mask")
    assert line(row(contestant(OP, 4.0), *others), CEILINGS).endswith("eager 2.00, cudnn declined")
    text = line(row(contestant(OP, state="wrong", reason="result 0: off"), *others), CEILINGS)
    assert text.endswith("wrong: result 0: off")
    assert "GB/s" not in text


def test_exit_codes():
    fine, failed = contestant(OP, 1.0), contestant("aten", state="error", reason="x")
    declined, wrong = contestant("cudnn", state="declined"), contestant("compile", state="wrong")
    assert exit_code([row(fine, declined, wrong)]) == 0
    assert exit_code([row(fine), row(fine, failed)]) == Outcome.ERROR.exit_code
    assert exit_code([row(fine, failed), row(contestant(OP, state="wrong"))]) == Outcome.WRONG_NUMERICS.exit_code


def test_errors_of_a_contestant_are_its_own(capsys):
    one = contestant("one")
    with bench.recorded(one):
        raise RuntimeError("out of registers\nmore")
    assert (one.state, one.reason) == ("error", "RuntimeError: out of registers")
    assert "Traceback" in capsys.readouterr().err
    with bench.recorded(one):
        raise NotImplementedError("no masks")
    assert (one.state, one.reason) == ("declined", "no masks")
    with pytest.raises(KeyboardInterrupt), bench.recorded(one):
        raise KeyboardInterrupt


def test_contestants_start_with_the_op():
    def op(x):
        return x

    kernel = Kernel("k", op, lambda x: x, (), (), libraries={"aten": torch.clone})
    assert list(bench.contestants(kernel, compiled=True)) == [OP, "eager", "compile", "aten"]
    assert list(bench.contestants(kernel, compiled=False)) == [OP, "eager", "aten"]
    assert bench.contestants(kernel, compiled=False)[OP] is op


def test_a_reference_that_compiles_for_minutes_takes_no_part():
    kernel = discover()["stream_layers"]
    contestant = Contestant("compile")
    with bench.recorded(contestant):
        bench.contestants(kernel, True)["compile"]()
    assert (contestant.state, contestant.reason) == ("declined", kernel.not_compiled)
    assert "compile" not in bench.contestants(kernel, False)


def test_file_holds_everything(tmp_path):
    comparison = Comparison("result 0", 0.1, 0.01, 0.1, 0.01, "")
    rows = [row(Contestant(OP, samples_us=[1.0, 3.0, 2.0], comparisons=[comparison]), contestant("x", state="error"))]
    path = tmp_path / "bench.json"
    bench.write(path, bench.report(rows, CEILINGS, L2, QUICK, ["python", "-m", "pi0exp.kernels.bench", "--quick"]))
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    kept = json.loads(path.read_text())
    assert kept["command"][-1] == "--quick"
    assert kept["ceilings"] == {"bytes_per_s": 4e12, "flops_per_s": 8e14}
    assert kept["settings"]["rounds"] == QUICK.rounds
    assert {"gpu", "driver", "versions", "commit", "dirty", "cuda"} <= set(kept["fingerprint"])
    assert kept["date"].endswith("+00:00")
    [found] = kept["rows"]
    assert found["us"] == {OP: 2.0, "x": None}
    assert found["contestants"][0]["samples_us"] == [1.0, 3.0, 2.0]
    assert found["contestants"][0]["comparisons"][0]["largest"] == 0.1
    assert found["sets"] * 2 == found["calls"] == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
def test_measures_on_a_gpu(tmp_path):
    done = run("add_rms_norm", "--quick", "--json", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert len(kept["rows"]) == sum(case.pi0 for case in discover()["add_rms_norm"].cases)
    for found in kept["rows"]:
        assert found["case"] in done.stdout
        for one in found["contestants"]:
            assert (one["state"], len(one["samples_us"])) == ("ok", QUICK.rounds)
            assert min(one["samples_us"]) > 0
