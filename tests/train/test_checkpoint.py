"""A checkpoint's file."""

import subprocess
import sys

from ip2p.recipe import REPOSITORY


def test_a_full_disk_says_what_to_do(tmp_path):
    """In a process that may write no more than 100 kB to a file."""
    limited = (
        "import resource, signal, sys, torch\n"
        "from ip2p.train.checkpoint import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save({'step': 40, 'x': torch.ones(100_000)}, [], sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1
    assert f"OSError: the checkpoint of step 40 could not be written to {tmp_path}" in done.stderr
    assert "make room there" in done.stderr and "resumes from the checkpoint before" in done.stderr
