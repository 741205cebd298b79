"""Tests import the modules of the folder above, and run on one thread, so that sums are made in one
order; TEST_THREADS says otherwise."""
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
THREADS = os.environ.get('TEST_THREADS', '1')
sys.path.insert(0, ROOT)
# of the processes that tests start
os.environ['OMP_NUM_THREADS'] = THREADS
torch.set_num_threads(int(THREADS))
