"""In the place of pi0exp.measure: writes into a log when it has which GPU, and measures nothing.

"stubborn" in the name of the log: it stays for long and does not hear SIGTERM.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pi0exp.result import Outcome, Result

if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    log = Path(json.loads(source.read_text())["log"])
    stubborn = "stubborn" in log.name
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin = time.monotonic()
    line = {"gpu": os.environ["PI0EXP_GPU"], "visible": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid()}
    if stubborn:
        log.write_text(json.dumps(line))
    time.sleep(600 if stubborn else 0.2)
    with log.open("a") as file:
        file.write(json.dumps(line | {"begin": begin, "end": time.monotonic()}) + "\n")
    target.write_text(json.dumps(Result(Outcome.ERROR, ["measures nothing"]).to_dict()))
