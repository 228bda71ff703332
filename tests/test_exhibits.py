"""Tables, plot, note and tags of a run in MLflow: from the record alone, in the form that MLflow's pages show."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pi0exp import exhibits
from pi0exp.breakdown import break_down
from pi0exp.errors import UserError
from pi0exp.load import read_record, result_files
from pi0exp.result import Outcome, Result, record
from pi0exp.title import title
from pi0exp.traces import read_trace
from pi0exp.track import Store

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "experiments" / "results"
KEY = "0123456789abcdef"
PRINTS = {
    "gpu": "NVIDIA H200",
    "arch": "sm_90",
    "driver": "580.1",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "pi0exp": "0.1.0"},
    "commit": "abc",
    "dirty": "false",
    "date": "2026-11-24",
    "cuda": "13.0",
    "hip": "",
    "cores": 16,
}
PARAMS = {"attention": "sdpa", "graphs": "manual", "model": "pi0", "workload": "masked", "measure": "default"}


def point(study: str, **changed) -> dict:
    found = break_down(read_trace(TESTS / "data" / "traces" / "kineto_h200_launched.json"))
    result = Result(
        Outcome.OK,
        metrics={"latency_ms/p50": 17.25, "latency_ms/p50_low": 17.2, "latency_ms/p50_high": 17.3},
        samples={"latency_ms": [17.0 + 1 / (3 + i) for i in range(40)], "power_w": [400.0, 410.5], "empty": []},
        files={"breakdown.json": json.dumps(found.to_dict()), "roofline.svg": "<svg/>", "tunableop.csv": "a,b\n"},
        fingerprint=PRINTS,
    )
    return record(KEY, study, PARAMS, {"model": {}}, result) | changed


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store.open(None, tmp_path_factory.mktemp("exhibits"))


@pytest.fixture
def client(store) -> MlflowClient:
    return store._client


def logged(client: MlflowClient, run_id: str) -> set[str]:
    """Paths of all files of a run."""
    found, folders = set(), [""]
    while folders:
        for one in client.list_artifacts(run_id, folders.pop()):
            (folders.append if one.is_dir else found.add)(one.path)
    return found


def test_tables_of_a_record():
    tables = {path: json.loads(text) for path, text in exhibits.tables(point("x")).items()}
    assert set(tables) == {exhibits.SAMPLES, exhibits.KERNELS, exhibits.CATEGORIES, exhibits.PRODUCTS}
    for table in tables.values():
        assert {len(row) for row in table["data"]} == {len(table["columns"])}
    samples = tables[exhibits.SAMPLES]
    assert samples["columns"] == ["sample", "latency_ms", "power_w"]
    assert samples["data"][:3] == [[0, 17.3333, 400.0], [1, 17.25, 410.5], [2, 17.2, None]]
    assert len(samples["data"]) == 40
    categories = tables[exhibits.CATEGORIES]
    assert categories["columns"] == ["category", "ms", "share", "vision_ms", "prefill_ms", "denoise_ms"]
    assert sum(row[2] for row in categories["data"]) == pytest.approx(1)
    assert all(row[1] == pytest.approx(sum(row[3:])) for row in categories["data"])
    kernels = tables[exhibits.KERNELS]
    assert [row[3] for row in kernels["data"]] == sorted((row[3] for row in kernels["data"]), reverse=True)
    products = tables[exhibits.PRODUCTS]
    assert products["columns"][:5] == ["m", "n", "k", "batch", "dtype"]
    assert {row[4] for row in products["data"]} == {"BFloat16"}


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"stages": {}, "kernels": 3}'])
def test_breakdown_of_another_version_is_a_file_and_no_table(text):
    one = point("x", files={"breakdown.json": text})
    assert exhibits.texts(one)["files/breakdown.json"] == text
    assert set(exhibits.tables(one)) == {exhibits.SAMPLES}


def test_point_that_was_not_timed_has_no_tables_and_no_plots():
    one = record(KEY, "x", PARAMS, {}, Result(Outcome.ERROR, ["it broke"], log="Traceback", fingerprint=PRINTS))
    assert set(exhibits.texts(one)) == {"experiment.json", "result.json", "log.txt"}
    assert list(exhibits.figures(one)) == []
    assert exhibits.LISTED not in exhibits.tags(one, exhibits.texts(one))
    assert exhibits.tags(one, [])["torch"] == "2.11.0"


def test_latency_plot_has_every_call_and_its_numbers():
    times = [17.0 + i / 100 for i in range(exhibits.PLOTTED - 1)]
    one = point("x", samples={"latency_ms": [40.0, *times], "latency_host_ms": [18.0, 19.0]})
    [(path, figure)] = exhibits.figures(one)
    assert path == exhibits.LATENCY
    calls, shares = figure.axes
    assert [list(line.get_ydata()) for line in calls.lines] == [[40.0, *times], [18.0, 19.0]], "outliers too"
    assert list(shares.lines[0].get_ydata()) == [*times, 40.0]
    assert list(exhibits.figures(point("x", samples={"latency_ms": times}))) == [], "few calls are read in the table"
    assert [text.get_text() for text in calls.get_legend().get_texts()] == [
        "on the device, p50 17.25 ms",
        "host to host, p50 0.00 ms",
        "95 % interval of the median",
    ]
    assert figure.get_suptitle() == "pi0  masked  attention=sdpa graphs=manual"


def test_run_shows_them_and_finishing_twice_changes_nothing(store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # load_table looks for runs there
    one = point("twice")
    run_id = store.start("twice", "n", KEY, one["params"], {})
    store.finish(run_id, one)
    wanted = {"experiment.json", "result.json", "files/breakdown.json", "files/tunableop.csv", "plots/roofline.svg"}
    wanted |= {exhibits.LATENCY, *exhibits.tables(one)}
    assert logged(client, run_id) == wanted
    first = client.get_run(run_id)
    store.finish(run_id, one)
    assert logged(client, run_id) == wanted
    again = client.get_run(run_id).data
    assert (again.metrics, again.params, again.tags) == (first.data.metrics, first.data.params, first.data.tags)
    table = client.load_table(first.info.experiment_id, exhibits.SAMPLES, [run_id])
    assert list(table.columns)[:3] == ["sample", "latency_ms", "power_w"]
    assert len(table) == 40, "log_table itself would have appended as many again"
    listed = json.loads(first.data.tags[exhibits.LISTED])
    assert listed == [{"path": path, "type": "table"} for path in exhibits.tables(one)]


def test_system_tags(store, client):
    one = point("tags")
    run_id, _ = store.import_record(one)
    run = client.get_run(run_id)
    told = {name: PRINTS[name] for name in ("gpu", "arch", "driver", "commit", "dirty", "date", "cuda")}
    told |= {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "mlflow.source.git.commit": "abc"}
    assert told.items() <= run.data.tags.items()
    assert "hip" not in run.data.tags, "what is empty is no tag"
    assert run.info.run_name == "pi0  masked  attention=sdpa graphs=manual"
    assert run.data.params == PARAMS


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"attention": "eager", "model": "pi0", "workload": "default"}, "pi0  default  plain"),
        (PARAMS, "pi0  masked  attention=sdpa graphs=manual"),
        (PARAMS | {"stack": "1_graphs"}, "pi0  masked  1_graphs"),
        (
            {"fusion": "none", "fusion.rewrites.trim_prompt": "true", "fusion.qkv": "true"} | PARAMS,
            "pi0  masked  +trim_prompt fusion.qkv=true attention=sdpa graphs=manual",
        ),
        ({"attention": "eager", "attention.denoise": "sdpa", "model": "tiny"}, "tiny  attention.denoise=sdpa"),
        ({"workload.batch_size": "3", "subject.fault": "none"}, "plain"),
    ],
)
def test_title(params, wanted):
    assert title(params) == wanted


def test_committed_results_get_the_same_exhibits(store, client):
    """One of each study: what its record holds is shown as if it had been measured here."""
    first = {path.parent: path for path in sorted(result_files([RESULTS]), reverse=True)}
    assert first
    for path in first.values():
        one = read_record(path)
        run_id, created = store.import_record(one)
        assert created
        files = logged(client, run_id)
        calls = len(one["samples"].get("latency_ms", []))
        assert exhibits.SAMPLES in files or not calls
        assert (exhibits.LATENCY in files) == (calls >= exhibits.PLOTTED)
        assert exhibits.texts(one).keys() <= files
        tags = client.get_run(run_id).data.tags
        assert tags["gpu"] == one["fingerprint"]["gpu"]
        assert tags["torch"] == one["fingerprint"]["versions"]["torch"]
        with pytest.raises(UserError, match="has another result"):
            store.import_record(one | {"facts": {"changed": "yes"}})
