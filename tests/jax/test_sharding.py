"""Data parallelism on four devices gives the numbers of one."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_jit_with_a_mesh_and_shard_map_agree_with_one_device():
    script = Path(__file__).with_name("sharded_run.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert gaps.pop("devices") == 4
    assert gaps.pop("statistics not summed") > 1e-3, "the control must fail"
    # coefficients amplify the rounding of the sums
    assert gaps.pop("quadratic model, checked") <= 1e-9
    assert all(gap <= 1e-12 for gap in gaps.values()), gaps
