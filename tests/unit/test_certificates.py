"""Certificates by hash: only where they are the same certificates."""

from pathlib import Path

import pytest

from trainers.runner.certificates import with_certificates_by_hash


def pem(*bodies: str) -> str:
    return "".join(f"# {body}\n-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n" for body in bodies)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "certs").mkdir()
    (tmp_path / "bundle.pem").write_text(pem("AAAA", "BB\nBB"))
    (tmp_path / "certs" / "0123abcd.0").write_text(pem("AAAA"))
    (tmp_path / "certs" / "0123abce.1").write_text(pem("BBBB"))
    (tmp_path / "certs" / "README").write_text(pem("CCCC"))
    return {"SSL_CERT_FILE": str(tmp_path / "bundle.pem"), "SSL_CERT_DIR": str(tmp_path / "certs"), "OTHER": "1"}


def test_the_same_certificates_are_looked_up_by_hash(environment: dict[str, str]) -> None:
    assert with_certificates_by_hash(environment) == {"SSL_CERT_DIR": environment["SSL_CERT_DIR"], "OTHER": "1"}


@pytest.mark.parametrize("bodies", [["AAAA"], ["AAAA", "BBBB", "CCCC"], []])
def test_other_certificates_are_left_alone(environment: dict[str, str], bodies: list[str]) -> None:
    Path(environment["SSL_CERT_FILE"]).write_text(pem(*bodies))
    assert with_certificates_by_hash(environment) == environment


def test_missing_places_are_left_alone(environment: dict[str, str]) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        broken = environment | {name: "/nowhere"}
        assert with_certificates_by_hash(broken) == broken
