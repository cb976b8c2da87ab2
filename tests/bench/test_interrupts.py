"""Ctrl-C: one line and 130, and the rows that there are stay."""

import json
import signal
import subprocess
import sys

from tests.paths import REPOSITORY

# The first implementation is measured at once, the second one never comes to an end.
_MAIN = """
import sys, time
from bench import cli, registry
from bench.case import Measurement
from tests.bench.fakes import FakeCase

class Slow(FakeCase):
    def measure(self, implementation, *, repeats):
        if implementation == "slow":
            print("waiting", file=sys.stderr, flush=True)
            time.sleep(600)
        return super().measure(implementation, repeats=repeats)

fast = Measurement(median_us=2.0, iqr_us=0.1, rel_rms=0.0, compile_s=0.1)
registry.cases_of = lambda op, devices: [Slow({"fast": fast, "slow": fast})]
sys.exit(cli.main())
"""


def test_in_the_middle_of_a_run(tmp_path):
    out = tmp_path / "rows.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, "run", "--op", "fake", "--json", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=60)
    assert err == "error: interrupted\n"
    assert process.returncode == 130
    assert "fake b1" in shown
    assert [row["implementation"] for row in json.loads(out.read_text())] == ["fast"]
