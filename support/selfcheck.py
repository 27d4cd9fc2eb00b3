"""The check of an architecture at start-up: does this trainer compute its log-probs?

A list of supported classes would be wrong as soon as transformers changes. So the class itself is
tried. A tiny copy with random weights computes the log-probs of a packed row, as the trainer does,
and those of each sequence alone, as transformers does. Both must be equal, and so must their
gradients. It takes about 0.3 s.
"""

import copy
import re
from types import SimpleNamespace
from typing import Any

import torch

from support.logprobs import linear_logprobs
from support.packed import blocks, build

TOLERANCE = 1e-4  # nats, float32; rounding gives 1e-6 to 1e-5
GRADIENT_TOLERANCE = 1e-3  # of the largest entry of the gradient of a parameter
LENGTHS = (5, 40, 11)  # tokens of the packed sequences
WINDOW = 8  # the sliding window of the tiny copy; two of the sequences are longer
SHORT = 24  # original context length of the tiny copy; one of the sequences is longer
LONG = 64  # the same where no sequence of the run exceeds the original context length
CPU = torch.device("cpu")

# ---- a tiny copy of a config ---------------------------------------------------------------------

HIDDEN = 64
HEADS = 4
VOCABULARY = 48
INTERMEDIATE = 96
MOST_LAYERS = 12
MOST_PARAMETERS = 10_000_000  # the usual copy has 0.1 million

