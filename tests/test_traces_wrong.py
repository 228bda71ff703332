"""Files of profilers that are missing, torn, foreign or say nothing of kernels: one line tells what to give instead."""

import gzip
from pathlib import Path

import pytest

from pi0exp.errors import UserError
from pi0exp.traces import read_trace

TRACES = Path(__file__).parent / "data" / "traces"
ROCPROF_JSON = (
    b'{"traceEvents": [{}, {"ph": "M", "name": "process_name", "pid": 8, "args": {"name": "GPU2"}},'
    b' {"ph": "X", "name": "attn_fwd.kd", "pid": 8, "tid": 1, "ts": "1614963487831", "dur": "30", "args":'
    b' {"KernelName": "attn_fwd.kd", "gpu-id": "2", "BeginNs": "1614963487831917", "EndNs": "1614963487861917"}}]}'
)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refused(tmp_path / "none.json")
    assert "directory" in refused(tmp_path).lower()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.json", b"", "empty"),
        ("torn.json", b'{"traceEvents": [{"ph": "X", "cat": "ker', "torn or no JSON"),
        ("torn.json.gz", gzip.compress(b'{"traceEvents": []}' * 99, mtime=0)[:-20], "torn"),
        ("other.json", b'{"metrics": {"p50": 3}}', "no Chrome trace"),
        ("numbers.json", b"[1, 2, 3]", "no Chrome trace"),
        ("cpu.json", b'{"traceEvents": [{"ph":"X","cat":"cpu_op","name":"a","ts":1,"dur":2}]}', "no GPU kernel"),
        ("nodur.json", b'{"traceEvents": [{"ph":"X","cat":"kernel","name":"k","ts":1,"args":{}}]}', "dur"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\xff\xfe", "no text"),
        ("report.nsys-rep", b"x", "nsys stats --format csv"),
        ("results.db", b"x", "rocpd convert -i "),
        ("results.db", b"x", "results.db --output-format csv (rocprofv3), or give results.csv of the same run"),
        ("results.json", ROCPROF_JSON, "give results.csv of the same run"),
        ("results.json.gz", gzip.compress(ROCPROF_JSON, mtime=0), "give results.csv of the same run"),
        ("letter.csv", b"Dear sir,\nmadam\n", "no known file"),
        ("header.csv", b'"Name","Calls","TotalDurationNs","AverageNs","Percentage"\n', "no GPU kernel"),
        ("api.csv", b"Start (ns),Duration (ns),Name,Result,CorrID\n1,2,cudaLaunchKernel,0,1\n", "no known file"),
        ("hip_stats.csv", b'"Name","Calls","TotalDurationNs"\nhipLaunchKernel,2,900\nhipMemcpy,1,30\n', "host calls"),
        ("copy_stats.csv", b'"Name","Calls","TotalDurationNs"\nCopyDeviceToHost,2,900\nFillBuffer,1,30\n', "copies"),
        ("hsa_copies.csv", b'"Name","Calls","TotalDurationNs"\n"async-copy",2,900\n', "copies"),
        ("domains.csv", b'"Name","Calls","TotalDurationNs"\n"KERNEL_DISPATCH",2,900\n"HIP_API",1,30\n', "domains"),
        ("scratch.csv", b'"Name","Calls","TotalDurationNs"\n"KERNEL_DISPATCH",2,9\n"SCRATCH_MEMORY",1,3\n', "domains"),
        ("bare.csv", b'"Name","Calls","TotalDurationNs"\nvoid k<1, 2>(int, int),2,9\nvoid k<3, 4>(i', "torn"),
        ("counters.csv", b'"Kernel_Name","Start_Timestamp","End_Timestamp","Counter_Name"\n"k",1,2,3\n', "(Counter_N"),
        ("pmc.csv", b"Kernel_Name,GPU_ID,SQ_WAVES,Start_Timestamp,End_Timestamp\nk,4,9,1,2\n", "(SQ_WAVES)"),
        ("pmc_v2.csv", b"GPU_ID,Kernel_Name,Start_Timestamp,End_Timestamp,TCC_REQ[0]\n4,k,1,2,9\n", "(TCC_REQ[0])"),
        ("pmc_v1.csv", b"KernelName,gpu-id,TCP_TCC_READ_REQ_sum,BeginNs,EndNs\nk,4,9,1,2\n", "REQ_sum), for which"),
        ("backwards.csv", b'"Kernel_Name","Start_Timestamp","End_Timestamp"\n"k",5,2\n', "ends before it begins"),
        ("words.csv", b'"Kernel_Name","Start_Timestamp","End_Timestamp"\n"k",5,soon\n', "line 2"),
    ],
)  # fmt: skip
def test_wrong_files_are_told_on_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


@pytest.mark.parametrize("name", [path.name for path in sorted(TRACES.glob("*.csv")) if "real" not in path.name])
def test_torn_csv(tmp_path, name):
    """Cut in the middle of the last row; what is left of the file would look like a shorter trace."""
    text = (TRACES / name).read_text().rstrip()
    start = text.rindex("\n")
    (tmp_path / name).write_text(text[: start + (len(text) - start) // 3])
    assert "torn" in refused(tmp_path / name)
