"""Studies one after the other: what is told of them, and what stops the next one."""

import json
import subprocess

from pi0exp.experiments import campaign


class Process:
    """For `python -m pi0exp study=NAME`: settles all of ladder, misses a point of masking, dies in all others."""

    def __init__(self, command, **_):
        study = command[3].removeprefix("study=")
        self.text = {
            "ladder": "study ladder: 2 of 2 points settled, complete\n",
            "masking": "study masking: 1 of 2 points settled; missing: #1 oom; the same command again measures only\n",
        }.get(study, "")
        self.returncode = {"ladder": 0, "masking": 5}.get(study, 1)

    def communicate(self, timeout=None):
        return self.text, None


def test_one_that_fails_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Process)
    code = campaign.main(["breakdown", "masking", "ladder", "--quick", "--results", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()[-3:]
    assert code == 1
    assert told[0].startswith("breakdown: failed with exit code 1")
    assert told[1].startswith("masking: missing: #1 oom, 1 of 2 points settled")
    assert told[2].startswith("ladder: complete, 2 of 2 points settled")
    kept = [json.loads(line) for line in (tmp_path / "campaign.jsonl").read_text().splitlines()]
    assert [(row["study"], row["words"]) for row in kept] == [
        (name, ["measure=quick"]) for name in ("breakdown", "masking", "ladder")
    ]


def test_at_the_limit_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert campaign.main(["--minutes", "0", "--results", str(tmp_path), "ladder"]) == 1
    assert "ladder: not begun" in capsys.readouterr().out


def test_unknown_study_is_named(tmp_path, capsys):
    assert campaign.main(["none_such", "--results", str(tmp_path)]) == 2
    assert "none_such: no such study; there are ladder, " in capsys.readouterr().err
