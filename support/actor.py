"""The actor: turns prompts into graded responses, each rank its share of them."""

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
        mine = range(dist.get_rank(), len(problems), dist.get_world_size())
        prompts = [problems[i].prompt_ids for i in mine]
        my_seeds = [seeds[i] for i in mine]
        groups = []
        with clock("rollout"):
            if prompts:  # a rank may have none
                groups = signals.interruptible(self.sampler.generate, prompts, my_seeds, sampling)
        with clock("reward"):
            drafts = [(i, draft) for i, group in zip(mine, groups) for draft in group]
            rows = [problems[i].row for i, _ in drafts]
            texts = [self.decode(draft.token_ids) for _, draft in drafts]
            verdicts = signals.interruptible(self.grader, texts, rows)
            signals.leave_together()  # a signal to any rank ends the step here, on all ranks
            graded = [(i, *d, text, *v) for (i, d), text, v in zip(drafts, texts, verdicts)]
            graded = sorted(gather(graded), key=lambda item: item[0])
            responses = [Response(problems[i], *rest) for i, *rest in graded]
        check_failures(responses)
        return responses

    def decode(self, token_ids: np.ndarray) -> str:
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
