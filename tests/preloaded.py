"""What the server of tests/forks.py imports, once for all forks."""

from tests import faulty, forks, world

# isort: split
import matplotlib.figure
import torch._dynamo
import torch.utils.tensorboard
import transformers.models.qwen3.modeling_qwen3

__all__ = ["faulty", "forks", "matplotlib", "torch", "transformers", "world"]
