"""What a long run needs besides learning: data, graders, engines, checkpoints, logs."""

import importlib.util
import sys

# A torchvision, torchaudio or torchcodec that was built for another torch breaks the import of
# transformers and vLLM. Text needs none of them, so a broken one is marked as not installed.
for _name in ("torchvision", "torchaudio", "torchcodec"):
    try:
        if importlib.util.find_spec(_name):
            __import__(_name)
    except (ImportError, OSError, RuntimeError):
        sys.modules[_name] = None
