"""Other definitions of the "batch std": what other code bases divide the advantage by.

Each function takes rewards [N, K] and response lengths [N, K], and returns the divisor.
lite_ppo.py divides by rewards.std() + EPS.
"""

EPS = 1e-6  # the eps of lite_ppo.py


def ddof_0(rewards, lengths):
    """The std of all rewards, divided by their number."""
    return rewards.std(correction=0) + EPS


def within_groups(rewards, lengths):
    """Root mean square of the rewards centred on their groups."""
    return (rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt() + EPS


def by_tokens(rewards, lengths):
    """The same over tokens: a response counts once per token."""
    squares = (rewards - rewards.mean(1, keepdim=True)).square()
    return ((squares * lengths).sum() / lengths.sum()).sqrt() + EPS


def per_rank(rewards, lengths):
    """Each of 4 ranks divides by the std of its own groups."""
    parts = rewards.view(4, -1).std(1, keepdim=True)
    return parts.repeat_interleave(rewards.shape[0] // 4, 0) + EPS


def larger_eps(rewards, lengths):
    """The std of lite_ppo.py with a larger eps."""
    return rewards.std() + 1e-4


DEFINITIONS = {
    "std: ddof 0": ddof_0,
    "std: within groups": within_groups,
    "std: by tokens": by_tokens,
    "std: per rank": per_rank,
    "eps 1e-4": larger_eps,
}


class OtherStd:
    """Replaces the advantage of lite_ppo.py in this process."""

    def __init__(self, trainer, name: str):
        self.divisor = DEFINITIONS[name]
        self.shape_rewards = trainer.shape_rewards
        self.lengths = None
        trainer.shape_rewards = self.shape_and_keep_lengths
        trainer.compute_advantages = self.compute_advantages

    def shape_and_keep_lengths(self, responses, cfg):
        """In place of shape_rewards(): keeps the lengths for the divisor."""
        rewards = self.shape_rewards(responses, cfg)
        lengths = [len(response.token_ids) for response in responses]
        self.lengths = rewards.new_tensor(lengths).view(rewards.shape)  # [N, K]
        return rewards

    def compute_advantages(self, rewards, cfg):
        """In place of compute_advantages(): group mean, and the other divisor."""
        centred = rewards - rewards.mean(1, keepdim=True)
        return centred / self.divisor(rewards, self.lengths)
