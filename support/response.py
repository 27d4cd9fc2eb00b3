"""A response of the model to a problem, and its grade."""

from dataclasses import dataclass

import numpy as np

from support.data import Problem


@dataclass
class Response:
    """The fields after `problem` are those of a Sample, the text, and those of a Grade."""

    problem: Problem
    token_ids: np.ndarray  # [length] int32, the end-of-sequence token included
    logprobs: np.ndarray  # [length] float32, the sampler's
    truncated: bool  # ended by max_new_tokens
    text: str
    score: float  # from the reward function; correct if at least 1
    failure: str = ""  # why there is no score; "" if there is one
    seconds: float = 0.0  # duration of the reward function
