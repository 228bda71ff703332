"""experiments/campaign.py where a study is this file: it notes each signal that it gets, and ends by the first.

python tests/stand_in.py FOLDER ladder masking --results FOLDER
"""

import signal
import sys
import time
from pathlib import Path


def study(folder: Path) -> None:
    def end(number: int, frame: object) -> None:
        with (folder / "signals").open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")
        time.sleep(0.5)  # for another one to come
        sys.exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    print("its first point", flush=True)
    (folder / "begun").touch()
    time.sleep(60)


if __name__ == "__main__":
    if sys.argv[2].startswith("study="):
        study(Path(sys.argv[1]))
        sys.exit()
    from pi0exp import interrupts
    from pi0exp.experiments import campaign

    campaign.STUDY = (sys.executable, __file__, sys.argv[1])
    interrupts.install()
    sys.exit(campaign.main(sys.argv[2:]))
