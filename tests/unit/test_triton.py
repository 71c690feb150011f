"""The Triton kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether kernels are interpreted, so each file of cases has a process of its own;
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


@pytest.mark.parametrize("cases", ["triton_attention.py", "triton_operations.py", "triton_decoder.py"])
def test_interpreted(cases: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout=200", str(HERE / cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
