"""Architectures: each class is either right or refused by name, before its weights are read."""

import collections
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig

from support import flash, metrics, models, packed, selfcheck, toy
from support.clock import clock
from support.errors import RunError
from support.packed import packed_attention
from tests import test_update
from tests.test_benchmarks import BENCHMARKS
from tests.world import CPU, config

sys.path.insert(0, str(BENCHMARKS))

import architectures  # noqa: E402
from architectures import DROPOUT, PHI4, WINDOW  # noqa: E402


def find_problem(name: str, tokens: int = 20, **changes) -> str:
    return selfcheck.find_problem(CONFIG_MAPPING[name](**changes), tokens)


# ---- accepted: as right as transformers' own class -----------------------------------------------

ACCEPTED = {  # model type: settings of its config
    "phi": {},  # the output layer has a bias
    "starcoder2": DROPOUT | dict(embedding_dropout=0.5, sliding_window=4096),
    "seed_oss": DROPOUT,
    "mistral": dict(sliding_window=4096),
    "qwen2": WINDOW,  # only the upper layers have a window
    "olmo3": {},  # two kinds of layers
    "phi3": PHI4,  # longrope, within the original length
    "llama": dict(attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_sharded_policy_has_the_log_probs_of_transformers(name, tmp_path):
    shape = CONFIG_MAPPING[name](**ACCEPTED[name])
    assert selfcheck.find_problem(shape, 4096) == ""
    folder = architectures.make_folder(shape, tmp_path)
    assert architectures.compare(folder) < 1e-4


def test_buffers_of_the_state_dict_are_synced_saved_and_resumed(tmp_path):
    """Apertus: its activation function has buffers that belong to the model file."""
    folder = architectures.make_folder(CONFIG_MAPPING["apertus"](), tmp_path / "model")
    output = tmp_path / "run"
    assert architectures.train(folder, output) < 1e-4
    assert architectures.train(folder, output, steps=3) < 1e-4
    before = load_file(f"{folder}/model.safetensors")
    after = load_file(output / "final/model.safetensors")
    assert before.keys() == after.keys()
    buffer = "model.layers.0.mlp.act_fn.beta"
    assert torch.equal(before[buffer], after[buffer])
    assert architectures.compare(str(output / "final")) < 1e-4


def test_stored_buffers_get_the_dtype_of_the_computation():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2))
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("frequencies", torch.ones(2), persistent=False)
    models.place_buffers(model, torch.bfloat16, CPU)
    assert model.scale.dtype == torch.bfloat16
    assert model.count.dtype == torch.int64
    assert model.frequencies.dtype == torch.float32


def test_final_model_keeps_the_dropout_of_its_config(tmp_path):
    folder = architectures.make_folder(CONFIG_MAPPING["starcoder2"](**DROPOUT), tmp_path / "model")
    model = models.build_model(folder, torch.float32, "packed", CPU)
    assert model.config.attention_dropout == model.config.residual_dropout == 0
    state = load_file(f"{folder}/model.safetensors")
    models.write_model(state, folder, tmp_path / "final")
    assert AutoConfig.from_pretrained(tmp_path / "final").attention_dropout == 0.1


