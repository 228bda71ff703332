"""Whose something is, and what can be known of its process from here."""

import subprocess
import sys
from dataclasses import replace

import pytest

from pi0exp import owner
from pi0exp.owner import Owner, this_process

ID, OTHER_ID = "3d1219c7c4c5404aaa1f6d2a48adfda4", "a" * 32


@pytest.fixture
def identify(monkeypatch, tmp_path):
    """Give this machine an id; None for one that has none."""
    file = tmp_path / "machine-id"
    monkeypatch.setattr(owner, "MACHINE_ID", file)

    def identify(text: str | None) -> None:
        owner._machine.cache_clear()
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)

    yield identify
    owner._machine.cache_clear()


@pytest.mark.parametrize("text", [f"{ID}\n", "uninitialized\n", "", None])
def test_text_form(identify, text):
    identify(text)
    here = this_process()
    assert bool(here.machine) is (text == f"{ID}\n")
    assert ID not in str(here), "the id leaves the machine nowhere"
    assert Owner.parse(str(here)) == here
    assert here.alive() is True
    assert Owner.parse("") is Owner.parse("a+b+c+d") is Owner.parse("a+b+c+d+e+f+g") is None


def test_form_of_earlier_versions(identify):
    identify(ID)
    here = this_process()
    found = Owner.parse("+".join((here.host, here.boot, here.space, here.pid, here.began)))
    assert found == replace(here, machine="")
    assert found.alive() is True
    assert replace(found, began="1").alive() is False
    assert replace(found, boot="before").alive() is None, "this host before it started anew, or another one"


def test_process_that_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert replace(this_process(), pid=str(child.pid)).alive() is False
    assert replace(this_process(), began="1").alive() is False, "its number was given to another process"


def test_process_that_cannot_be_seen_from_here():
    assert replace(this_process(), host="elsewhere").alive() is None
    assert replace(this_process(), space="1").alive() is None


def test_host_that_started_anew_is_told_from_another_of_its_name(identify):
    identify(OTHER_ID)
    other = replace(this_process(), boot="before")
    identify(ID)
    assert replace(this_process(), boot="before").alive() is False
    assert other.alive() is None
    identify(None)
    assert other.alive() is None
    assert replace(this_process(), boot="before").alive() is None, "without an id neither can be told"
