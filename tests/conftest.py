"""What all tests share: one thread for torch, since 2 cores are all a test run may count on."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
