"""Faults as tests: replicas are killed, stopped and cut off under sessions that keep a ledger. See
`__main__`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it
