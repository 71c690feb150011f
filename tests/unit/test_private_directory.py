"""What a killed server leaves behind is removed by the next one, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rollout_server.private_directory import CONFIG, PrivateDirectory, remove_abandoned

OWNER = """
import json, os, sys, time
from rollout_server.private_directory import CONFIG, PrivateDirectory
private = PrivateDirectory()
(private.path / "weights").mkdir()
(private.path / CONFIG).write_text(json.dumps({"parent_pid": os.getpid()}))
print(private.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def start(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], env={**os.environ, "TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_directory_goes_with_its_owner_at_the_latest_when_the_next_one_starts(tmp_path: Path) -> None:
    process, path = start(tmp_path)
    assert path.is_dir()
    assert path.stat().st_mode & 0o777 == 0o700
    assert remove_abandoned() == []
    end(process)
    assert remove_abandoned() == [path]
    assert not path.exists()


def test_what_may_be_in_use_or_is_not_ours_stays(tmp_path: Path) -> None:
    process, path = start(tmp_path)
    end(process)
    gone = json.loads((path / CONFIG).read_text())["parent_pid"]

    held = PrivateDirectory()  # by another container's process, whose number says nothing here
    (held.path / CONFIG).write_text(json.dumps({"parent_pid": gone}))
    beginning = PrivateDirectory()
    for name, config in [("lrl-unlocked", {"parent_pid": gone}), ("lrl-odd", [])]:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text(json.dumps(config))
    (tmp_path / "lrl-odd" / "owner.lock").touch()
    (tmp_path / "lrl-file").touch()
    target = path.rename(tmp_path / "target")
    (tmp_path / "lrl-link").symlink_to(target)

    assert remove_abandoned() == []
    assert (target / CONFIG).is_file()
    for private in (held, beginning):
        private.remove()
        private.remove()
        assert not private.path.exists()
