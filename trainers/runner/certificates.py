"""Making `OpenAI()` cheap in a process that lives for one episode.

An HTTP client reads the whole bundle of trusted certificates, some 30 ms, although an agent's calls to the policy are
plain HTTP. OpenSSL can instead look certificates up by hash in a directory when one is needed. Where such a directory
holds exactly the certificates of the bundle in use, agents are pointed at it: they trust the same, and pay nothing
until they need it.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from pathlib import Path

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
HASHED_NAME = re.compile(r"[0-9a-f]{8}\.\d+")


def with_certificates_by_hash(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the trusted certificates as a directory where that is the same as the bundle."""
    defaults = ssl.get_default_verify_paths()
    bundle = Path(environment.get(defaults.openssl_cafile_env) or defaults.openssl_cafile)
    folder = Path(environment.get(defaults.openssl_capath_env) or defaults.openssl_capath)
    changed = dict(environment)
    if bundle.is_file() and folder.is_dir():
        hashed = [path for path in folder.iterdir() if HASHED_NAME.fullmatch(path.name) and path.is_file()]
        if _certificates([bundle]) == _certificates(hashed):
            changed.pop(defaults.openssl_cafile_env, None)
            changed[defaults.openssl_capath_env] = str(folder)
    return changed


def _certificates(files: list[Path]) -> set[bytes]:
    return {b"".join(body.split()) for path in files for body in CERTIFICATE.findall(path.read_bytes())}