def test_final_model_has_a_generation_config_only_if_its_source_has_one(tmp_path):
    """Otherwise the end-of-sequence ids of the final model would not be those of its source."""
    fields = dict(vocab_size=32, bos_token_id=2, eos_token_id=7)
    folder = architectures.make_folder(CONFIG_MAPPING["starcoder2"](**fields), tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink(missing_ok=True)
    state = load_file(f"{folder}/model.safetensors")
    models.write_model(state, folder, tmp_path / "final")
    assert not (tmp_path / "final/generation_config.json").exists()
    text = '{"eos_token_id": [5, 6]}'
    (tmp_path / "model/generation_config.json").write_text(text)
    models.write_model(state, folder, tmp_path / "other")
    assert (tmp_path / "other/generation_config.json").read_text() == text


def test_tokenizer_of_transformers_is_used_beside_that_of_mistral(tmp_path):
    """With mistral-common, which vLLM brings, the run ended with an AttributeError."""
    package = Path(pytest.importorskip("mistral_common").__file__).parent
    folder = architectures.make_folder(CONFIG_MAPPING["mistral"](), tmp_path / "model")
    tekken = min(package.glob("data/tekken*.json"))
    (tmp_path / "model/tekken.json").symlink_to(tekken)
    tokenizer, _ = models.load_tokenizer(str(folder), 40)
    assert tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()


# ---- refused by name -----------------------------------------------------------------------------

REFUSED = {  # model type: words of the reason
    "gemma2": "soft-capping",
    "cohere": "a scale",
    "gpt2": "no list of layers",
    "falcon": "attention cannot be replaced",
    "stablelm": "do not pass the lengths",
    "granite_swa": "needs s_aux",  # attention sinks
    "qwen3_5_text": "do not keep the sequences apart",  # linear attention
    "mamba": "no tiny copy",
}


@pytest.mark.parametrize("name", REFUSED)
def test_class_that_would_be_wrong_is_refused(name):
    assert REFUSED[name] in find_problem(name)


def test_scale_of_the_logits_is_found():
    assert find_problem("granite") == ""
    assert "a scale" in find_problem("granite", logits_scaling=8.0)


def test_convolutions_are_found():
    kinds = ["full_attention", "conv"] * 16
    assert "apart" in find_problem("lfm2", layer_types=kinds)


def test_longrope_beyond_the_original_length_is_refused_with_the_limit():
    assert find_problem("phi3", 4096, **PHI4) == ""
    problem = find_problem("phi3", 4097, **PHI4)
    assert "--max-new-tokens is 4097; lower them to 4096" in problem


def test_model_of_several_parts_is_refused(root):
    shape = CONFIG_MAPPING["gemma3"]()
    with torch.device("meta"):
        model = torch.nn.Linear(1, 1)
    problem = next(models.find_architecture_problems(model, shape, 20))
    assert "several parts" in problem


# ---- the check finds faults of the trainer -------------------------------------------------------


def with_dropout(shape):
    return shape


def without_window(*args, **kwargs):
    kwargs.pop("sliding_window")
    return packed_attention(*args, **kwargs)


def without_bias(hidden, weight, token_ids, bias):
    return selfcheck_logprobs(hidden, weight, token_ids)


selfcheck_logprobs = selfcheck.linear_logprobs

FAULTS = {  # the module and the function that is replaced, by what; a class that it breaks
    "dropout": (packed, "without_dropout", with_dropout, "seed_oss", DROPOUT),
    "window": (packed, "packed_attention", without_window, "mistral", {}),
    "bias": (selfcheck, "linear_logprobs", without_bias, "phi", {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_trainer_is_found(fault, monkeypatch):
    module, function, wrong, name, changes = FAULTS[fault]
    assert find_problem(name, **changes) == ""
    monkeypatch.setattr(module, function, wrong)
    selfcheck.RESULTS.clear()
    try:
        assert "nats" in find_problem(name, **changes)
    finally:
        selfcheck.RESULTS.clear()


def test_check_leaves_the_random_numbers_alone():
    selfcheck.RESULTS.clear()
    before = torch.get_rng_state()
    assert find_problem("qwen3") == ""
    assert torch.equal(torch.get_rng_state(), before)


# ---- the tiny copy -------------------------------------------------------------------------------


def test_tiny_copy_keeps_each_kind_of_layer_and_the_ratios():
    shape = CONFIG_MAPPING["olmo3"](num_attention_heads=32, num_key_value_heads=8)
    tiny = selfcheck.shrink(shape, selfcheck.LONG)
    assert tiny.layer_types == ["sliding_attention", "full_attention"]
    assert tiny.num_hidden_layers == 2
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, 2)
    assert tiny.sliding_window == 8
    assert tiny.vocab_size == 48
    assert tiny.eos_token_id < 48
    assert shape.num_hidden_layers == 32  # the original is as before


def test_tiny_copy_scales_rotary_settings():
    tiny = selfcheck.shrink(CONFIG_MAPPING["phi3"](**PHI4), selfcheck.SHORT)
    settings = tiny.rope_parameters
    assert settings["original_max_position_embeddings"] == selfcheck.SHORT
    # a number for each pair of channels: of 16 per head, 12 rotate
    assert settings["long_factor"] == [1, 9, 17, 25, 33, 41]
    assert tiny.max_position_embeddings == 32 * selfcheck.SHORT


def test_tiny_copy_has_a_whole_period_of_layers():
    """smollm3: every fourth layer has no positions."""
    tiny = selfcheck.shrink(CONFIG_MAPPING["smollm3"](), selfcheck.LONG)
    assert sorted(tiny.no_rope_layers) == [0, 1]


# ---- compiled blocks -----------------------------------------------------------------------------


def count_layers(monkeypatch) -> collections.Counter:
    """How often each linear layer of the blocks has run, by its name, from now on."""
    counts = collections.Counter()
    checkpoint_blocks = packed.checkpoint_blocks

    def checkpoint_and_count(model):
        checkpoint_blocks(model)
        for block in packed.blocks(model):
            for name, layer in block.named_modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.register_forward_hook(lambda *_, name=name: counts.update([name]))

    monkeypatch.setattr(packed, "checkpoint_blocks", checkpoint_and_count)
    return counts


def test_compiled_blocks_have_the_same_gradient(root, monkeypatch):
    """Traced and differentiated as for a GPU. Code for CPUs would take two minutes to compile.

    The recomputation stops before the last linear layer of a block, compiled or not.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    clock.start(1)
    counts = {}
    for mode in ("off", "on"):
        with monkeypatch.context() as patch:
            counts[mode] = count_layers(patch)
            found = test_update.run_update("token", root, micro_batch_tokens=24, compile=mode)
        assert test_update.difference(found, test_update.expected("token", root)) <= 1e-5
    assert 0.1 < clock.seconds["compile"] < clock.seconds["update"] + clock.seconds["logprobs"]
    assert counts["on"] == counts["off"]
    assert 0 < counts["on"]["mlp.down_proj"] < counts["on"]["mlp.up_proj"]


# ---- packed attention ----------------------------------------------------------------------------


def attend(lengths: list[int], **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """packed_attention, and the same by its formula with one large mask."""
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, 8, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    )
    batch = SimpleNamespace(lengths=lengths)
    found, _ = packed_attention(None, query, key, value, None, 0.4, batch, **kwargs)
    position = torch.arange(tokens)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = position[:, None] - position
    window = kwargs.get("sliding_window") or tokens
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < window)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.4
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 8, 100])
def test_packed_attention_sees_its_sequence_and_its_window_only(window):
    found, expected = attend([1, 8, 8, 3, 7, 7, 7, 8], sliding_window=window)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_packed_attention_reads_neighbours_of_one_length_in_one_call(monkeypatch):
    kernel = mock.Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    attend([9, 5, 5, 5, 2, 2])
    shapes = [tuple(call.args[0].shape) for call in kernel.call_args_list]
    assert shapes == [(1, 4, 9, 8), (3, 4, 5, 8), (2, 4, 2, 8)]


@pytest.mark.parametrize(
    "capability,width,installed,version",
    [(9, 128, True, 4), (9, 64, True, 4), (9, 96, True, 2), (9, 128, False, 2), (8, 128, True, 2)],
)
def test_attention_kernel_depends_on_gpu_width_and_vllm(
    capability, width, installed, version, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(flash, "flash_attention_4", lambda: object() if installed else None)
    assert flash.choose.__wrapped__(CPU, width) == f"FlashAttention {version}"


class KernelsOnCpu:
    """The two functions of FlashAttention 4, with the results and arguments of vLLM's."""

    @staticmethod
    def _flash_attn_fwd(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        return_lse=True,
        causal=False,
        window_size_left=None,
        window_size_right=None,
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        assert causal == (window_size_right is None)  # one of the two masks
        lengths = cu_seqlens_q.diff().tolist()
        window = None if window_size_left is None else window_size_left + 1
        row = [x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)]
        out = [packed.causal_attention(*parts, softmax_scale, window) for parts in zip(*row)]
        out = torch.cat(out, 2)[0].transpose(0, 1).contiguous()
        return out, torch.zeros(q.shape[1], q.shape[0]), None, None

    @staticmethod
    def _flash_attn_bwd(q, k, v, out, grad, denominators, **options):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = KernelsOnCpu._flash_attn_fwd(*inputs, **options)[0]
        assert torch.equal(again, out)
        return torch.autograd.grad(again, inputs, grad)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_operator_passes_everything_on_to_the_kernels(window, monkeypatch):
    """The outputs and gradients are those of packed_attention."""
    monkeypatch.setattr(flash, "choose", lambda device, width: "FlashAttention 4")
    monkeypatch.setattr(flash, "flash_attention_4", lambda: KernelsOnCpu)
    lengths = [1, 8, 3]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(12, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)
    ]
    starts = torch.tensor([0, 1, 9, 12], dtype=torch.int32)
    found = flash.attention(*inputs, starts, 8, 0.4, window)
    row = [x.transpose(0, 1)[None] for x in inputs]
    batch = SimpleNamespace(lengths=lengths)
    expected, _ = packed_attention(None, *row, None, 0.4, batch, sliding_window=window)
    weights = torch.randn(found.shape, generator=generator)
    assert torch.allclose(found, expected[0], rtol=0, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weights),
        torch.autograd.grad(expected[0], inputs, weights),
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs", [dict(softcap=50.0), dict(s_aux=torch.ones(4)), dict(unheard_of=1)]
)
def test_unknown_argument_of_the_attention_is_refused(kwargs):
    with pytest.raises(NotImplementedError, match=next(iter(kwargs))):
        attend([3, 2], **kwargs)
    attend([3, 2], **dict.fromkeys(kwargs))  # None has no effect


def test_attention_that_is_not_causal_is_refused():
    with pytest.raises(NotImplementedError, match="causal"):
        attend([3, 2], is_causal=False)


# ---- the bound of the gap ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,fine,broken", [("bfloat16", 0.029, 0.031), ("float32", 9e-4, 2e-3)])
def test_gap_between_sampler_and_trainer_has_a_bound(dtype, fine, broken, root):
    cfg = config(root, dtype=dtype)

    def check(gap: float) -> float:
        batch = SimpleNamespace(
            rollout_logprobs=torch.zeros(8),
            old_logprobs=torch.full((8,), -gap),
            response_index=torch.zeros(8, dtype=torch.long),
        )
        return metrics.check_gap([batch], cfg)["rollout/logprob_gap_mean"]

    assert check(fine) == pytest.approx(fine)
    with pytest.raises(RunError, match="--max-logprob-gap"):
        check(broken)


# ---- the table -----------------------------------------------------------------------------------


def test_table_of_architectures(tmp_path, monkeypatch, capsys):
    page = tmp_path / "architectures.md"
    command = f"architectures.py gpt2 gpt_neox olmo3 mixtral --output {page}"
    monkeypatch.setattr(sys, "argv", command.split())
    architectures.main()
    assert "PASS  largest difference, `Olmo3ForCausalLM`" in capsys.readouterr().out
    text = page.read_text()
    assert "| `Olmo3ForCausalLM` | yes | " in text
    assert "| `GPT2LMHeadModel` | no | | it has no list of layers" in text
    assert "| `GPTNeoXForCausalLM` | no | | its files name tensors otherwise" in text
    assert "| `MixtralForCausalLM` | no | | a mixture of experts" in text
    assert f"`python benchmarks/{command}`" in text


def test_law_that_is_broken_ends_with_code_1(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["architectures.py", "gpt2"])
    row = architectures.Row("`Wrong`", "", 2e-4)
    monkeypatch.setattr(architectures, "try_all", lambda names: [row])
    with pytest.raises(SystemExit) as end:
        architectures.main()
    assert end.value.code == 1
