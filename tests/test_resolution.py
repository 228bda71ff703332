"""What measures which differences a comparison finds: a planted wait is found, and nothing where there is none."""

import gc
import json

import numpy as np
import pytest
import torch
from helpers import CPU, PretendedGraph, subject_of

from pi0exp import intervals
from pi0exp.experiments import resolution
from pi0exp.experiments.tables import benches
from pi0exp.graphs import capture
from pi0exp.graphs.manual import Manual

CALL_MS = 16.0


class Toy:
    """Builds calls that take no time; `sample` says how long they would have taken on a GPU whose clock wanders.

    bias: builds differ by that share, as the addresses of their memory may make them. deaf: the wait does nothing.
    """

    def __init__(self, bias: float = 0.0, deaf: bool = False) -> None:
        self.random = np.random.default_rng(0)
        self.bias, self.deaf, self.clock, self.built = bias, deaf, 0.0, 0

    def __call__(self, delay_ms):
        self.built += 1
        factor = 1 + self.bias * self.random.standard_normal()
        extra_ms, kernels = (0.0 if self.deaf else delay_ms), {"graphs/kernels": 100.0 + (delay_ms > 0)}

        def call(index):
            call.ms = CALL_MS * factor + extra_ms

        return call, kernels

    def sample(self, call, index):
        call(index)
        self.clock = 0.98 * self.clock + 0.001 * self.random.standard_normal()
        return call.ms * float(np.exp(self.clock + 0.003 * self.random.standard_normal()))


def found(toy: Toy, count: int = 20) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)  # twice a comparison, which takes most of the time here
        return list(resolution.comparisons(toy, toy.sample, count, rounds=20))


@pytest.fixture(scope="module")
def right() -> tuple[Toy, list[dict]]:
    toy = Toy()
    return toy, found(toy)


def test_a_right_measurement_finds_what_is_there_and_nothing_else(right):
    total = resolution.summary(right[1])
    assert total["same"]["of"] == total["planted"]["of"] == 20
    assert total["same"]["false_alarms"] <= 1
    assert total["planted"]["found"] >= 18
    ratios = [one["ratio"] for one in right[1] if one["kind"] == "planted"]
    assert np.mean(ratios) == pytest.approx(1.03, abs=0.002)


def test_each_pair_is_built_anew(right):
    assert right[0].built == 1 + 2 * 20


def test_samples_are_kept_and_give_the_interval(right):
    for one in right[1][:4]:
        assert len(one["a_ms"]) == len(one["b_ms"]) == 20 * 2 * 8
        again = intervals.of_rounds(resolution.pairs(one["a_ms"], one["b_ms"], 8))
        assert (again.ratio, again.low, again.high) == (one["ratio"], one["low"], one["high"])


def test_a_wait_that_does_nothing_is_not_found():
    assert resolution.summary(found(Toy(deaf=True), 4))["planted"]["found"] == 0


def test_builds_that_differ_are_false_alarms():
    total = resolution.summary(found(Toy(bias=0.05), 4))["same"]
    assert total["false_alarms"] >= 3
    assert total["largest_difference"] > intervals.MARGIN


def verdicts(kind: str, words: list[str]) -> list[dict]:
    return [{"kind": kind, "verdict": word, "ratio": 1.0} for word in words]


def test_rates_have_limits():
    none, slower = intervals.NOTHING, intervals.SLOWER
    total = resolution.summary(
        verdicts("same", [none] * 19 + [slower]) + verdicts("planted", [slower] * 18 + [none] * 2)
    )
    assert (total["same"]["rate"], total["planted"]["rate"]) == (0.05, 0.9)
    assert total["same"]["rate_at_most"] == pytest.approx(0.216, abs=0.001)
    assert total["planted"]["rate_at_least"] == pytest.approx(0.717, abs=0.001)
    perfect = resolution.summary(verdicts("same", [none] * 20) + verdicts("planted", [slower] * 20))
    assert perfect["same"]["rate_at_most"] == pytest.approx(1 - 0.05 ** (1 / 20))
    assert perfect["planted"]["rate_at_least"] == pytest.approx(0.05 ** (1 / 20))
    assert resolution.summary(verdicts("planted", ["faster"]))["planted"]["found"] == 0


@pytest.mark.parametrize(
    ("kind", "counts", "wrong"),
    [("same", [9, 9], False), ("same", [9, 10], True), ("planted", [9, 10], False), ("planted", [9, 9], True)],
)
def test_the_wait_must_be_one_more_kernel_of_the_graph(kind, counts, wrong):
    assert resolution.misplaced({"kind": kind, "kernels": counts}) is wrong


