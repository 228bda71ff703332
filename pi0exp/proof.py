"""Did it really run? The names of kernels and runtime calls in a profile of a few calls, against what options promise.

A library may quietly take another path inside; this is the defence against believing it did not.
"""

import re
from collections.abc import Iterable


def unproven(proofs: Iterable[tuple[str, str]], names: set[str]) -> list[str]:
    """One sentence for each promise that no name keeps."""
    return [
        f"{what}: no GPU kernel or runtime call of the profile matches /{pattern}/"
        for what, pattern in proofs
        if not any(re.search(pattern, name) for name in names)
    ]
