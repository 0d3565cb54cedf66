"""Every test runs offline and leaves a core to the machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import torch

torch.set_num_threads(2)
