"""The card of a run: a row for each pass that was made, and for whatever qualifies its numbers."""

from typing import Any

from pi0exp.card import card

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
    rows = [[line[:13].strip(), line[15:]] for line in card(record, "id", False).splitlines()]
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
