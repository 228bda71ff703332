"""The card of a run: a row for each pass that was made, and for whatever qualifies its numbers."""

from typing import Any

from pi0exp import card, outcomes

METRICS = {"latency_ms/p50": 15.234, "latency_ms/p90": 15.31, "latency_host_ms/p50": 15.82, "throughput_hz": 65.6}


def shown(metrics: dict[str, float], facts: dict[str, str] | None = None) -> list[list[str]]:
    """Title and text of each row from the latency on."""
    record: dict[str, Any] = {
        "params": {"attention": "sdpa"},
        "metrics": METRICS | metrics,
        "facts": facts or {},
        "fingerprint": {"gpu": "NVIDIA H200", "vendor": "nvidia", "versions": {"torch": "2.11.0"}},
        "outcome": "ok",
        "reasons": [],
        "numerics": "REORDERED",
        "study": "adhoc",
    }
    rows = [[line[:13].strip(), line[15:]] for line in card.card(record, "id", False).splitlines()]
    return rows[[title for title, _ in rows].index("latency") :]


def test_records_of_earlier_versions_have_fewer_rows():
    assert [title for title, _ in shown({})] == ["latency", "host to host", "outcome", "MLflow run"]
    old = {"roofline/floor_ms": 6.11, "roofline/share": 0.401}
    assert ["roofline", "floor 6.11 ms, 40 % of it reached"] in shown(old)


def test_every_pass_has_its_row():
    rows = dict(
        shown(
            {
                **{"latency_ms/p50_low": 15.2, "latency_ms/p50_high": 15.26, "sampling/count": 240.0},
                **{"latency_paced_ms/p50": 14.2, "latency_paced_ms/p99": 14.9, "latency_paced_ms/late_share": 0.0},
                **{"stage_ms/vision": 2.0, "stage_ms/prefill": 7.004, "stage_ms/other": 0.1},
                **{"roofline/floor_ms": 6.11, "roofline/share": 0.401},
                **{"roofline/floor_sustained_ms": 7.0, "roofline/share_sustained": 0.46},
                **{
                    "power_w/mean": 512.4,
                    "power_w/limit": 700.0,
                    "energy_j/call": 7.806,
                    "energy_j/uncertainty": 0.051,
                },
                **{"perf_per_watt": 0.1281},
            }
        )
    )
    assert rows[""] == "p50 within 15.20 to 15.26 ms at 95 %, 240 calls"
    assert rows["paced"] == "p50 14.20 ms, p99 14.90 ms"
    assert rows["stages"] == "vision 2.00 ms, prefill 7.00 ms, other 0.10 ms"
    assert rows["roofline"] == "floor 6.11 ms, 40 % of it reached; sustained 7.00 ms, 46 %"
    assert rows["power"] == "mean 512 W of 700 W allowed, 7.81 J a call +- 0.05, 0.128 calls/s/W"


def test_power_without_a_limit_or_a_counter():
    rows = dict(shown({"power_w/mean": 512.4, "energy_j/call": 7.806, "perf_per_watt": 0.1281}))
    assert rows["power"] == "mean 512 W, 7.81 J a call, 0.128 calls/s/W"


def test_paced_calls_that_began_late_are_told():
    late = {"latency_paced_ms/p50": 14.2, "latency_paced_ms/p99": 14.9, "latency_paced_ms/late_share": 0.25}
    assert dict(shown(late))["paced"].endswith("25 % of the calls began late")


def test_what_qualifies_the_numbers_has_a_row_of_its_own():
    facts = {
        "weights": "random",
        "clocks": "held down: thermal",
        "processes": "7 (9 MiB)",
        "power": "absent: no counter",
    }
    rows = shown({}, facts)
    assert [title for title, _ in rows] == [
        *("latency", "host to host", "clocks", "others on GPU", "power from", "outcome", "MLflow run")
    ]
    assert dict(rows)["clocks"] == "held down: thermal"
    assert dict(rows)["power from"] == "absent: no counter"


# ---- the closing table


def point(**params: str) -> dict:
    given = {name.replace("__", "."): value for name, value in params.items()}
    return {"params": given, "metrics": {"latency_ms/p50": 1.5}, "outcome": "ok", "reasons": []}


LADDER = [
    point(stack="eager", attention="eager", workload="default", workload__seed="0", model__seed="0"),
    point(stack="fast", attention="sdpa", workload="default", workload__seed="0", model__seed="1"),
    point(stack="eager", attention="eager", workload="masked", workload__seed="1", model__seed="0"),
]


def test_columns_that_another_tells_are_left_out():
    assert card.differing(LADDER) == ["stack", "workload", "model.seed"]
    changed = point(stack="fast", attention="eager", workload="masked", workload__seed="2", model__seed="0")
    assert card.differing([*LADDER, changed]) == ["stack", "attention", "workload", "workload.seed", "model.seed"]
    assert card.differing([one | {"params": {"attention": name}} for one, name in zip(LADDER, "aba", strict=True)]) == [
        "attention"
    ]


def test_a_point_is_one_line_where_nobody_folds_it(capsys):
    reasons = [f"needs what is not there [denoise], reason {i}" for i in range(9)]
    long = LADDER[0] | {"outcome": "unsupported", "reasons": reasons}
    card.show(card.table([*LADDER[1:], long]))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["#", "stack", "workload", "model.seed"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert lines[2].endswith("[denoise], reason 8"), "brackets are no markup"
    assert lines[0] == lines[0].rstrip()


# ---- the closing line


def explained(*ways: str) -> dict:
    return {"outcome": outcomes.EXPLAINED, outcomes.EXPLAINED: {"settled": list(ways)}}


def test_explained_points_are_settled_with_the_settings_that_they_were_measured_with():
    assert outcomes.closing("x", [explained(), explained()], True) == "study x: 0 of 2 points settled"
    points = [explained("measure=quick"), explained("measure=quick", "measure=default"), explained("measure=quick")]
    assert outcomes.closing("x", points, True).splitlines() == [
        "study x: 3 of 3 points settled with measure=quick, complete",
        "study x: 1 of 3 points settled with measure=default; a run with it measures only #0, #2",
    ]


def test_an_interrupted_sweep_says_what_it_leaves(monkeypatch):
    ended = [{"outcome": "ok"}, {"outcome": "unsupported"}, {"outcome": "error"}]
    monkeypatch.setattr(outcomes, "FINISHED", ended)
    assert outcomes.kept() == "; 2 finished before: the same command again measures only the others"
    monkeypatch.setattr(outcomes, "FINISHED", ended[2:])
    assert outcomes.kept() == ""
