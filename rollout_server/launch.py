"""Starts, watches and ends the rollout server's processes: one web, and a manager for each replica, which has a worker.

`with RolloutServer(…) as server:` returns when `/health` is 200, so when the weights are loaded; `server.base_url` is
what agents get. A worker that dies is started again by its manager; `check` says which other process died, or whose worker
cannot be kept alive, with its last words. No process outlives the one that made the server (on Linux even the *thread*: keep
it in one that lives on), and Ctrl-C reaches only the parent, which ends the others in order. A SIGTERM may reach them all
at once, as from systemd or Slurm: web drains at once then, managers and workers wait until the parent ends them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from lightning_rl.errors import ServerError
from rollout_server.admin_client import AdminClient
from rollout_server.config import EngineConfig
from rollout_server.manager.worker_process import EPITAPH, PID_FILE
from rollout_server.private_directory import CONFIG, PrivateDirectory, remove_abandoned

if TYPE_CHECKING:
    from rollout_server.api.front.limits import Limits
    from rollout_server.api.model_names import AgentRoute
    from rollout_server.api.upstreams.provider import Provider

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 6.0

_WEB = "rollout_server.api.process"
_MANAGER = "rollout_server.manager.process"
_ROOT = Path(__file__).resolve().parent.parent


class RolloutServer:
    """The engine's settings are `EngineConfig`'s; those of caches and batches are each replica's, `threads` is shared out.

    `port` 0 takes any free one; `aliases` are further model names, `GLOB` or `GLOB=MODEL`; `dp` is the number of replicas, on a
    GPU of its own each where there are GPUs; `adapters` are LoRA adapters to begin with: directories by name. `routes` say which
    agents one of them or of `upstreams` answers, `redact` and `known_keys` what is taken out of calls before they are stored.
    Without an `admin_key` one is made up, for `admin()` alone. Limits, draining, origins and the parsers are `WebConfig`'s.
    """

    def __init__(
        self,
        model_dir: Path,
        served_name: str,
        dtype: str,
        *,
        log_dir: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        store: Path | str | None = None,
        aliases: Sequence[str] = (),
        api_key: str | None = None,
        admin_key: str | None = None,
        kv_tokens: int = 65536,
        page_size: int = 16,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        lookahead: int = 1,
        host_kv_tokens: int = 0,
        host_kv_dir: Path | str | None = None,
        device: str = "auto",
        shared_prefix: bool = True,
        max_adapters: int = 64,
        threads: int | None = None,
        batch_invariant: bool = False,
        dp: int = 1,
        adapters: Mapping[str, Path | str] | None = None,
        limits: Limits | None = None,
        drain_s: float = 0.0,
        cors_origins: Sequence[str] = (),
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        routes: Sequence[AgentRoute] = (),
        upstreams: Mapping[str, Provider] | None = None,
        redact: Sequence[str] = (),
        known_keys: Sequence[str] = (),
    ) -> None:
        if not _is_loopback(host) and api_key is None:
            raise ServerError(f"refusing to serve on {host} without an API key", hint="give a key, or use 127.0.0.1")
        devices = replica_devices(device, dp)
        self.admin_key = admin_key or secrets.token_urlsafe(24)
        self._log_dir = log_dir
        self._host = host
        self._port = port
        self._drain_s = drain_s
        self._web_settings: dict[str, object] = {
            "served_name": served_name,
            "aliases": list(aliases),
            "store": str(store) if store is not None else None,
            "api_key": api_key,
            "admin_key": self.admin_key,
            "drain_s": drain_s,
            "cors_origins": list(cors_origins),
            "tool_parser": tool_parser,
            "reasoning_parser": reasoning_parser,
            "routes": msgspec.to_builtins(list(routes)),
            "upstreams": msgspec.to_builtins(dict(upstreams or {})),
            "redact": list(redact),
            "known_keys": [*known_keys, *([admin_key] if admin_key else [])],  # nobody but us knows one that is made up
        }
        if limits is not None:
            self._web_settings["limits"] = msgspec.to_builtins(limits)
        self._adapters = dict(adapters or {})
        self._private = PrivateDirectory()
        self._directory = self._private.path
        self._engines = [
            EngineConfig(
                ipc_dir=str(self._directory / str(number)),
                model_dir=str(Path(model_dir).resolve()),
                parent_pid=os.getpid(),
                dtype=dtype,
                kv_tokens=kv_tokens,
                page_size=page_size,
                max_batch=max_batch,
                max_step_tokens=max_step_tokens,
                lookahead=lookahead,
                host_kv_tokens=host_kv_tokens,
                host_kv_dir=None if host_kv_dir is None else str(Path(host_kv_dir).resolve() / str(number)),
                device=own_device,
                shared_prefix=shared_prefix,
                max_adapters=max_adapters,
                threads=threads_of_each(threads, dp),
                batch_invariant=batch_invariant,
                worker_log=str(self.log_file(_named("worker", number, dp)).resolve()),
            )
            for number, own_device in enumerate(devices)
        ]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.base_url = ""

    def start(self) -> None:
        """Raises ServerError, with the last words of the process at fault."""
        remove_abandoned()
        try:
            with self._listen() as listener:
                self.base_url = f"http://{_in_url(self._host)}:{listener.getsockname()[1]}"
                self._spawn_all(listener)
            self._wait_until_healthy()
            for name, path in self._adapters.items():
                self.admin().load_adapter(name, Path(path).resolve())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes in order: web first, so that nobody is cut off without an answer, and managers, which end their
        workers. Idempotent. An exception on the way (Ctrl-C once more) ends them at once."""
        try:
            self._end("web", signal.SIGTERM, self._drain_s + STOP_TIMEOUT_S)
            self._end("manager", signal.SIGINT, STOP_TIMEOUT_S)
        finally:
            for process in self._processes.values():
                process.kill()
            for process in self._processes.values():
                process.wait()
            self._processes.clear()
            self._private.remove()

    def _end(self, kind: str, how: signal.Signals, timeout_s: float) -> None:
        ending = [name for name in self._processes if name.partition("-")[0] == kind]
        for name in ending:
            self._processes[name].send_signal(how)
        for name in ending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[name].wait(timeout_s)
                del self._processes[name]

    def check(self) -> None:
        """Raises ServerError if the web process or a manager has ended."""
        for failure in self.ended().values():
            raise failure

    def check_serving(self) -> None:
        """Raises ServerError if nobody can be served any more: the web process has ended, or every manager."""
        ended = self.ended()
        if "web" in ended:
            raise ended["web"]
        if len(ended) == len(self._engines):
            raise next(iter(ended.values()))

    def ended(self) -> dict[str, ServerError]:
        """What has ended by name, and how."""
        return {
            name: self._report(name, code)
            for name, process in self._processes.items()
            if (code := process.poll()) is not None
        }

    def _report(self, name: str, code: int) -> ServerError:
        how = f"ended with {_describe(code)}"
        kind, _, number = name.partition("-")
        epitaph = self._directory / (number or "0") / EPITAPH
        if kind == "manager" and epitaph.exists():
            name, how = name.replace("manager", "worker"), epitaph.read_text()
        return ServerError(
            f"the server's {name} process {how}; last words:\n{self._last_words(name)}",
            hint=f"the whole log is {self.log_file(name)}",
        )

    def admin(self) -> AdminClient:
        return AdminClient(self.base_url, self.admin_key, self.check)

    def log_file(self, name: str) -> Path:
        """Log of `web`, `manager` or `worker`; with several replicas of `manager-0`, `worker-0`, …"""
        return self._log_dir / f"{name}.log"

    @property
    def pids(self) -> dict[str, int]:
        """Of all processes; a worker's is that of the present one."""
        found = {name: process.pid for name, process in self._processes.items()}
        for number, engine in enumerate(self._engines):
            file = Path(engine.ipc_dir) / PID_FILE
            if _named("manager", number, len(self._engines)) in found and file.exists():
                found[_named("worker", number, len(self._engines))] = int(file.read_text())
        return found

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> socket.socket:
        """Bound here and inherited by the web process: a taken port is known at once, a free one exactly."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self._port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise ServerError(
                    f"port {self._port} on {self._host} is in use", hint="choose another port, or 0 for any free one"
                ) from error
            raise ServerError(f"cannot listen on {self._host}:{self._port}: {error.strerror}") from error
        return listener

    def _spawn_all(self, listener: socket.socket) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for number, engine in enumerate(self._engines):
            directory = Path(engine.ipc_dir)
            directory.mkdir(mode=0o700)
            if engine.host_kv_dir is not None:
                Path(engine.host_kv_dir).mkdir(parents=True, exist_ok=True)
            config = _write_private(directory / CONFIG, msgspec.to_builtins(engine))
            self._spawn(_named("manager", number, len(self._engines)), _MANAGER, config)
        first = self._engines[0]
        settings = {
            **self._web_settings,
            "ipc_dirs": [engine.ipc_dir for engine in self._engines],
            "model_dir": first.model_dir,
            "parent_pid": first.parent_pid,
            "kv_tokens": first.num_pages * first.page_size,
            "host_kv_tokens": first.host_kv_tokens,
            "listen_fd": listener.fileno(),
        }
        self._spawn("web", _WEB, _write_private(self._directory / CONFIG, settings), listener.fileno())

    def _spawn(self, name: str, module: str, config: Path, *inherited: int) -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with self.log_file(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONSAFEPATH": "1",
                },
                start_new_session=True,
                pass_fds=inherited,
            )

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        admin = self.admin()
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(ServerError):  # not yet
                admin.health(timeout=2.0)
                return
            time.sleep(0.1)
        words = "\n".join(f"{name}: {self._last_words(name, 3)}" for name in self.pids)
        raise ServerError(f"the server did not start within {START_TIMEOUT_S:.0f} s; last words:\n{words}")

    def _last_words(self, name: str, lines: int = 15) -> str:
        file = self.log_file(name)
        text = file.read_text(errors="replace") if file.exists() else ""
        return "\n".join(text.splitlines()[-lines:]) or "(none)"


def threads_of_each(threads: int | None, dp: int) -> int | None:
    """Torch threads of each of `dp` workers. One worker is left torch's choice; several share the machine's cores."""
    if dp == 1:
        return threads
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, (threads or cores) // dp)


def replica_devices(device: str, dp: int) -> list[str]:
    """One device a replica: GPUs are not shared, the CPU is. Raises ServerError where there are too few."""
    if dp < 1:
        raise ServerError(f"{dp} replicas cannot serve", hint="dp is at least 1")
    if dp == 1 or device == "cpu":
        return [device] * dp
    if device not in ("auto", "cuda"):
        raise ServerError(f"{device} is one device, and {dp} replicas need one each", hint="use device cuda, or cpu")
    from torch import cuda

    gpus = cuda.device_count()
    if gpus == 0 and device == "auto":
        return ["cpu"] * dp
    if gpus < dp:
        raise ServerError(
            f"{dp} replicas need a GPU each, this machine has {gpus}", hint="fewer replicas, or device cpu"
        )
    return [f"cuda:{number}" for number in range(dp)]


def _named(kind: str, number: int, replicas: int) -> str:
    return kind if replicas == 1 else f"{kind}-{number}"


def _write_private(path: Path, settings: object) -> Path:
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings))
    return path


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
