"""Episodes sent to OpenTelemetry's tools: a collector at the other end of OTLP/HTTP, and `lrl traces otlp`.

A request that a collector cannot take just now is sent again, later and later, as its `Retry-After` asks; what it refuses is
an error with its own words. Headers may hold keys: they come from the environment and are in no message.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lightning_rl.errors import LightningError
from lightning_rl.otlp import JSON, PROTOBUF, OtlpError, TraceRequest, encode, encoding_of, refusal

TIMEOUT_S = 10.0
TRIES = 5
FIRST_WAIT_S = 0.5
"""The next ones are twice as long each."""
LONGEST_WAIT_S = 30.0
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_ANSWER_BYTES = 100_000
_AGAIN = frozenset({429, 502, 503, 504})
_PATH = "/v1/traces"
_HEADERS_VARIABLE = "OTEL_EXPORTER_OTLP_HEADERS"
_EXAMPLE = """\
Send episodes to an OpenTelemetry collector, or write them to a file, each as a trace. Prompts, replies and tool results
are left out unless --content is given.

  lrl traces otlp runs/calculator/latest --endpoint http://127.0.0.1:4318
  lrl traces otlp runs/calculator/latest train.3.train-0007.2.0 --content --out episode.jsonl"""


class ExportError(LightningError):
    """A collector that did not take a trace."""


def parse_headers(text: str) -> dict[str, str]:
    """`key=value,key=value` with percent-encoded values. Raises LightningError, which does not repeat the text."""
    headers = {}
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        name, equals, value = part.partition("=")
        name, value = name.strip().lower(), unquote(value.strip())
        if not equals or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise LightningError(f"header {number} for the collector is not of the form key=value")
        if not _HEADER_VALUE.fullmatch(value):
            raise LightningError(f"header {number} for the collector has a character that no header can have")
        headers[name] = value
    return headers


class Collector:
    """Where traces go. `endpoint` is its base URL: `/v1/traces` is appended."""

    def __init__(self, endpoint: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise LightningError(
                "the collector's endpoint must be a URL like http://127.0.0.1:4318, without a password",
                hint="keys go into headers, which come from the environment",
            )
        self._url = endpoint.rstrip("/") + _PATH
        self.name = f"{parts.scheme}://{parts.netloc}"
        """For messages: a path may hold a key."""
        self._headers = dict(headers or {})

    def send(self, request: TraceRequest, tries: int = TRIES, sleep: Callable[[float], object] = time.sleep) -> None:
        """Raises ExportError."""
        body = gzip.compress(encode(request, PROTOBUF), 6, mtime=0)
        for attempt in range(1, tries + 1):
            wait, why = self._post(body)
            if wait is None:
                return
            if attempt == tries:
                raise ExportError(f"{self.name} did not take a trace: {why}")
            sleep(min(LONGEST_WAIT_S, max(wait, FIRST_WAIT_S * 2 ** (attempt - 1))))

    def _post(self, body: bytes) -> tuple[float | None, str]:
        """How long to wait before it is asked again, at least, and why; None when it has the trace. Raises ExportError."""
        headers = {**self._headers, "content-type": PROTOBUF, "content-encoding": "gzip"}
        asked = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with _opener.open(asked, timeout=TIMEOUT_S) as answer:
                refused, why = _refused(answer.headers.get("content-type", ""), answer.read(_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _AGAIN:
                    return _seconds(error.headers.get("retry-after")), f"HTTP {error.code}"
                raise ExportError(f"{self.name} refused a trace: HTTP {error.code} {error.reason}") from None
        except OSError as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return 0.0, f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        except (http.client.HTTPException, ValueError) as error:  # it may quote what was sent
            return 0.0, type(error).__name__
        if refused:
            raise ExportError(f"{self.name} refused {refused} spans: {why}")
        return None, ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Headers that hold keys go to nobody else."""

    def redirect_request(self, *_: object) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def _refused(content_type: str, body: bytes) -> tuple[int, str]:
    """How many spans, and why. An answer that nobody can read says that none was."""
    encoding = encoding_of(content_type)
    try:
        return refusal(body, encoding) if encoding else (0, "")
    except OtlpError:
        return 0, ""


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _EXAMPLE
    parser.add_argument("run", metavar="RUN", help="run directory, or episode database by file or URL")
    parser.add_argument("episodes", metavar="EPISODE", nargs="*", help="their ids; by default all that have ended")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        default=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        help="base URL of the collector (default: OTEL_EXPORTER_OTLP_ENDPOINT); headers come from OTEL_EXPORTER_OTLP_HEADERS",
    )
    parser.add_argument("--content", action="store_true", help="with prompts, replies, tool arguments and results")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="write OTLP's JSON, one request a line, instead of sending"
    )


def run(options: argparse.Namespace) -> int:
    from lightning_rl.otlp.write import trace_request
    from lightning_rl.store import Store
    from lightning_rl.store.place import store_of

    if options.out is None and not options.endpoint:
        raise LightningError("nobody to send to", hint="give --endpoint URL or --out FILE")
    with Store.open(store_of(options.run), create=False) as store:
        ended = [summary.id for summary in store.starts() if summary.outcome is not None]
        chosen = options.episodes or ended
        requests = (trace_request(store.episode(id), content=options.content) for id in chosen)
        if options.out is not None:
            with options.out.open("wb") as file:
                file.writelines(encode(request, JSON) + b"\n" for request in requests)
            print(f"{len(chosen)} episodes are in {options.out}")
            return 0
        collector = Collector(options.endpoint, parse_headers(os.environ.get(_HEADERS_VARIABLE, "")))
        for request in requests:
            collector.send(request)
    print(f"{len(chosen)} episodes were sent to {collector.name}")
    return 0
