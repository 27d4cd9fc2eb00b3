"""What the model answered to a problem, and how it was graded."""

from dataclasses import dataclass

import numpy as np

from support.data import Problem


@dataclass
class Response:
    problem: Problem
    token_ids: np.ndarray  # [length] int32, the end-of-sequence token included
    logprobs: np.ndarray  # [length] float32, the sampler's
    truncated: bool  # ended by max_new_tokens
    text: str
    score: float  # from the reward function; correct if at least 1
    failure: str = ""  # why there is no score
    seconds: float = 0.0  # that the reward function took
