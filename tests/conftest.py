"""Tests run without a network, on one thread, from any folder."""

import os
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
