"""A suite in several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NO_TESTS = 5  # pytest's exit code
_MOST = 8


def run_shared(*words: str, **variables: str) -> None:
    """Run pytest with these arguments and variables in a process for each processor, which divide the tests.

    Raises:
        AssertionError: with the end of what a process said.
    """
    count = min(os.cpu_count() or 1, _MOST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *words]

    def run(number: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYQE_TEST_SHARE": f"{number}/{count}", **variables}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count)))
    for result in results:
        assert result.returncode in (0, _NO_TESTS), result.stdout[-5000:]
    assert any(result.returncode == 0 for result in results), "no tests"
