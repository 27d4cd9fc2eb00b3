"""The actor: samples and grades responses. Each rank does a share, and every rank gets all."""

from typing import Any

import numpy as np
import torch.distributed as dist

from support import signals
from support.clock import clock
from support.data import Problem
from support.grader import Grader
from support.metrics import check_failures
from support.response import Response
from support.sampling import Sampling
from support.util import gather


class Actor:
    """A sampler, a tokenizer and a grader."""

    def __init__(self, sampler: Any, tokenizer: Any, grader: Grader):
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.grader = grader

    def sample(
        self, problems: list[Problem], seeds: list[int], sampling: Sampling
    ) -> list[Response]:
        """sampling.n graded responses to each problem, in order; the same list on every rank.

        seeds: one per problem. A signal to any rank raises Stopped on all ranks. RunError if too
        many responses get no score.
        """
        mine = range(dist.get_rank(), len(problems), dist.get_world_size())  # my problems
        prompts = [problems[i].prompt_ids for i in mine]
        my_seeds = [seeds[i] for i in mine]
        groups = []
        with clock("rollout"):
            if prompts:  # a rank may have none
                groups = signals.interruptible(self.sampler.generate, prompts, my_seeds, sampling)
        with clock("reward"):
            drawn = [(i, sample) for i, group in zip(mine, groups) for sample in group]
            rows = [problems[i].row for i, _ in drawn]
            texts = [self.decode(sample.token_ids) for _, sample in drawn]
            grades = signals.interruptible(self.grader, texts, rows)
            signals.leave_together()  # a signal to any rank ends the step here, on all ranks
            parts = [(i, s, text, grade) for (i, s), text, grade in zip(drawn, texts, grades)]
            parts = sorted(gather(parts), key=lambda part: part[0])
            responses = [Response(problems[i], *s, text, *grade) for i, s, text, grade in parts]
        check_failures(responses)
        return responses

    def decode(self, token_ids: np.ndarray) -> str:
        """The text of a response as the model wrote it, without special tokens.

        Some tokenizers would remove spaces before punctuation by default.
        """
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(token_ids.tolist(), **options)
