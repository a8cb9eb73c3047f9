"""Every request of a push fails in every way: no hand-written word is lost, no half commit, one error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hub_fixtures
from hub_fixtures import LocalHub

hub = hub_fixtures.hub


def test_every_request_of_a_push_fails_in_every_way(hub: LocalHub) -> None:
    script = Path(__file__).with_name("push_faults.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=hub.environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == {}
    assert result["pushes"] == 312
