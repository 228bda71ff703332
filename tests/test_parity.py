"""Equal performance per watt: the latency that it takes, who meets it, by how much, and what is no answer."""

import json

import pytest
from made_records import keep, refusal

from pi0exp import parity
from pi0exp.result import Outcome

H200, MI350 = "NVIDIA H200", "AMD Instinct MI350X"


def run(capsys, *words) -> tuple[int, str, str]:
    code = parity.main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def answers(capsys, *words) -> list[dict]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)["answers"]


def refused(capsys, *words) -> str:
    return refusal(capsys, parity.main, *words)


def file(folder, gpu, p50_ms, *words, power_w=None, **more):
    """Exactly this p50."""
    metrics = {"latency_ms/p50": p50_ms} | ({} if power_w is None else {"power_w/mean": power_w})
    return keep(folder, *words, gpu=gpu, p50_ms=p50_ms, metrics=metrics | more.pop("metrics", {}), **more)


@pytest.fixture
def reference(tmp_path):
    return file(tmp_path / "reference", H200, 32.9, power_w=650.0)


def test_target_from_rated_and_from_measured_power(capsys, tmp_path, reference):
    """700 / 1000 x 32.9 = 23.0 ms, and 650 / 900 x 32.9 = 23.8 ms."""
    fast, slow = file(tmp_path / "fast", MI350, 21.2, power_w=900.0), file(tmp_path / "slow", MI350, 23.5)
    rated, measured = answers(capsys, "--reference", reference, "--candidate", fast)
    assert round(rated["target_ms"], 1) == 23.0
    assert (rated["basis"], rated["reference_w"], rated["candidate_w"], rated["meets"]) == ("rated", 700, 1000, True)
    assert rated["margin"] == pytest.approx(0.7 * 32.9 / 21.2 - 1)
    assert (measured["basis"], measured["meets"]) == ("measured", True)
    assert measured["target_ms"] == pytest.approx(650 / 900 * 32.9)
    [rated] = answers(capsys, "--reference", reference, "--candidate", slow)
    assert (rated["meets"], rated["margin"] < 0) == (False, True)


def test_rated_power_of_the_gpus_that_were_measured_here(capsys, tmp_path):
    h100 = file(tmp_path / "h100", "NVIDIA H100 80GB HBM3", 32.9)
    [rated] = answers(capsys, "--reference", h100, "--candidate", file(tmp_path / "amd", MI350, 20.0))
    assert (rated["reference_w"], rated["candidate_w"], round(rated["target_ms"], 1)) == (700, 1000, 23.0)


def test_text_says_who_and_by_how_much(capsys, tmp_path, reference):
    fast = file(tmp_path / "fast", MI350, 20.0, power_w=900.0)
    slow = file(tmp_path / "slow", MI350, 30.0, "attention=sdpa")
    code, out, _ = run(capsys, "--reference", reference, "--candidate", fast, slow)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("reference NVIDIA H200: tiny default ")
    assert lines[1].startswith("rated power: 700 W / 1000 W -> target 23.03 ms; AMD Instinct MI350X: tiny default ")
    assert lines[1].endswith(" needs 20.00 ms: meets it, 15.1 % more calls a watt")
    assert lines[2].startswith("measured power: 650 W / 900 W -> target 23.76 ms")
    assert lines[3].endswith(" needs 30.00 ms: misses it, 23.2 % fewer calls a watt")
    assert lines[4].startswith("measured power: not known of AMD Instinct MI350X")


def test_the_boundary_meets(capsys, tmp_path, reference):
    """As many calls a watt as the reference is equal performance a watt: also the reference itself."""
    rated, measured = answers(capsys, "--reference", reference, "--candidate", reference)
    assert rated["meets"] is measured["meets"] is True
    assert rated["margin"] == measured["margin"] == 0
    power = ("--reference-watts", "500", "--candidate-watts", "1000")
    exact = file(tmp_path / "exact", MI350, 16.45)
    [rated] = answers(capsys, "--reference", reference, "--candidate", exact, *power)
    assert (rated["target_ms"], rated["meets"]) == (16.45, True)


def test_uncertainty_of_the_power(capsys, tmp_path):
    """3 % of the reference and 4 % of the candidate are 5 % together."""
    a = file(tmp_path / "a", H200, 30.0, power_w=600.0, metrics={"energy_j/call": 10.0, "energy_j/uncertainty": 0.3})
    b = file(tmp_path / "b", MI350, 20.5, power_w=900.0, metrics={"energy_j/call": 10.0, "energy_j/uncertainty": 0.4})
    rated, measured = answers(capsys, "--reference", a, "--candidate", b)
    assert rated["uncertainty"] is None
    assert measured["uncertainty"] == pytest.approx(0.05)
    _, out, _ = run(capsys, "--reference", a, "--candidate", b)
    assert "misses it, 2.4 % fewer calls a watt (power known to 5.0 %, which is within it)" in out


