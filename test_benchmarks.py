"""Tests of the benchmarks' arithmetic: the memory plan by hand and by law, and how pairs of timings are summed up."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import memory_plan  # noqa: E402
import versus_trl  # noqa: E402
from memory_plan import GIB, MIB, SHAPES, Settings, Shape, block_bytes, engine_parts, logits_bytes, plan, remedies, solve_micro_batch  # noqa: E402

TINY = Shape(2, 3, 1, 1, 1, True, vocab=10, head_dim=2)  # small enough to count on paper

shapes = st.builds(
    Shape, st.sampled_from([64, 1024, 4096]), st.sampled_from([128, 3072]), st.integers(1, 40), st.sampled_from([8, 16]), st.sampled_from([2, 8]),
    st.booleans(), st.sampled_from([1000, 151936]), st.sampled_from([64, 128]),
)  # fmt: skip
plans = st.builds(
    Settings, ranks=st.sampled_from([1, 2, 8]), minibatches=st.integers(1, 4), max_prompt_tokens=st.integers(1, 1024), max_new_tokens=st.integers(1, 8192),
    micro_batch_tokens=st.integers(1, 40000), max_num_seqs=st.integers(1, 256), dtype=st.sampled_from(["bfloat16", "float32"]),
    activation_checkpointing=st.booleans(), cpu_offload=st.booleans(), kl_coef=st.sampled_from([0.0, 0.04]),
    sampler=st.sampled_from(["vllm", "transformers"]), device_gib=st.sampled_from([16.0, 24.0, 80.0, 139.0]), cpu=st.booleans(),
)  # fmt: skip


def changed(s: Settings, **fields) -> Settings:
    return dataclasses.replace(s, **fields)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_parameters_of_public_models():
    small = SHAPES["qwen3-0.6b"]
    # q, o 1024 x 2048 each; k, v 1024 x 1024 each; MLP 3 x 1024 x 3072; norms 2 x 1024 and 2 x 128
    assert small.block == 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128 == 15_730_944
    assert small.root == 151_936 * 1024 + 1024
    assert small.parameters == 28 * 15_730_944 + 151_936 * 1024 + 1024 == 596_049_920
    assert dataclasses.replace(small, tied=False).parameters - small.parameters == 151_936 * 1024
    counts = {name: round(shape.parameters / 1e9, 2) for name, shape in SHAPES.items()}
    assert counts == {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76}


def test_families_differ_by_biases_and_head_norms():
    llama = dataclasses.replace(TINY, qk_norm=False)
    assert TINY.block - llama.block == 2 * 2  # one weight per number of a head, for q and for k
    assert dataclasses.replace(llama, qkv_bias=True).block - llama.block == 2 + 2 + 2


def test_trainer_state_is_shared_by_the_ranks():
    P = SHAPES["qwen3-4b"].parameters
    for ranks in (1, 8):
        update = plan(SHAPES["qwen3-4b"], Settings(ranks=ranks, kl_coef=0.04))["phases"]["update"]
        assert update["master weights"] == 4 * P / ranks
        assert update["Adam"] == 8 * P / ranks
        assert update["reference"] == 4 * P / ranks
    hybrid = plan(SHAPES["qwen3-4b"], Settings(ranks=16, shard_ranks=8))["phases"]["update"]
    assert hybrid["Adam"] == P


def test_activations_of_one_token_by_hand():
    s = Settings(dtype="float32", cpu=True)
    # Numbers per token: two norms keep input, scaled input and output, 3 x 2 each; q and k norms keep input and scaled input, 2 x (2 + 2);
    # attention keeps q, k, v and its output, 4 x 2, and what goes into o_proj, 2; the MLP 4 x 3.
    assert block_bytes(TINY, s) == 4 * (12 + 8 + 8 + 2 + 12)
    # In half precision what is normalised is kept in float32 beside two half precision tensors, or one where the product needs no more.
    assert block_bytes(TINY, Settings()) == 2 * 2 * (4 + 2 + 2) + 4 * (4 + 2) + 2 * (8 + 2 + 12) + 2 * 2 * 2


def test_logits_exist_in_chunks_of_256_mib():
    shape = SHAPES["qwen3-0.6b"]
    rows = 2**26 // 151_936
    assert rows == 441 and rows * 151_936 * 4 <= 256 * MIB
    assert logits_bytes(shape, Settings(dtype="float32")) == rows * 151_936 * 4.5  # and an eighth as a temporary
    assert logits_bytes(shape, Settings(dtype="float32", max_prompt_tokens=10, max_new_tokens=11, micro_batch_tokens=1)) == 20 * 151_936 * 4.5


def test_what_vllm_does_not_need_is_cache():
    shape, s = SHAPES["qwen3-4b"], Settings(ranks=8)
    parts = engine_parts(shape, s, "all")
    assert sum(parts.values()) == pytest.approx(0.6 * 80 * GIB)
    assert parts["engine: weights"] == 2 * shape.parameters
    assert plan(shape, s)["cache_tokens"] == int(parts["engine: KV cache"] / (144 * 1024))  # 36 blocks x 8 heads x 128 x 2 x 2 B
    assert engine_parts(shape, s, "no") == {}  # it sleeps while the trainer works
    split = engine_parts(shape, changed(s, tensor_parallel_size=2), "all")
    assert split["engine: weights"] == shape.parameters


def test_a_tied_head_is_packed_once_more_by_vllm_on_a_cpu():
    shape = SHAPES["qwen3-0.6b"]
    parts = engine_parts(shape, Settings(cpu=True, max_prompt_tokens=100, max_new_tokens=100), "no")
    assert parts["engine: weights"] == 4 * (shape.parameters + 151_936 * 1024)
    assert parts["engine: KV cache"] == 256 * MIB
    long = engine_parts(shape, Settings(cpu=True, max_prompt_tokens=1000, max_new_tokens=1000), "no")
    assert long["engine: KV cache"] == 2 * 2000 * 2 * 4 * 28 * 8 * 128  # two responses: keys and values, float32, 28 layers, 8 heads of 128


def test_the_longest_sequence_is_never_cut():
    s = Settings(max_prompt_tokens=100, max_new_tokens=1000, micro_batch_tokens=50)
    assert s.tokens == 1099  # the last token predicts nothing
    assert changed(s, micro_batch_tokens=2000).tokens == 2000


def test_optimizer_moment_is_sixteen_bytes_per_parameter():
    """With few tokens and a long model, the step of Adam is the highest moment: weights, gradients, two moments."""
    shape = Shape(64, 256, 200, 4, 2, True, vocab=10, head_dim=16)
    s = Settings(cpu=True, sampler="transformers", process_bytes=1000, max_prompt_tokens=1, max_new_tokens=1, micro_batch_tokens=1, prompts_per_step=1,
                 group_size=1, max_num_seqs=1)  # fmt: skip
    result = plan(shape, s)
    parts = result["phases"]["update"]
    assert parts["master weights"] + parts["Adam"] + 4 * shape.parameters == 16 * shape.parameters
    assert parts.get("gradients", 0) <= 4 * shape.parameters
    assert result["peak_phase"] == "update"


def test_offload_moves_the_state_to_the_host():
    shape = SHAPES["qwen3-8b"]
    result = plan(shape, Settings(cpu_offload=True))
    assert sum(result["host"].values()) == 16 * shape.parameters
    assert not {"master weights", "Adam", "gradients"} & result["phases"]["update"].keys()


# ---- laws ------------------------------------------------------------------------------------------------------------


@given(shapes, plans)
def test_totals_are_sums_of_non_negative_parts(shape, s):
    result = plan(shape, s)
    for phase, parts in result["phases"].items():
        assert result["totals"][phase] == pytest.approx(sum(parts.values()))
        assert all(size >= 0 for name, size in parts.items() if name != "engine: KV cache")  # negative: the share is too small, and does not fit
    assert result["peak"] == max(result["totals"].values())
    assert not result["fits"] or result["cache_room"]


@given(shapes, plans, st.integers(1, 10_000))
def test_more_tokens_never_take_less(shape, s, more):
    small, large = plan(shape, s)["totals"], plan(shape, changed(s, micro_batch_tokens=s.micro_batch_tokens + more))["totals"]
    for phase in ("logprobs", "sync", "load", "rollout"):
        assert large[phase] >= small[phase] * (1 - 1e-9)
    # The update: only gradients of earlier micro-batches can go away, when there are none any more.
    assert large["update"] >= (small["update"] - 4 * shape.parameters / s.shards) * (1 - 1e-9)


@given(shapes, plans)
def test_what_saves_memory_does(shape, s):
    def update(**fields):
        return plan(shape, changed(s, **fields))["totals"]["update"]

    assert update(activation_checkpointing=True) <= update(activation_checkpointing=False) * (1 + 1e-9)
    assert update(kl_coef=0.0) <= update(kl_coef=0.1) * (1 + 1e-9)
    if s.cpu or not s.cpu_offload:  # offloaded, all that more ranks change is a buffer for the next block
        assert update(ranks=2 * s.ranks) <= update() * (1 + 1e-9)
    if not s.cpu:
        assert update(cpu_offload=True) <= update(cpu_offload=False) * (1 + 1e-9)


@settings(deadline=None)
@given(shapes, plans)
def test_solved_micro_batch_is_the_largest_that_fits(shape, s):
    tokens = solve_micro_batch(shape, s)
    if tokens:
        assert plan(shape, changed(s, micro_batch_tokens=tokens))["fits"]
        assert tokens == 2**22 or not plan(shape, changed(s, micro_batch_tokens=tokens + 1))["fits"]
    else:
        assert not plan(shape, changed(s, micro_batch_tokens=1))["fits"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gib", [24.0, 80.0])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_remedies_make_it_fit(name, gib, checkpointing):
    s = Settings(ranks=4, device_gib=gib, activation_checkpointing=checkpointing)
    for way in [] if plan(SHAPES[name], s)["fits"] else remedies(SHAPES[name], s):
        flags = (flag[2:].replace("-", "_").split() for flag in way)
        fields = {name: type(getattr(s, name))(float(*value)) if value else True for name, *value in flags}
        assert plan(SHAPES[name], changed(s, **fields))["fits"], way


# ---- around it -------------------------------------------------------------------------------------------------------


def test_shape_of_a_folder(tmp_path):
    config = dict(model_type="qwen3", hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                  vocab_size=21, tie_word_embeddings=True)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = memory_plan.read_shape(str(tmp_path))
    assert shape == Shape(128, 256, 3, 4, 2, True, vocab=21, head_dim=32)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(SystemExit, match="gpt2"):
        memory_plan.read_shape(str(tmp_path))


def test_report_names_peak_and_remedy():
    fits, _ = memory_plan.report("m", SHAPES["qwen3-4b"], Settings(ranks=8))
    assert "fits; the largest --micro-batch-tokens that does: " in fits
    fails, result = memory_plan.report("m", SHAPES["qwen3-8b"], Settings())
    assert "does not fit; what would: " in fails and "--cpu-offload" in fails and not result["fits"]
    assert "nothing in reach" in memory_plan.report("m", SHAPES["qwen3-32b"], Settings(device_gib=8))[0]


def test_ratios_are_taken_within_a_pair():
    def side(*seconds):
        return {"steps": [dict.fromkeys(("step", *versus_trl.PHASES, "cpu"), s) | {"tokens": 100} for s in seconds]}

    pairs = [{"trl": side(1, 2, 3), "lite_ppo": side(1, 1, 5)}, {"trl": side(20), "lite_ppo": side(5)}, {"trl": side(4), "lite_ppo": side(3)}]
    summary = versus_trl.summarize(pairs)
    step = summary["seconds"]["step"]
    assert (step["ratio"], step["lowest"], step["highest"]) == (0.5, 0.25, 0.75)  # of 1/2, 5/20 and 3/4
    assert (step["trl"], step["lite_ppo"]) == (3, 3)  # over all steps
    assert summary["tokens_per_step"] == {"trl": 100, "lite_ppo": 100}
