"""What a serving process holds is left out of collections."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, time
from deployments import garbage

held = [[number] for number in range(500_000)]
def longest():
    times = []
    for _ in range(5):
        began = time.perf_counter()
        gc.collect()
        times.append(time.perf_counter() - began)
    return min(times)
before = longest()
garbage.settle()
assert longest() < 0.2 * before, (longest(), before)
assert gc.get_freeze_count() > len(held)
assert gc.get_threshold()[0] == garbage.YOUNG
loop = [[]]
loop[0].append(loop)
del loop
assert gc.collect() == 2, "what is made afterwards is collected"
"""


def test_whole_collections_no_longer_look_at_what_was_there_before() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
