"""python -m pi0exp.report [STUDY ...] [--html DIR] [--write]"""

import argparse
import sys
from pathlib import Path

from pi0exp import pipes
from pi0exp.errors import UserError
from pi0exp.result import CONFIG_ERROR

EPILOG = """examples:
  python -m pi0exp.report ladder               its tables as Markdown, from the committed results and your own runs
  python -m pi0exp.report --html build/report  one page, index.html, that needs no network
  python -m pi0exp.report --write              experiments/results/STUDY/GPU.md and docs/ladder.svg, from the committed
                                               results alone, so that they come out the same for everybody

Your MLflow store is read, not written: committed results that it lacks go into a store in a temporary folder.

exit codes: 0; 2 a study that is not there, a file or a store that cannot be read or written."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m pi0exp.report",
        description="Tables and a page of measured studies, each beside what was published.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("studies", nargs="*", metavar="STUDY", help="studies by their names; default: all")
    made.add_argument("--html", type=Path, metavar="DIR", help="write DIR/index.html instead of printing tables")
    made.add_argument("--write", action="store_true", help="write the files of the repository instead of printing")
    made.add_argument("--uri", help="MLflow tracking URI; default: the SQLite store in the root")
    made.add_argument("--root", type=Path, help="folder of the store; default: mlruns of the repository")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        run(given.studies, given.html, given.write, given.uri, given.root)
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    return 0


def run(studies: list[str], html: Path | None, write: bool, uri: str | None, root: Path | None) -> None:
    from pi0exp.report import files, page, sources, text
    from pi0exp.report.chapters import chapters

    if write:
        for path in files.write(chapters(studies, sources.committed)):
            print(path)
    if write and html is None:
        return
    found = chapters(studies, lambda names: sources.tracked(names, uri, root))
    if html is None:
        print(text.printed(found), end="")
    else:
        print(files.put(html / "index.html", page.page(found)))


if __name__ == "__main__":
    pipes.leave(main)
