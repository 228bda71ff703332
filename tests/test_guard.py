"""The guard of a command: what it leaves behind when its parent is killed, and when the command ends by itself."""

import subprocess
import sys

import pytest

GUARD = [sys.executable, "-m", "pi0exp.guard"]
PARENT = f"""
import subprocess, sys, time
guard = subprocess.Popen([*{GUARD!r}, *sys.argv[1:]], stdin=subprocess.PIPE)
time.sleep(600)
"""
DEAF = "trap '' TERM; echo up; while true; do sleep 1; done"


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "experiment.json").write_text("{}")
    return folder


# What listens ends at once, and with it the guard: each time anew it must not end before the folder is gone.
@pytest.mark.parametrize("command", [*["echo up; exec sleep 600"] * 5, DEAF], ids=[*"abcde", "deaf"])
def test_nothing_is_left_of_a_killed_parent(scratch, command):
    words = [sys.executable, "-c", PARENT, str(scratch), "sh", "-c", command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        assert scratch.exists()
        parent.kill()
        assert parent.stdout.read() == "", "it ends with the last process that has it: parent, guard, command"
    assert not scratch.exists()


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -SEGV $$", -11), ("sleep 600 & exit 0", 0)])
def test_folder_stays_while_the_parent_lives(scratch, command, code):
    """It reads the result there."""
    with subprocess.Popen([*GUARD, str(scratch), "sh", "-c", command], stdin=subprocess.PIPE) as guard:
        assert guard.wait(60) == code
    assert (scratch / "experiment.json").exists()
