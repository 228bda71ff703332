"""A PostgreSQL of its own for a test, and an MLflow server on it, both on loopback ports."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from cli import environment


def programs() -> Path | None:
    """The folder of PostgreSQL's own programs; Debian keeps them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    given = shutil.which("initdb")
    return found[-1].parent if found else Path(given).parent if given else None


def lacking() -> str:
    """Why there can be none here; empty where there can."""
    if programs() is None:
        return "needs PostgreSQL: apt-get install postgresql"
    if find_spec("psycopg2") is None:
        return "needs psycopg2: pip install psycopg2-binary"
    if os.getuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def postgres() -> Iterator[str]:
    """Its URL. As the user postgres when this is root, which it refuses to run as."""
    folder, binaries = Path(tempfile.mkdtemp(prefix="pi0exp-postgres-")), programs()
    assert binaries is not None
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    port = free_port()

    def run(*words: str) -> None:
        subprocess.run(words, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run(str(binaries / "initdb"), "-D", f"{folder}/data", "-A", "trust", "-U", "postgres", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        run(str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
        finally:
            run(str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(backend: str, folder: Path) -> Iterator[str]:
    """Its URL; artifacts go through it into `folder`."""
    port = free_port()
    words = ["--backend-store-uri", backend, "--artifacts-destination", str(folder), "--workers", "2"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words, "--host", "127.0.0.1", "--port", str(port)],
            env=environment(folder)
            | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                told = (folder / "server.log").read_text()[-3000:]
                assert server.poll() is None, told
                assert time.monotonic() < deadline, told
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(20)