def test_other_actions_are_named(capsys, tmp_path, reference):
    loose = file(tmp_path / "loose", MI350, 20.0, numerics="APPROXIMATE", error=0.43)
    [one] = answers(capsys, "--reference", reference, "--candidate", loose)
    assert one["candidate"].endswith(" (APPROXIMATE, rel L2 4.3e-01)")


def test_a_folder_gives_what_fits(capsys, tmp_path, reference):
    folder = tmp_path / "folder"
    file(folder, MI350, 20.0)
    file(folder, MI350, 20.0, "workload=masked", key="b" * 16)
    keep(folder, gpu=MI350, key="c" * 16, outcome=Outcome.ERROR, reasons=("it broke",))
    code, out, _ = run(capsys, "--reference", reference, "--candidate", folder)
    assert code == 0
    assert out.count("rated power:") == 1
    assert [line.split(": ")[2] for line in out.splitlines() if line.startswith("left out: ")] == [
        "other work than the reference",
        "the run is error, it has no latency to compare",
    ]
    others = tmp_path / "others"
    file(others, MI350, 20.0, "workload=masked")
    assert "no result there did the reference's work" in refused(
        capsys, "--reference", reference, "--candidate", others
    )


def test_the_fastest_comes_first_and_what_the_reference_lacks_is_said_once(capsys, tmp_path):
    reference = file(tmp_path / "reference", H200, 32.9)
    for p50_ms, stack in ((30.0, "1_graphs"), (20.0, "7_hoists"), (25.0, "2_sdpa")):
        file(tmp_path / "folder", MI350, p50_ms, f"stack={stack}", key=stack[0] * 16, power_w=800.0)
    _, out, err = run(capsys, "--reference", reference, "--candidate", tmp_path / "folder")
    assert err == ""
    needed = [line.split(" needs ")[1].split(" ms")[0] for line in out.splitlines() if " needs " in line]
    assert needed == ["20.00", "25.00", "30.00"]
    assert out.count("not known of the reference") == 1
    assert "not known of AMD" not in out


def test_what_is_no_answer(capsys, tmp_path, reference):
    good = file(tmp_path / "good", MI350, 20.0)
    failed = keep(tmp_path / "failed", gpu=MI350, outcome=Outcome.TIMEOUT, reasons=("late",))
    other = file(tmp_path / "other", MI350, 20.0, "workload.batch_size=2")
    unknown = file(tmp_path / "unknown", "Toy GPU", 20.0)
    foreign, missing = tmp_path / "foreign.json", tmp_path / "missing.json"
    foreign.write_text('{"traceEvents": []}')

    def told(a, b):
        return refused(capsys, "--reference", a, "--candidate", b)

    assert "the run is timeout" in told(reference, failed)
    assert "the run is timeout" in told(failed, good)
    assert "other work than the reference: workload.batch_size 1, 2" in told(reference, other)
    assert "rated power: not known of Toy GPU" in told(reference, unknown)
    assert "not a result file" in told(reference, foreign)
    assert "No such file" in told(missing, good)
    assert "No such file" in told(reference, missing)
    code, _, _ = run(capsys, "--reference", reference, "--candidate", unknown, "--candidate-watts", "500")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.vision.depth=1",), "model.vision.depth 2, 1"),
        (("model=tiny_pi05", "workload=pi05"), "model tiny, tiny_pi05; workload.horizon 10, 50; workload.prompt"),
        (("subject=products",), "subject policy, products"),
        (("subject=layers", "subject.depth=1"), "subject policy, layers"),
        (("workload.horizon=11",), "workload.horizon 10, 11"),
    ],
)
def test_other_work_is_refused_also_where_no_parameter_says_it(capsys, tmp_path, reference, words, told):
    other = file(tmp_path / "other", MI350, 20.0, *words)
    text = refused(capsys, "--reference", reference, "--candidate", other)
    assert text.startswith(f"{other}: other work than the reference: {told}")


def test_seeds_and_the_name_of_a_workload_are_no_work(capsys, tmp_path, reference):
    """A workload of another name that says the same is the same."""
    same = file(tmp_path / "same", MI350, 20.0, "workload.seed=3", "model.seed=4", "workload.name=mine")
    assert answers(capsys, "--reference", reference, "--candidate", same)


@pytest.mark.parametrize("watts", ["0", "-5", "nan", "inf", "many"])
def test_watts_are_a_number_above_0(capsys, reference, watts):
    with pytest.raises(SystemExit) as refusal:
        parity.main(["--reference", str(reference), "--candidate", str(reference), f"--candidate-watts={watts}"])
    assert refusal.value.code == 2
    assert "--candidate-watts" in capsys.readouterr().err


@pytest.mark.parametrize("power", [0.0, float("nan")])
def test_power_that_is_none_is_not_used(capsys, tmp_path, reference, power):
    odd = file(tmp_path / "odd", MI350, 20.0, power_w=power)
    assert [one["basis"] for one in answers(capsys, "--reference", reference, "--candidate", odd)] == ["rated"]