def test_the_wait_is_inside_what_is_captured(monkeypatch):
    """With a graph that only pretends: the wait is part of what it captured, and each replay waits once."""
    captured, waited = [], []

    class Watched(PretendedGraph):
        def __init__(self, run, warmup, note):
            before = len(waited)
            super().__init__(run, warmup, note)
            captured.append(len(waited) - before)

    monkeypatch.setattr(capture, "Graph", Watched)
    monkeypatch.setattr(resolution, "host_wait", waited.append)
    plain = subject_of("model=tiny", "workload.num_steps=1")
    subject = resolution.replace(plain, stack=resolution.replace(plain.stack, graphs=Manual()))
    build = resolution.Builder(subject, CPU)
    monkeypatch.setattr(resolution, "warm_up", lambda call, device, config: call(0))
    build(0.0)
    assert waited == []
    call, counters = build(0.5)
    assert captured == [0, Manual().warmup + 1]  # warm-up runs, and the one that is captured
    assert set(waited) == {500_000}
    assert counters["graphs/kernels"] == PretendedGraph.kernels
    waited.clear()
    call(0)
    call(1)
    assert len(waited) == 2


def test_actions_stay_the_same(monkeypatch):
    plain = subject_of("model=tiny", "workload.num_steps=1")
    slow = resolution.with_delay(plain, 1000).policy(CPU)
    [given] = plain.on_device(plain.inputs(1).items, CPU)
    assert torch.equal(slow.sample_actions(*given), plain.policy(CPU).sample_actions(*given))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """What the command writes on a CPU, with toys for policies."""
    toy = Toy()
    monkeypatch.setattr(resolution, "Builder", lambda subject, device: toy)
    monkeypatch.setattr(resolution, "device_sample_ms", lambda call, index, device: toy.sample(call, index))
    path = tmp_path / "times" / "toy.json"
    assert resolution.main([str(path), "model=tiny", "measure.device=cpu", "--pairs", "2", "--rounds", "16"]) == 0
    return path


def test_the_file_is_complete_and_becomes_a_table(file, capsys, monkeypatch):
    content = json.loads(file.read_text())
    assert content["words"] == ["model=tiny", "measure.device=cpu"]
    assert content["settings"] == {"rounds": 16, "calls_a_block": 8, "confidence": 0.99, "margin": intervals.MARGIN}
    assert {"commit", "date", "versions", "gpu"} <= content["fingerprint"].keys()
    assert [one["kind"] for one in content["comparisons"]] == ["same", "planted"] * 2
    monkeypatch.setattr(benches, "TIMES", file.parent)
    text = benches.resolution("toy")
    assert "false alarms 0 % (at most 78 %), found 100 % (at least 22 %)" in text
    same, planted = [line.split(" | ") for line in text.splitlines() if line.startswith("| itself")]
    assert same[2:5] == ["2", "2", "0"]
    assert planted[0] == "| itself + 3 %"
    assert planted[2:5] == ["2", "0", "2"]
    assert benches.resolution("none") == benches.NONE_YET


def test_it_is_written_after_each_comparison(tmp_path, monkeypatch):
    toy, path = Toy(), tmp_path / "toy.json"

    def breaks(call, index, device):
        if toy.built > 3:
            raise RuntimeError("the GPU went away")
        return toy.sample(call, index)

    monkeypatch.setattr(resolution, "Builder", lambda subject, device: toy)
    monkeypatch.setattr(resolution, "device_sample_ms", breaks)
    with pytest.raises(RuntimeError):
        resolution.main([str(path), "model=tiny", "measure.device=cpu", "--pairs", "3", "--rounds", "10"])
    assert len(json.loads(path.read_text())["comparisons"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("--rounds", "9"), 2, "at least 1 and 10"),
        (("attention=fastest",), 2, "fastest"),
        (("measure.device=gpu",), 3, "there is no GPU"),
        (("graphs=manual", "measure.device=cpu"), 3, "needs a GPU"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, words, code, what):
    if "measure.device=gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "toy.json"
    assert resolution.main([str(path), "model=tiny", *words]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("resolution: ")
    assert what in line
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the wait is a kernel of a captured graph")
def test_on_a_gpu_the_wait_is_one_more_kernel_and_is_found(tmp_path):
    path = tmp_path / "gpu.json"
    words = ["model=tiny", "graphs=manual", "attention=sdpa"]
    assert resolution.main([str(path), *words, "--pairs", "1"]) == 0
    same, planted = json.loads(path.read_text())["comparisons"]
    assert planted["kernels"][1] - planted["kernels"][0] == 1
    assert planted["ratio"] > same["ratio"]


def test_again_judges_the_samples_anew(file, capsys):
    before = file.read_text()
    content = json.loads(before)
    content["comparisons"][0] |= {"ratio": 2.0, "verdict": "slower"}
    content["same"]["false_alarms"] = 7
    file.write_text(json.dumps(content))
    assert resolution.main([str(file), "--again"]) == 0
    assert json.loads(file.read_text()) == json.loads(before)
    assert resolution.main([str(file.parent / "none.json"), "--again"]) == 2
    assert "no comparisons" in capsys.readouterr().err


def test_what_is_kept_follows_from_its_samples():
    for path in sorted(benches.TIMES.glob("*/resolution.json")):
        for one in json.loads(path.read_text())["comparisons"]:
            assert resolution.judged(one) == one