WINDOWS = re.compile(
    "sliding_window|sliding_window_size|window_size|attention_window_size|local_attention"
    "|attention_chunk_size|keep_window_size|mamba_chunk_size|chunk_size"
)
LIMITS = re.compile("max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_WIDTHS = ("head_dim", "kv_channels", "attention_head_dim")


def shrink(config, original_length: int):
    """A copy of a config with the same switches and small sizes, for fast tests.

    Each kind of layer stays, at least once. Ratios stay where they matter: heads to key-value
    heads, scaled to original context length, rotary to other channels. original_length: what the
    original context length becomes. Sizes that it does not know keep their values.
    """
    tiny = copy.deepcopy(config)
    old = SimpleNamespace(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        length=original_context(config) or original_length,
    )
    widths = [getattr(config, name, None) for name in HEAD_WIDTHS]
    old.head_dim = next(filter(None, widths), old.hidden // old.heads)
    square = old.head_dim * old.heads == old.hidden
    head_dim = HIDDEN // HEADS if square else HIDDEN // HEADS + 8
    if hasattr(config, "qk_rope_head_dim"):  # latent attention: several widths that belong together
        head_dim = old.head_dim
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(tiny, name, tiny_size(name, value, old, head_dim))
        elif isinstance(value, (list, tuple)) and name.endswith("token_id"):
            setattr(tiny, name, [min(i, VOCABULARY - 1) for i in value])
    tiny.vocab_size = VOCABULARY
    tiny.hidden_size = HIDDEN
    tiny.num_attention_heads = HEADS
    for name, value in vars(config).items():
        if LIMITS.fullmatch(name) and isinstance(value, int):
            scaled = value * original_length // old.length
            setattr(tiny, name, max(2 * LONG, scaled if original_context(config) else 0))
    shrink_layers(tiny, config)
    shrink_rope(tiny, config, original_length, head_dim)
    return tiny


def tiny_size(name: str, value: int, old: SimpleNamespace, head_dim: int) -> int:
    """The new value of a whole number of the config, judged by its name and its old value."""
    if name in KV_HEADS:
        return {old.heads: HEADS, 1: 1}.get(value, HEADS // 2)
    if name in HEAD_WIDTHS:
        return head_dim
    if name == "rotary_dim":
        return max(2, value * head_dim // old.head_dim)
    if "vocab_size" in name:
        return min(value, VOCABULARY)
    if name.endswith(("token_id", "token_index", "_idx", "_index")):
        return min(value, VOCABULARY - 1)
    if WINDOWS.fullmatch(name):
        return min(value, WINDOW)
    if re.search("intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dim_ff", name):
        return min(value, INTERMEDIATE)
    if value == old.hidden and re.search("hidden|dim|width|size|embd", name):
        return HIDDEN
    return value


def shrink_layers(tiny, config) -> None:
    """Keep the first layer of each kind, and at least two layers.

    Kinds are told apart by the lists with an entry per layer. If the config has none, but counts
    layers in a period (every fourth, ...), one whole period and a layer are kept.
    """
    count = config.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    kinds = list(zip(*map(map_to_text, lists.values())))
    chosen = sorted({kinds.index(kind) for kind in kinds}) if kinds else [0]
    if len(chosen) < 2:
        periods = [
            value
            for name, value in vars(config).items()
            if re.search("interval|period|pattern|every|replace|step", name) and type(value) is int
        ]
        wanted = 2 if lists else max([1, *periods]) + 1
        chosen = list(range(min(count, wanted, MOST_LAYERS)))
    tiny.num_hidden_layers = len(chosen)
    for name, value in lists.items():
        setattr(tiny, name, type(value)(value[i] for i in chosen))


def map_to_text(values) -> list[str]:
    """The values as texts: some are lists or dicts, which cannot be keys."""
    return [str(value) for value in values]


def rope_settings(config) -> list[dict[str, Any]]:
    """The rotary settings: one dict, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def original_context(config) -> int | None:
    """The context length from before the rotary embedding was scaled; None if it was not."""
    lengths = [
        settings.get("original_max_position_embeddings") for settings in rope_settings(config)
    ]
    return next(filter(None, lengths), None)


def shrink_rope(tiny, config, original_length: int, head_dim: int) -> None:
    """Shrink the rotary settings: original context length, and factors for each pair."""
    if getattr(config, "original_max_position_embeddings", None):
        tiny.original_max_position_embeddings = original_length
    for settings in rope_settings(tiny):
        if settings.get("original_max_position_embeddings"):
            settings["original_max_position_embeddings"] = original_length
        share = settings.get("partial_rotary_factor") or 1.0
        pairs = int(head_dim * share) // 2
        for name in ("short_factor", "long_factor"):  # one number for each pair of channels
            factors = settings.get(name)
            if factors:
                settings[name] = [factors[i * len(factors) // pairs] for i in range(pairs)]


# ---- the comparison ------------------------------------------------------------------------------


def find_problem(config, max_tokens: int) -> str:
    """Why this trainer cannot train the class of this config, or "".

    max_tokens: length limit of a prompt and its response together.
    """
    original = original_context(config)
    if not original or max_tokens <= original:
        return compare(config, LONG)
    problem = compare(config, SHORT)
    if problem and not compare(config, LONG):
        return (
            f"its rotary frequencies depend on whether the longest sequence of a batch exceeds "
            f"{original} tokens, and {problem.split(':')[0]}. --max-prompt-tokens plus "
            f"--max-new-tokens is {max_tokens}; lower them to {original} together"
        )
    return problem


RESULTS: dict[tuple[str, int], str] = {}  # of compare(): (config as JSON, original_length)


def compare(config, original_length: int) -> str:
    """compare_copies(), once in a process for each config and original_length."""
    key = (config.to_json_string(use_diff=False), original_length)
    if key not in RESULTS:
        RESULTS[key] = compare_copies(config, original_length)
    return RESULTS[key]


def compare_copies(config, original_length: int) -> str:
    """Build the tiny copies and compare them. Returns the problem, or ""."""
    doing = "no tiny copy of it can be made for the check at start-up"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            tiny = shrink(config, original_length)
            size = count_parameters(tiny)
            if size > MOST_PARAMETERS:
                raise ValueError(f"it still has {size / 1e6:.0f} million parameters")
            plain = build_plain(tiny)
            texts = [Text(torch.randint(4, VOCABULARY, (length,))) for length in LENGTHS]
            expected = torch.cat([text.logprobs(plain) for text in texts])
            doing = "its attention cannot be replaced by one for packed rows"
            packed = build(tiny, torch.float32, "packed", CPU).train()
            packed.load_state_dict(plain.state_dict())
            doing = "it cannot read a packed row"
            return find_difference(plain, packed, texts, expected)
    except Exception as error:  # any type: a class may fail anywhere
        return f"{doing} ({describe(error)})"


class Text:
    """A sequence of the packed row, and the token that follows each of its tokens."""

    def __init__(self, token_ids: torch.Tensor):
        self.token_ids = token_ids  # [T]
        self.targets = token_ids.roll(-1)  # [T]

    def logprobs(self, model) -> torch.Tensor:
        """Of the targets, [T], as transformers computes them for this sequence alone."""
        logits = model(self.token_ids[None], use_cache=False).logits[0]
        return logits.log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]


def describe(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line[:200]}"


def count_parameters(config) -> int:
    """Number of parameters of a model of this config, without memory for it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return sum(parameter.numel() for parameter in model.parameters())


def build_plain(config):
    """The class as transformers computes it, with random weights, biases and norms."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in plain.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:  # norms and biases, around their first values
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        # Larger logits: soft-capping must show.
        plain.get_output_embeddings().weight.mul_(2)
    return plain.eval()


def find_difference(plain, packed, texts: list[Text], expected: torch.Tensor) -> str:
    """The first law that the tiny copies break, or ""."""
    if not blocks(packed):
        return "it has no list of layers, which sharding needs"
    alone = [head_logprobs(plain, text.token_ids, text.targets) for text in texts]
    difference = largest(torch.cat(alone) - expected)
    if not difference <= TOLERANCE:
        return (
            "its output layer does more than hidden @ weight.T + bias (soft-capping, a scale), "
            f"which changes log-probs by up to {difference:.2g} nats"
        )
    found = packed_logprobs(packed, texts)
    difference = largest(found - expected)
    if not difference <= TOLERANCE:
        return (
            f"a packed row changes its log-probs by up to {difference:.2g} nats: its layers do not "
            "keep the sequences apart, or do not use the attention that does"
        )
    return find_gradient_problem(plain, packed, expected, found)


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value."""
    return float(difference.detach().abs().max())


def head_logprobs(model, token_ids: torch.Tensor, targets: torch.Tensor, **kwargs):
    """The log-probs of the targets, [T], as lite_ppo.response_logprobs computes them."""
    output = model.base_model(input_ids=token_ids[None], use_cache=False, **kwargs)
    head = model.get_output_embeddings()
    hidden = output.last_hidden_state[0]
    return linear_logprobs(hidden, head.weight, targets, bias=head.bias)[0]


def packed_logprobs(model, texts: list[Text]) -> torch.Tensor:
    """The log-probs of all texts [sum of lengths], computed as one packed row."""
    lengths = [len(text.token_ids) for text in texts]
    return head_logprobs(
        model,
        torch.cat([text.token_ids for text in texts]),
        torch.cat([text.targets for text in texts]),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        micro_batch=SimpleNamespace(lengths=lengths),
    )


def find_gradient_problem(plain, packed, expected: torch.Tensor, found: torch.Tensor) -> str:
    """Compare the gradients of a sum in which each token has another weight."""
    weights = torch.linspace(-1, 2, len(found))
    (weights * expected).sum().backward()
    (weights * found).sum().backward()
    for (name, parameter), other in zip(packed.named_parameters(), plain.parameters()):
        gradient = parameter.grad
        if gradient is None or not gradient.isfinite().all():
            return f"its parameter {name} gets no finite gradient"
        if other.grad is None:
            return f"its parameter {name} gets a gradient only in a packed row"
        if largest(gradient - other.grad) > GRADIENT_TOLERANCE * max(1.0, largest(other.grad)):
            return f"packing changes the gradient of its parameter {name}"
    return ""
