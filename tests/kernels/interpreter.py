"""Runs a file's tests of kernels in Triton's interpreter, which must be chosen before the first
kernel is imported: in a process apart."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 and later turn no array of one element into an int."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


def run_interpreted(path: str) -> None:
    """Runs the tests of `path` that are marked `interpreted`."""
    if INTERPRETED:
        pytest.skip("already there")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
