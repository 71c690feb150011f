"""A small process that has the agents' imports loaded and forks one child per episode: milliseconds instead of seconds.

It is started clean (no `__main__` of the caller, no threads, no torch of the trainer's), so that forking it is safe,
and it searches modules exactly where its parent does. Every child leads a session of its own and adopts what its own
processes leave behind; when a child ends or is killed, whatever it left behind falls to the fork server and is killed, in
whichever session it is (on Linux; elsewhere only its own session). When the parent goes, however it goes, the fork server kills
every child and goes too; when the fork server is killed, its children die by the kernel's hand.

One socket carries nine-byte commands, a letter and a number: `F` forks the child of that key and brings three
descriptors along (the child's connection, where its output goes, and the pipe on which its exit code is reported), `K`
kills it, `I` is followed by so many bytes that name modules to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_rl.errors import LightningError
from trainers.runner.certificates import with_certificates_by_hash

COMMAND = struct.Struct("!cQ")
EXIT_CODE = struct.Struct("!i")
FORK, KILL, IMPORT = b"F", b"K", b"I"
BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from trainers.runner.fork_server import serve; serve()"
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 5.0
LEAVE_SECONDS = 2.0
OWN_FAILURE = 70
"""Exit code of a child whose failure is ours, not the agent's (EX_SOFTWARE)."""


class ForkServer:
    """The parent's end. `preload` names modules to import once; one that cannot be fails in the child that needs it."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = list(preload)
        self._keys = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()

    def _ensure_running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._socket is not None:
            return self._socket
        self._socket, theirs = socket.socketpair()
        path = [entry or str(Path.cwd()) for entry in sys.path]
        arguments = [str(theirs.fileno()), json.dumps(path), json.dumps(self._preload)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                env=with_certificates_by_hash(os.environ),
            )
        return self._socket

    def fork(self, connection: socket.socket, output: int) -> tuple[int, int]:
        """Fork a child that gets both descriptors. Returns its key and the pipe that brings its exit code, then EOF."""
        self._keys += 1
        status, status_write = os.pipe()
        fds = [connection.fileno(), output, status_write]
        try:
            for _ in range(2):  # it may have been killed since it was last asked
                server = self._ensure_running()
                try:
                    socket.send_fds(server, [COMMAND.pack(FORK, self._keys)], fds)
                    return self._keys, status
                except OSError:
                    self._stop()
        finally:
            os.close(status_write)
        os.close(status)
        raise LightningError("the process that forks agents does not start", hint=self._tail())

    def kill(self, key: int) -> None:
        """Kill a child and all that it started; nothing happens if it has ended."""
        if self._socket is not None:
            try:
                self._socket.sendall(COMMAND.pack(KILL, key))
            except OSError:
                return  # the fork server is gone, and its children with it

    def preload(self, modules: Iterable[str]) -> None:
        """Import further modules, so that children forked from now on need not."""
        new = [name for name in modules if name not in self._preload]
        if not new:
            return
        self._preload += new
        if self._socket is not None:
            names = json.dumps(new).encode()
            with contextlib.suppress(OSError):  # it is gone; its successor starts with them
                self._socket.sendall(COMMAND.pack(IMPORT, len(names)) + names)

    def close(self) -> None:
        """End the fork server and every child."""
        self._stop()
        self._log.close()

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2000))
        return self._log.read().decode(errors="replace")


def serve() -> NoReturn:
    """The fork server's whole life."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _adopt_orphans()
    _import(["trainers.runner.episode_process", *json.loads(sys.argv[3])])
    own = _children()

    wake, wake_write = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    children: dict[int, tuple[int, int]] = {}  # key -> (pid, status pipe)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wake in ready:
                os.read(wake, 4096)
                _reap(children, own)
            if control not in ready:
                continue
            command, fds, _, _ = socket.recv_fds(control, COMMAND.size, 3)
            if not command:
                _leave(children, own)
            kind, key = COMMAND.unpack(command)
            if kind == IMPORT:
                before = _children()
                _import(json.loads(control.recv(key, socket.MSG_WAITALL)))
                own |= _children() - before
                continue
            if kind == KILL:
                if key in children:
                    _kill(children[key][0])
                continue
            pid = os.fork()
            if pid == 0:
                selector.close()
                inherited = [control.detach(), wake, wake_write, fds[2], *(status for _, status in children.values())]
                _become_child(fds[0], fds[1], inherited)
            os.close(fds[0])
            os.close(fds[1])
            children[key] = (pid, fds[2])


def _import(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # raised again, and recorded, in the child that imports it
            traceback.print_exc()
    gc.collect()
    gc.freeze()  # collections in the children then leave the shared pages alone


def _become_child(connection: int, output: int, inherited: list[int]) -> NoReturn:
    """In the child: shed what belongs to the fork server, then run the episode."""
    code = OWN_FAILURE
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in inherited:
            os.close(fd)
        os.setsid()
        _die_with_parent()
        _adopt_orphans()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        from trainers.runner.episode_process import main

        main(socket.socket(fileno=connection))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or the agent closed it
                stream.flush()
        os._exit(code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent or parent == 1:
            os._exit(1)


def _adopt_orphans() -> None:
    """What this process's descendants leave behind becomes its child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children() -> set[int]:
    """Of this process, which has one thread; empty where the system does not say."""
    try:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    except OSError:
        return set()


def _kill(pid: int) -> None:
    """Kill an unreaped child and its session."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # it has no group yet, or it is a zombie already


def _reap(children: dict[int, tuple[int, int]], own: set[int]) -> None:
    """Report every ended child's exit code, after killing what it left behind while its process id is still its own.

    Living children adopt their own orphans, so whoever else is a child here, and not one of `own`, belonged to one that has
    ended. It is killed, and what it leaves in turn comes here with the signal of its end.
    """
    by_pid = {pid: key for key, (pid, _) in children.items()}
    with contextlib.suppress(ChildProcessError):  # nobody is left
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            key = by_pid.pop(ended.si_pid, None)
            if key is None:
                os.waitpid(ended.si_pid, 0)
                own.discard(ended.si_pid)
                continue
            _kill(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            _, pipe = children.pop(key)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(pipe, EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)
    for pid in _children() - by_pid.keys() - own:
        with contextlib.suppress(PermissionError):  # it runs as another user
            os.kill(pid, signal.SIGKILL)


def _leave(children: dict[int, tuple[int, int]], own: set[int]) -> NoReturn:
    """Kill every child and what it leaves behind, and go."""
    for pid, _ in children.values():
        _kill(pid)
    end = time.monotonic() + LEAVE_SECONDS
    while _children() - own and time.monotonic() < end:
        _reap(children, own)
        time.sleep(0.005)
    os._exit(0)
