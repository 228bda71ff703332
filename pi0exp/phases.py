"""Where the wall-clock time of a point goes: told from what its process says it is doing, and when it says so."""

import time
from collections.abc import Callable

START = "start"
"""Until the process says what it does: starting Python, importing torch."""
PHASES = ("ceilings", "verify", "build", "warm", "measure", "profile")
"""First words of what a process says. Other words belong to the phase in which they are said."""
NAMES = {"warm": "warm_up"}


class Phases:
    """Passes on what it is told, and adds up the seconds until something else is told."""

    def __init__(self, told: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.told, self.clock = told, clock
        self.seconds: dict[str, float] = {}
        self.phase, self.since = START, clock()

    def __call__(self, text: str) -> None:
        word = (text.split() or [""])[0].rstrip(":")
        if word in PHASES:
            self.turn(NAMES.get(word, word))
        self.told(text)

    def turn(self, phase: str) -> None:
        now = self.clock()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase until now, the last one's among them, and of all: `wall_s/<phase>`, `wall_s/total`."""
        self.turn(self.phase)
        found = {f"wall_s/{phase}": seconds for phase, seconds in self.seconds.items()}
        return found | {"wall_s/total": sum(self.seconds.values())}
