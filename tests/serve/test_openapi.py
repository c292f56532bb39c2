"""The live endpoint against its own description: every answer is a documented one."""

import subprocess
import sys
from pathlib import Path

import pytest

from ip2p.workspace import Workspace
from tests.serve.conftest import TOKEN, make_key, served

# Not every text is a picture, which the description can't say; and numbers are read from texts.
NOT_CHECKED = "positive_data_acceptance,negative_data_rejection"
KEYS = [make_key("tests", TOKEN, edits_per_minute=10**6, concurrent_edits=10**4)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_answer_is_undocumented(recipe, tmp_path, local_ray):
    with served(recipe, Workspace(tmp_path), KEYS) as address:
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {TOKEN}", "--exclude-checks", NOT_CHECKED]
        command += ["--max-examples", "300", "--seed", "1", "--workers", "2"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1400)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:]
