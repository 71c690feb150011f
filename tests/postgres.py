"""A real PostgreSQL server for tests: in a temporary directory, on a Unix socket, gone with the session."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count()


class PostgresServer:
    """The server refuses to run as root, so it runs as `postgres` where the tests are root."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self.directory = directory
        self._as_other: list[str] = []
        if os.geteuid() == 0:
            user = "postgres"
            shutil.chown(directory, user)
            self._as_other = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        directory.chmod(0o755)
        self._run(
            "initdb", "--pgdata", "data", "--username=lrl", "--auth=trust", "--encoding=UTF8", "--no-locale", "-N"
        )
        settings = (
            f"listen_addresses = ''\nunix_socket_directories = '{directory}'\nfsync = off\nmax_connections = 200\n"
            "shared_buffers = 32MB\nlog_min_messages = panic\n"
        )
        with (directory / "data" / "postgresql.conf").open("a") as conf:
            conf.write(settings)
        self.start()

    def url(self, database: str = "postgres", run: str | None = None) -> str:
        """Without a run: a schema that no other test uses."""
        run = run or f"test-{next(_numbers)}"
        return f"postgresql://lrl@/{database}?host={self.directory}&run={run}"

    def start(self) -> None:
        self._run("pg_ctl", "--pgdata", "data", "--wait", "--log", "log", "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash."""
        self._run("pg_ctl", "--pgdata", "data", "--wait", "--mode", mode, "stop")

    def sql(self, statement: str, database: str = "postgres") -> str:
        return self._run(
            "psql", "-h", str(self.directory), "-U", "lrl", "-d", database, "-v", "ON_ERROR_STOP=1", "-Atc", statement
        )

    def _run(self, program: str, *arguments: str) -> str:
        command = [*self._as_other, str(self._binaries / program), *arguments]
        done = subprocess.run(
            command, cwd=self.directory, text=True, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def _binaries() -> Path | None:
    """The newest ones of the usual places; distributions keep them out of PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "psql").exists()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    binaries = _binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("no PostgreSQL server on this machine: .ci/run installs one")
        pytest.skip("no PostgreSQL server on this machine")
    with tempfile.TemporaryDirectory(prefix="lrl-pg-", ignore_cleanup_errors=True) as directory:
        server = PostgresServer(binaries, Path(directory))
        try:
            yield server
        finally:
            server.stop("immediate")
