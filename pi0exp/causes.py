"""What broke a measurement, told from what libraries and drivers print: memory that ran out, errors of the GPU.

Exceptions and the logs of processes that died are both texts by then; PyTorch, cuBLAS, Triton and the runtimes of
NVIDIA and AMD each have a wording of their own for the same two things.
"""

import re
from pathlib import Path

MEMORY = re.compile(
    r"(?:CUDA|HIP|XPU) out of memory"
    r"|(?:CUDA|HIP) error: out of memory"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|HSA_STATUS_ERROR_OUT_OF_RESOURCES"
    r"|(?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER|HIPBLAS|MIOPEN)_STATUS_ALLOC_FAILED|miopenStatusAllocFailed"
    r"|rocblas_status_memory_error"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|std::bad_alloc|Cannot allocate memory"
)
"""Memory of the device or the host ran out. Shared memory or registers that a kernel lacks are no such thing."""
GPU = re.compile(
    r"(?:CUDA|HIP) error: [^\n]+"
    r"|(?:CUDA|HIP) driver error: [^\n]+"
    r"|(?:CUBLAS|CUDNN|HIPBLAS|HIPBLASLT)_STATUS_(?!SUCCESS)[A-Z_]+"
    r"|Memory access fault by GPU [^\n]+"
    r"|HSA_STATUS_ERROR[A-Z_]*"
    r"|[Dd]evice-side assert[^\n]*"
)
"""An error that the GPU or its runtime reports. After one the process can do nothing more on it."""
_LAST_WORDS = re.compile(r"terminate called after throwing[^\n]*(?:\n[^\n]*){0,3}")
"""What C++ prints before it aborts."""
_VMSTAT = Path("/proc/vmstat")


def is_memory(text: str) -> bool:
    """Whether the message of an exception says that memory ran out."""
    return MEMORY.search(text) is not None


def of_death(log: str) -> tuple[bool, str]:
    """(whether memory ran out, what is known of the cause or "") of a process that died with this log.

    Memory counts only in its last words: a library may have run out of memory before, told so and gone on.
    """
    words = _LAST_WORDS.findall(log)
    if words and (found := MEMORY.search(words[-1])):
        return True, found[0]
    errors = GPU.findall(log)
    return False, errors[-1].strip() if errors else ""


def host_kills() -> int | None:
    """How many processes Linux has killed on this host for want of memory; None where it does not say."""
    try:
        lines = (line.split() for line in _VMSTAT.read_text().splitlines())
        return next((int(line[1]) for line in lines if line[0] == "oom_kill"), None)
    except OSError:
        return None
