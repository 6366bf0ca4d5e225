"""Settings of the whole suite: one thread a process, since tests start several processes."""

import torch

torch.set_num_threads(1)
