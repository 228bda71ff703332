"""Commands end quietly where their reader is gone, and otherwise as they would."""

import subprocess
import sys

import pytest

from pi0exp.pipes import CLOSED, leave

TALKS = "from pi0exp.pipes import leave\ndef main():\n    for i in range(100000): print(i)\n    return 0\nleave(main)"


def ended(script: str, lines: int) -> tuple[int, str]:
    """Exit code and stderr of a script of whose output some lines are read."""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        for i in range(lines):
            assert process.stdout.readline() == f"{i}\n"
        process.stdout.close()
        return process.wait(timeout=60), process.stderr.read()


def test_a_reader_that_goes_ends_the_command_quietly():
    assert ended(TALKS, 1) == (CLOSED, "")
    assert CLOSED == 141


def test_help_that_nobody_reads_is_quiet():
    """The parser ends the command by itself."""
    late = "import time; from pi0exp import parity, pipes; time.sleep(0.5)"
    _, said = ended(f"{late}; pipes.leave(lambda: parity.main(['--help']))", 0)
    assert said == ""


@pytest.mark.parametrize("code", [0, 3])
def test_the_code_is_the_commands(code: int):
    with pytest.raises(SystemExit) as left:
        leave(lambda: code)
    assert left.value.code == code

    def refuses() -> int:
        raise SystemExit(2)

    with pytest.raises(SystemExit) as left:
        leave(refuses)
    assert left.value.code == 2
