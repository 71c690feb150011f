"""The server's commands, as a table for `lrl`: name → (help line, parser, run)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import ServerError

if TYPE_CHECKING:
    from rollout_server.api.front.limits import Limits
    from rollout_server.api.model_names import AgentRoute
    from rollout_server.api.upstreams.provider import Provider
    from rollout_server.launch import RolloutServer

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a model behind the OpenAI API (/v1/chat/completions with tools and streaming, /v1/completions, "
        "/v1/models and others, see docs/api.md) until Ctrl-C or SIGTERM, which let requests under way finish; a second one does "
        "not."
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="built-in name (smollm2-135m, smollm2-moe, tiny-llama, tiny-moe), checkpoint directory, or hub id",
    )
    add("--host", default="127.0.0.1", help="address to listen on; beyond loopback a key is required (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes any free one (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of weights and KV cache (%(default)s)")
    add(
        "--alias",
        action="append",
        default=[],
        metavar="GLOB[=MODEL]",
        help="further model names that clients may use, of the policy or an adapter: 'gpt-*', 'gpt-*=math'; may repeat",
    )
    add(
        "--store",
        metavar="STORE",
        help="episode database, by file or URL: serve and record its episodes at /e/<episode>/v1",
    )
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key which clients must send")
    add(
        "--admin-key-env",
        metavar="NAME",
        help="environment variable that holds the key of weights, adapters, pause, sleep",
    )
    add("--dp", type=int, default=1, metavar="N", help="replicas behind prefix-aware routing (%(default)s)")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU where there is one (%(default)s)")
    add("--kv-tokens", type=int, default=65536, help="tokens that a replica's KV cache holds (%(default)s)")
    add(
        "--host-kv-tokens",
        type=int,
        default=0,
        help="tokens of idle conversations kept outside the device, per replica (%(default)s)",
    )
    add("--host-kv-dir", type=Path, metavar="DIR", help="keep them in files here instead of in memory")
    add("--max-batch", type=int, default=64, help="sequences that a replica decodes at once (%(default)s)")
    add("--threads", type=int, help="threads of all workers together (default: torch's choice)")
    add(
        "--batch-invariant",
        action="store_true",
        help="same seed, same tokens and log-probs bit for bit, whatever else runs; slower",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=PATH",
        help="LoRA adapter that clients choose as model NAME; may repeat",
    )
    add(
        "--upstream",
        action="append",
        default=[],
        type=_upstream,
        metavar="NAME=URL[,env=VAR][,model=M]",
        help="provider that speaks the API, for --route: env names the variable that holds its key, model what it is asked for",
    )
    add(
        "--route",
        action="append",
        default=[],
        type=_route,
        metavar="GLOB=NAME",
        help="who answers agents or model names that fit: policy, an adapter or an upstream; the first that fits; may repeat",
    )
    add(
        "--redact",
        action="append",
        default=[],
        metavar="REGEX",
        help="taken out of calls before they are stored, beside all keys; may repeat",
    )
    add("--tool-parser", metavar="NAME", help="how tool calls are read from replies (default: by the chat template)")
    add("--reasoning-parser", metavar="NAME", help="how reasoning is read from replies (default: by the chat template)")
    add(
        "--max-queue",
        type=int,
        metavar="N",
        help="requests that may wait; more get status 503, one client beyond its share 429",
    )
    add("--request-timeout", type=float, metavar="SECONDS", help="that a request may take at most")
    add(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that requests under way may take to finish when the server is told to end (%(default)s)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages from here may call, e.g. https://example.org; may repeat (default: none may)",
    )
    add("--log-dir", type=Path, help="where the processes log (default: a temporary directory)")


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, Path(path)


def _route(text: str) -> tuple[str, str]:
    glob, _, name = text.rpartition("=")
    if not (glob and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form GLOB=NAME")
    return glob, name


def _upstream(text: str) -> tuple[str, str, dict[str, str]]:
    """Name, base URL, options."""
    head, *options = text.split(",")
    name, _, url = head.partition("=")
    given = dict(option.partition("=")[::2] for option in options)
    if not (
        name and url.startswith(("http://", "https://")) and given.keys() <= {"env", "model"} and all(given.values())
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=URL[,env=VAR][,model=M]")
    return name, url, given


def answerers(
    args: argparse.Namespace, model: str, adapters: Collection[str]
) -> tuple[list[AgentRoute], dict[str, Provider]]:
    """Raises ServerError for routes that lead nowhere, RecipeError for keys that are not there."""
    from rollout_server.api.model_names import POLICY, AgentRoute
    from rollout_server.api.upstreams.provider import Provider, key_from

    upstreams: dict[str, Provider] = {}
    for name, url, given in args.upstream:
        if name in (POLICY, model, *adapters, *upstreams):
            raise ServerError(f"--upstream {name}: something else has this name", hint="give it a NAME of its own")
        key = key_from(os.environ, given["env"], f"--upstream {name}") if "env" in given else None
        upstreams[name] = Provider(base_url=url, api_key=key, model=given.get("model"))
    known = [POLICY, *adapters, *upstreams]
    for glob, name in args.route:
        if name not in known:
            raise ServerError(f"--route {glob}={name}: there is no {name!r}", hint=f"there are {', '.join(known)}")
    return [AgentRoute(match=glob, to=name) for glob, name in args.route], upstreams


def _serve(args: argparse.Namespace) -> int:
    from lightning_rl.redact import check_pattern
    from rollout_server.launch import RolloutServer
    from rollout_server.models.catalog import resolve_model

    adapters = dict(args.adapter)
    if len(adapters) < len(args.adapter):
        raise ServerError("two adapters have the same name", hint="give each --adapter a NAME of its own")
    key = _key_from(args.api_key_env)
    for pattern in args.redact:
        check_pattern(pattern)
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="lrl-serve-"))
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    routes, upstreams = answerers(args, name, adapters)
    server = RolloutServer(
        resolve_model(args.model),
        name,
        args.dtype,
        log_dir=log_dir,
        host=args.host,
        port=args.port,
        store=args.store,
        aliases=args.alias,
        api_key=key,
        admin_key=_key_from(args.admin_key_env),
        kv_tokens=args.kv_tokens,
        max_batch=args.max_batch,
        threads=args.threads,
        dp=args.dp,
        device=args.device,
        host_kv_tokens=args.host_kv_tokens,
        host_kv_dir=args.host_kv_dir,
        batch_invariant=args.batch_invariant,
        adapters=adapters,
        limits=_limits(args),
        drain_s=args.drain_s,
        cors_origins=args.cors_origin,
        tool_parser=args.tool_parser,
        reasoning_parser=args.reasoning_parser,
        routes=routes,
        upstreams=upstreams,
        redact=args.redact,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    print(f"loading {name} ({args.dtype}); logs in {log_dir}", flush=True)
    try:
        with server:
            print(_greeting(server.base_url, name, args.api_key_env), flush=True)
            _watch(server)
    except KeyboardInterrupt:
        print("\nended at once", flush=True)
        return 130
    print("\nstopped", flush=True)
    return 0


def _watch(server: RolloutServer) -> None:
    """Until Ctrl-C or SIGTERM. Raises ServerError when nobody can be served any more."""
    told: set[str] = set()
    try:
        while True:
            time.sleep(1.0)
            server.check_serving()
            for name, failure in server.ended().items():
                if name not in told:
                    told.add(name)
                    print(f"lrl: {failure}\nlrl: the other replicas serve on", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\nending; requests under way may finish (once more: at once)", flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _limits(args: argparse.Namespace) -> Limits:
    from rollout_server.api.front.limits import Limits

    given = {"queued_requests": args.max_queue, "request_timeout_s": args.request_timeout}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ServerError(f"{value} is no limit to serve under", hint=f"give a positive number for {name}")
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _key_from(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ServerError(f"the environment variable {variable} is not set", hint=f"export {variable}=<a long secret>")
    return key


def _greeting(base_url: str, model: str, key_variable: str | None) -> str:
    key = f" -H 'Authorization: Bearer '\"${key_variable}\"" if key_variable else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"serving {model} at {base_url}/v1 (Ctrl-C ends); try\n"
        f"  curl {base_url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )


def _configure_bench(parser: argparse.ArgumentParser) -> None:
    from rollout_server.bench import cli

    cli.configure(parser)


def _bench(args: argparse.Namespace) -> int:
    from rollout_server.bench import cli

    return cli.run(args)


COMMANDS: dict[str, Command] = {
    "serve": ("serve a model behind the OpenAI API", _configure_serve, _serve),
    "bench": ("measure the engine beside its peers and against the machine's limit", _configure_bench, _bench),
}
