"""Choosing launches of a denoising step, as far as it needs no GPU: candidates, the descent, the kept table."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from pi0exp.kernels import stream_launch, tune, tune_candidates
from pi0exp.kernels.ahead import FEW_ROWS, asked
from pi0exp.kernels.skinny_gemm import OTHERS, Launch
from pi0exp.kernels.stream_launch import START, Attend

NAMES = [(rows, name) for rows in tune_candidates.SIZES for name in tune_candidates.names(rows)]


@pytest.mark.parametrize(("rows", "name"), NAMES)
def test_launches_to_begin_with_are_tried_first(rows, name):
    found = tune_candidates.candidates(rows, name)
    assert found[0] == START["sm_90"][name]
    assert 10 < len(found) == len(set(found)) <= tune_candidates.MOST + 1
    assert isinstance(found[0], Attend if "attention" in name else Launch)


@pytest.mark.parametrize(("rows", "name"), NAMES)
def test_a_name_is_what_the_op_looks_up(rows, name):
    """Else a tuned launch would never run, and a candidate would be compared as another one."""
    op, padded, *shape = name.split()
    kernel, case = tune.case_of(rows, name)
    assert kernel.name == op
    assert case.pi0
    given = [x for x in case.make(torch.Generator(), torch.device("cpu")) if isinstance(x, torch.Tensor)]
    if op == "stream_attention":
        tokens, heads = given[0].shape[1:3]
        assert stream_launch.attention_name(tokens * heads) == name
    else:
        weight = next(x for x in given if list(x.shape) == [int(size) for size in shape[0].split("x")])
        assert stream_launch.product_name(op, given[0].shape[0] * given[0].shape[1], weight) == name
        assert int(padded) == rows


def test_descent_changes_one_name_at_a_time():
    launches = [Launch(16 * i, 64) for i in (1, 2, 3)]
    cost = {launch: 3.0 - i for i, launch in enumerate(launches)}
    seen = []

    def time(variants):
        seen.append(variants)
        return [sum(cost[launch] for launch in variant.values()) for variant in variants]

    start = {"a": launches[0], "b": launches[0]}
    best, evidence = tune.descend(start, {"a": launches, "b": launches[:2]}, time)
    assert best == {"a": launches[2], "b": launches[1]}
    assert start == {"a": launches[0], "b": launches[0]}
    assert all(sum(one[name] != group[0][name] for name in one) <= 1 for group in seen for one in group)
    assert [launch["BN"] for _, launch in evidence["a"]] == [48, 32, 16]
    assert [ms for ms, _ in evidence["b"]] == sorted(ms for ms, _ in evidence["b"])


def test_without_a_gpu(capsys):
    assert tune.main([]) == 3
    assert "needs a GPU, and torch can use none here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rows", "17"], ["--no-such"]])
def test_other_words_are_refused(words):
    with pytest.raises(SystemExit) as stopped:
        tune.main(words)
    assert stopped.value.code == 2


def test_kept_table_wins(tmp_path, monkeypatch):
    weight = torch.zeros(2560, 1024, dtype=torch.bfloat16)
    kept = {"stream_qkv 16 2560x1024": asdict(Launch(64, 64)), "stream_attention 128": asdict(Attend(32, 64))}
    (tmp_path / "sm_90.json").write_text(json.dumps({"launches": kept}))
    monkeypatch.setattr(stream_launch, "TABLES", tmp_path)
    monkeypatch.setattr(stream_launch, "arch_of", lambda device: "sm_90")
    stream_launch.launches.cache_clear()
    try:
        assert stream_launch.product_launch("stream_qkv", 10, weight) == Launch(64, 64)
        assert stream_launch.product_launch("stream_qkv", 20, weight) == START["sm_90"]["stream_qkv 64 2560x1024"]
        assert stream_launch.product_launch("stream_qkv", 10, weight[:256]) == OTHERS
        q = torch.zeros(1, 10, 8, 256, dtype=torch.bfloat16)
        assert stream_launch.attention_launch(80, q) == Attend(32, 64)
        assert stream_launch.attention_launch(200, q) == START["sm_90"]["stream_attention 512"]
        assert stream_launch.attention_launch(9999, q) == START["sm_90"]["stream_attention 512"]
    finally:
        stream_launch.launches.cache_clear()


@pytest.mark.parametrize("file", sorted(stream_launch.TABLES.glob("*.json")), ids=lambda file: file.name)
def test_committed_tables_are_complete(file):
    """None until a GPU has been tuned."""
    kept = json.loads(file.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
    assert {"command", "fingerprint", "chains"} <= set(kept)
    for name, fields in kept["launches"].items():
        assert stream_launch.read(name, fields) in [stream_launch.read(name, one) for _, one in kept["evidence"][name]]


def test_few_rows_of_a_dependent_launch_ask_ahead():
    weight = torch.zeros(300, 7, dtype=torch.bfloat16)
    given = asked(weight, True, FEW_ROWS)
    assert (given["ahead_ptr"] is weight, given["ahead_pieces"]) == (True, 4)  # 4200 bytes, whole pieces
    for nothing in (asked(weight, True, FEW_ROWS + 1), asked(weight, False, 1), asked(None, True, 1)):
        assert nothing == {"ahead_ptr": None, "ahead_pieces": 0}
