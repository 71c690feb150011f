"""The Triton kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether kernels are interpreted, so the files of cases have a process of their own;
`TRITON_INTERPRET=1 pytest tests/unit/triton_attention.py` shows one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


CASES = ["triton_attention.py", "triton_operations.py", "triton_decoder.py"]


@pytest.mark.timeout(900)
def test_interpreted() -> None:
    files = [str(HERE / cases) for cases in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "--timeout=200", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for cases in CASES:
        assert f"{cases} " in done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
