"""The benchmarks: arithmetic, summaries and laws by hand, and each script on a tiny model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lite_ppo
from support import cli
from tests import checks, forks  # noqa: F401  checks loads the profile of hypothesis

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import fuzz_rewards  # noqa: E402
import gpu as gpu_script  # noqa: E402
import kill_resume  # noqa: E402
import logprobs  # noqa: E402
import memory_formulas  # noqa: E402
import memory_plan  # noqa: E402
import mutation  # noqa: E402
import scaling  # noqa: E402
import soak  # noqa: E402
import versus_trl  # noqa: E402
from memory_formulas import (  # noqa: E402
    GIB,
    MIB,
    SHAPES,
    Settings,
    Shape,
    block_bytes,
    engine_parts,
    plan,
)

TINY = Shape(2, 3, 1, 1, 1, True, vocab=10, head_dim=2)  # small enough to count on paper

shapes = st.builds(
    Shape,
    hidden=st.sampled_from([64, 1024, 4096]),
    intermediate=st.sampled_from([128, 3072]),
    layers=st.integers(1, 40),
    heads=st.sampled_from([8, 16]),
    kv_heads=st.sampled_from([2, 8]),
    tied=st.booleans(),
    vocab=st.sampled_from([1000, 151936]),
    head_dim=st.sampled_from([64, 128]),
)
plans = st.builds(
    Settings,
    ranks=st.sampled_from([1, 2, 8]),
    minibatches=st.integers(1, 4),
    max_prompt_tokens=st.integers(1, 1024),
    max_new_tokens=st.integers(1, 8192),
    micro_batch_tokens=st.integers(1, 40000),
    max_num_seqs=st.integers(1, 256),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    activation_checkpointing=st.booleans(),
    cpu_offload=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.04]),
    sampler=st.sampled_from(["vllm", "transformers"]),
    device_gib=st.sampled_from([16.0, 24.0, 80.0, 139.0]),
    cpu=st.booleans(),
)


def changed(s: Settings, **fields) -> Settings:
    return dataclasses.replace(s, **fields)


# ---- memory plan: numbers by hand ----------------------------------------------------------------


def test_parameters_of_qwen3_by_hand():
    small = SHAPES["qwen3-0.6b"]
    attention = 2 * 1024 * 2048 + 2 * 1024 * 1024  # q, o; k, v
    mlp, norms = 3 * 1024 * 3072, 2 * 1024 + 2 * 128
    assert small.block == attention + mlp + norms == 15_730_944
    assert small.root == 151_936 * 1024 + 1024
    assert small.parameters == 28 * 15_730_944 + 151_936 * 1024 + 1024 == 596_049_920
    untied = dataclasses.replace(small, tied=False)
    assert untied.parameters - small.parameters == 151_936 * 1024


BILLIONS = {
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
}


def test_parameters_of_all_public_models():
    counts = {name: round(shape.parameters / 1e9, 2) for name, shape in SHAPES.items()}
    assert counts == BILLIONS


def test_biases_and_head_norms_of_the_families():
    llama = dataclasses.replace(TINY, qk_norm=False)
    assert TINY.block - llama.block == 2 * 2  # a weight per number of a head, for q and for k
    assert dataclasses.replace(llama, qkv_bias=True).block - llama.block == 2 + 2 + 2


def test_ranks_share_the_state_of_the_trainer():
    shape = SHAPES["qwen3-4b"]
    P = shape.parameters
    for ranks in (1, 8):
        update = plan(shape, Settings(ranks=ranks, kl_coef=0.04))["phases"]["update"]
        assert update["master weights"] == 4 * P / ranks
        assert update["Adam"] == 8 * P / ranks
        assert update["reference"] == 4 * P / ranks
    hybrid = plan(shape, Settings(ranks=16, shard_ranks=8))["phases"]["update"]
    assert hybrid["Adam"] == P


def test_activations_of_one_token_in_float32():
    # two norms: input, scaled input, output; q and k norms: input, scaled input;
    # attention: q, k, v, output and the input of o_proj; MLP: 4 tensors of width 3
    numbers = 2 * (2 + 2 + 2) + 2 * (2 + 2) + 4 * 2 + 2 + 4 * 3
    assert block_bytes(TINY, Settings(dtype="float32", cpu=True)) == 4 * numbers


def test_activations_of_one_token_in_half_precision():
    norms = 2 * 2 * (4 + 4 + 2)  # input and scaled input in float32, the output
    qk_norms = 4 * (4 + 2)  # input in float32, scaled input
    others = 2 * (4 * 2 + 2 + 4 * 3)
    assert block_bytes(TINY, Settings()) == norms + qk_norms + others


def test_logits_exist_in_chunks_of_256_mib():
    shape = SHAPES["qwen3-0.6b"]
    rows = 2**26 // 151_936
    assert rows == 441
    assert rows * 151_936 * 4 <= 256 * MIB
    blocks = 16 * MIB  # temporary
    chunk = memory_formulas.logits_bytes(shape, Settings(cpu=True))
    assert chunk == rows * 151_936 * 4 + blocks
    short = Settings(cpu=True, max_prompt_tokens=10, max_new_tokens=11, micro_batch_tokens=1)
    assert memory_formulas.logits_bytes(shape, short) == 20 * 151_936 * 4 + blocks


def test_a_128th_of_a_gpu_holds_a_chunk_of_logits():
    shape = SHAPES["qwen3-0.6b"]
    rows = 2**30 // 4 // 151_936
    chunk = memory_formulas.logits_bytes(shape, Settings(device_gib=128.0))
    assert chunk == rows * 151_936 * (4 + 2)  # and its gradient in half precision


def test_output_of_attention_is_kept_under_checkpointing():
    """Of each block: a number per token, head and channel."""
    s = Settings(max_prompt_tokens=1, max_new_tokens=1, micro_batch_tokens=100)
    with_attention = memory_formulas.update_moments(TINY, s)["head"]["activations"]
    inputs = 100 * (TINY.layers + 1) * TINY.hidden * 2
    last = 100 * TINY.hidden * (8 + 3 * 2 + 4)
    kept = 100 * TINY.layers * 2 * TINY.queries
    assert with_attention == inputs + kept + last


def test_vllm_fills_its_share_with_cache():
    shape, s = SHAPES["qwen3-4b"], Settings(ranks=8)
    parts = engine_parts(shape, s, "all")
    assert sum(parts.values()) == pytest.approx(0.6 * 80 * GIB)
    assert parts["engine: weights"] == 2 * shape.parameters
    per_token = 36 * 8 * 128 * 2 * 2  # blocks, heads, width, keys and values, bytes
    assert plan(shape, s)["cache_tokens"] == int(parts["engine: KV cache"] / per_token)
    assert engine_parts(shape, s, "no") == {}  # it sleeps while the trainer works


def test_vllm_packs_a_tied_head_twice_on_a_cpu():
    shape = SHAPES["qwen3-0.6b"]
    short = Settings(cpu=True, max_prompt_tokens=100, max_new_tokens=100)
    parts = engine_parts(shape, short, "no")
    assert parts["engine: weights"] == 4 * (shape.parameters + 151_936 * 1024)
    assert parts["engine: KV cache"] == 256 * MIB
    long = changed(short, max_prompt_tokens=1000, max_new_tokens=1000)
    per_token = 2 * 4 * 28 * 8 * 128  # keys and values, bytes, layers, heads, width
    assert engine_parts(shape, long, "no")["engine: KV cache"] == 2 * 2000 * per_token


def test_longest_sequence_is_never_cut():
    s = Settings(max_prompt_tokens=100, max_new_tokens=1000, micro_batch_tokens=50)
    assert s.tokens == 1099  # the last token predicts nothing
    assert changed(s, micro_batch_tokens=2000).tokens == 2000


def test_optimizer_step_takes_sixteen_bytes_per_parameter():
    """With few tokens and many blocks it is the highest moment of the update."""
    shape = Shape(64, 256, 200, 4, 2, True, vocab=10, head_dim=16)
    s = Settings(
        cpu=True,
        sampler="transformers",
        process_bytes=1000,
        max_prompt_tokens=1,
        max_new_tokens=1,
        micro_batch_tokens=1,
        prompts_per_step=1,
        group_size=1,
        max_num_seqs=1,
    )
    result = plan(shape, s)
    parts = result["phases"]["update"]
    state = parts["master weights"] + parts["Adam"] + 4 * shape.parameters
    assert state == 16 * shape.parameters
    assert parts.get("gradients", 0) <= 4 * shape.parameters
    assert result["peak_phase"] == "update"


def test_offload_moves_the_state_to_the_host():
    shape = SHAPES["qwen3-8b"]
    result = plan(shape, Settings(cpu_offload=True))
    assert sum(result["host"].values()) == 16 * shape.parameters
    assert not {"master weights", "Adam", "gradients"} & result["phases"]["update"].keys()


# ---- memory plan: laws ---------------------------------------------------------------------------


@given(shapes, plans)
def test_totals_are_sums_of_parts(shape, s):
    result = plan(shape, s)
    for phase, parts in result["phases"].items():
        assert result["totals"][phase] == pytest.approx(sum(parts.values()))
        for name, size in parts.items():
            # negative where the share of the sampler is too small: then it does not fit
            assert size >= 0 or name == "engine: KV cache"
    assert result["peak"] == max(result["totals"].values())
    assert result["cache_room"] or not result["fits"]


@given(shapes, plans, st.integers(1, 10_000))
def test_more_tokens_never_take_less(shape, s, more):
    small = plan(shape, s)["totals"]
    large = plan(shape, changed(s, micro_batch_tokens=s.micro_batch_tokens + more))["totals"]
    for phase in ("logprobs", "sync", "load", "rollout"):
        assert large[phase] >= small[phase] * (1 - 1e-9)
    # with a single micro-batch, there are no gradients of earlier ones
    gradients = 4 * shape.parameters / s.shards
    assert large["update"] >= (small["update"] - gradients) * (1 - 1e-9)


@given(shapes, plans)
def test_flags_that_save_memory_do_so(shape, s):
    def update(**fields):
        return plan(shape, changed(s, **fields))["totals"]["update"] * (1 - 1e-9)

    assert update(activation_checkpointing=True) <= update(activation_checkpointing=False)
    assert update(kl_coef=0.0) <= update(kl_coef=0.1)
    if s.cpu or not s.cpu_offload:  # with offload, more ranks add a buffer for the next block
        assert update(ranks=2 * s.ranks) <= update() + 1e-9 * update()
    if not s.cpu:
        assert update(cpu_offload=True) <= update(cpu_offload=False)


@given(shapes, plans)
def test_solved_micro_batch_is_the_largest_that_fits(shape, s):
    def fits(tokens):
        return plan(shape, changed(s, micro_batch_tokens=tokens))["fits"]

    tokens = memory_plan.solve_micro_batch(shape, s)
    if not tokens:
        assert not fits(1)
        return
    assert fits(tokens)
    assert tokens == memory_plan.MOST_TOKENS or not fits(tokens + 1)


def apply_flags(s: Settings, flags: list[str]) -> Settings:
    """The settings after flags such as "--ranks 4" or "--cpu-offload"."""
    for flag in flags:
        name, *value = flag[2:].replace("-", "_").split()
        kind = type(getattr(s, name))
        s = changed(s, **{name: kind(float(*value)) if value else True})
    return s


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gib", [24.0, 80.0])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_remedies_make_it_fit(name, gib, checkpointing):
    s = Settings(ranks=4, device_gib=gib, activation_checkpointing=checkpointing)
    if plan(SHAPES[name], s)["fits"]:
        return
    for way in memory_plan.remedies(SHAPES[name], s):
        assert plan(SHAPES[name], apply_flags(s, way))["fits"], way


def test_plan_suggests_only_flags_of_the_trainer():
    import lite_ppo

    names = {field.name for field in dataclasses.fields(lite_ppo.Config)}
    own = {"ranks", "device_gib", "cpu", "process_bytes"}
    assert {field.name for field in dataclasses.fields(Settings)} - own <= names


# ---- memory plan: shapes and report --------------------------------------------------------------


def test_shape_is_read_from_a_folder(tmp_path):
    config = dict(
        model_type="qwen3",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=21,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = memory_plan.read_shape(str(tmp_path))
    assert shape == Shape(128, 256, 3, 4, 2, True, vocab=21, head_dim=32)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(SystemExit, match="gpt2"):
        memory_plan.read_shape(str(tmp_path))


def test_report_names_the_largest_micro_batch_or_a_remedy():
    text, result = memory_plan.report("m", SHAPES["qwen3-4b"], Settings(ranks=8))
    assert result["fits"]
    assert "fits; the largest --micro-batch-tokens that fits: " in text
    text, result = memory_plan.report("m", SHAPES["qwen3-8b"], Settings())
    assert not result["fits"]
    assert "does not fit; these flags would fit: " in text
    assert "--cpu-offload" in text
    text, _ = memory_plan.report("m", SHAPES["qwen3-32b"], Settings(device_gib=8))
    assert "none of these flags is enough" in text


def test_plan_prints_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    output = tmp_path / "plan.json"
    words = f"memory_plan.py qwen3-8b --ranks 8 --device-gib 80 --output {output}"
    monkeypatch.setattr(sys, "argv", words.split())
    memory_plan.main()
    assert "8,190,735,360 parameters" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["result"]["fits"]
    assert record["settings"]["ranks"] == 8


# ---- comparison with TRL -------------------------------------------------------------------------


def test_ratios_are_taken_within_a_pair():
    def side(*seconds):
        keys = ("step", *versus_trl.PHASES, "cpu")
        return {"steps": [dict.fromkeys(keys, s) | {"tokens": 100} for s in seconds]}

    pairs = [
        {"trl": side(1, 2, 3), "lite_ppo": side(1, 1, 5)},
        {"trl": side(20), "lite_ppo": side(5)},
        {"trl": side(4), "lite_ppo": side(3)},
    ]
    summary = versus_trl.summarize(pairs)
    step = summary["seconds"]["step"]
    # of 1/2, 5/20 and 3/4
    assert (step["ratio"], step["lowest"], step["highest"]) == (0.5, 0.25, 0.75)
    assert (step["trl"], step["lite_ppo"]) == (3, 3)  # over all steps
    assert summary["tokens_per_step"] == {"trl": 100, "lite_ppo": 100}


def test_phases_of_trl_add_up_to_the_step():
    """One step of 10 s: the rollout is part of "prepare", which is part of "training_step"."""
    seen = versus_trl.Observation()
    seen.marks.times = [(0.0, 0.0), (10.0, 12.0)]
    after = dict(rollout=3, reward=0.5, logprobs=1, prepare=5, training_step=8, optimizer=1)
    seen.clocks, seen.tokens = [{}, after], [100, 100]
    (step,) = seen.steps()
    assert step["update"] == 8 - 5 + 1
    assert step["other"] == 10 - (3 + 0.5 + 1 + 4)
    assert (step["step"], step["cpu"], step["tokens"]) == (10, 12, 100)


def test_output_is_written_after_each_pair(tmp_path, monkeypatch):
    """The third pair fails: the file holds the two before it."""
    output = tmp_path / "versus_trl.json"
    started = []

    def fake_chunk(side, python, job, threads):
        started.append((side, job["seed"]))
        if job["seed"] == 2:
            raise SystemExit("error: the chunk failed")
        seconds = 4.0 if side == "trl" else job["seed"] + 1.0
        keys = ("step", *versus_trl.PHASES, "cpu", "tokens")
        versions = dict.fromkeys(("trl", "torch", "transformers"), "1")
        steps = [dict.fromkeys(keys, seconds)]
        return dict(steps=steps, versions=versions, threads=threads, gpu="")

    monkeypatch.setattr(versus_trl, "chunk", fake_chunk)
    words = f"versus_trl.py --model {tmp_path} --data {tmp_path} --pairs 3 --output {output}"
    words += f" --trl-python {sys.executable}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="the chunk failed"):
        versus_trl.main()
    assert started == [("trl", 0), ("lite_ppo", 0), ("lite_ppo", 1), ("trl", 1), ("trl", 2)]
    record = json.loads(output.read_text())
    assert len(record["pairs"]) == 2
    assert record["summary"]["seconds"]["step"]["ratio"] == 0.375  # of 1/4 and 2/4
    assert list(tmp_path.iterdir()) == [output]  # no partial file


def test_output_is_not_written_halfway(tmp_path, monkeypatch):
    """A kill before the new record is complete leaves the old one."""
    output = tmp_path / "versus_trl.json"
    versus_trl.write({"pairs": [1]}, str(output))
    monkeypatch.setattr(versus_trl.os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        versus_trl.write({"pairs": [1, 2]}, str(output))
    assert json.loads(output.read_text()) == {"pairs": [1]}


JOB = dict(
    model="m",
    data="d.jsonl",
    folder="out",
    prompts=2,
    group=2,
    minibatches=2,
    prompt_tokens=64,
    new_tokens=8,
    lr=1e-3,
    warmup=1,
    steps=2,
    gpu=False,
    trl_batch=0,
    micro_batch_tokens=4096,
    seed=0,
)


def test_both_sides_change_together_on_a_gpu():
    """vLLM, bfloat16 and recomputed activations on a GPU; none of them on a CPU."""
    found = {}
    for gpu in (False, True):
        words = versus_trl.lite_ppo_flags(JOB | {"gpu": gpu})
        cfg = cli.parse_config(lite_ppo.Config, lite_ppo.PRESETS, words)
        found[gpu] = cfg.sampler, cfg.dtype, cfg.activation_checkpointing, cfg.eval_data
    assert found[False] == ("transformers", "float32", False, ())
    assert found[True] == ("vllm", "bfloat16", True, ())
    configs = {}
    config = mock.Mock(side_effect=lambda **fields: SimpleNamespace(**fields))
    with mock.patch.dict(sys.modules, {"trl": SimpleNamespace(GRPOConfig=config)}):
        for gpu in (False, True):
            job = JOB | dict(gpu=gpu, prompts=8, group=4, trl_batch=4)
            configs[gpu] = versus_trl.trl_config(job)
    assert configs[True].use_vllm and not hasattr(configs[False], "use_vllm")
    for gpu, trl in configs.items():
        assert trl.bf16 is trl.gradient_checkpointing is gpu
        assert trl.per_device_train_batch_size * trl.gradient_accumulation_steps == 16
        assert trl.per_device_train_batch_size * trl.steps_per_generation == 32


BAD_FLAGS = [
    "--pairs 0",
    "--output no/such/folder/versus_trl.json",
    "--minibatches 2 --group 3 --prompts 1",
    "--trl-batch 12 --group 8 --prompts 8",
    "--trl-python no/such/python",
    "--gpu",
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag_of_the_comparison_is_refused_at_once(flags, monkeypatch, capsys):
    words = ["versus_trl.py", "--trl-python", sys.executable, *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        versus_trl.main()
    assert f"error: {flags.split()[0]}" in capsys.readouterr().err


# ---- the rollout beside vLLM alone ---------------------------------------------------------------


def test_step_is_written_after_each_part(tmp_path, monkeypatch):
    """The part after the second fails: the file holds the two before it."""

    def parts(args):
        yield {"update": 1.0}
        yield {"update": 1.0, "vLLM s": 2.0}
        raise RuntimeError("the next part failed")

    output = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_script, "measure_step", parts)
    monkeypatch.setattr(gpu_script.common, "start_ranks", lambda: (0, 1))
    monkeypatch.setattr(gpu_script.samplers, "choose_sampler", lambda wanted: ("vllm", ""))
    with pytest.raises(RuntimeError, match="the next part failed"):
        gpu_script.main(gpu_script.Args("step", output=str(output)))
    assert json.loads(output.read_text())["rows"] == [{"update": 1.0, "vLLM s": 2.0}]


def test_bookkeeping_adds_the_calls_of_each_part(monkeypatch):
    """Two engine steps for 4 tokens; a second passes whenever the clock is read."""
    ticks = iter(range(100))
    monkeypatch.setattr(gpu_script.time, "perf_counter", lambda: next(ticks))
    scheduler = SimpleNamespace(schedule=lambda: "plan", update_from_output=lambda plan: plan)
    processor = SimpleNamespace(process_outputs=lambda outputs: outputs)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    engine = SimpleNamespace(engine_core=core, output_processor=processor)

    def generate():
        for _ in range(2):
            assert processor.process_outputs(scheduler.schedule()) == "plan"
        outputs = [SimpleNamespace(token_ids=[1, 2]), SimpleNamespace(token_ids=[3, 4])]
        return [SimpleNamespace(outputs=outputs)]

    assert gpu_script.bookkeeping(SimpleNamespace(llm_engine=engine), generate) == {
        "schedule us/token": 2e6 / 4,
        "update requests us/token": 0,
        "outputs us/token": 2e6 / 4,
        "all us/token": 9e6 / 4,
        "vLLM tokens": 4,
    }
    assert scheduler.schedule() == "plan" and next(ticks) == 10  # no longer timed


# ---- scaling on paper ----------------------------------------------------------------------------


def test_paper_counts_weights_and_state_as_the_memory_plan():
    assumed = SimpleNamespace(**{key: value for key, (value, _) in scaling.ASSUMED.items()})
    for name in ("qwen3-4b", "qwen3-8b", "qwen3-32b"):
        paper = scaling.PaperModel(name, "H100", 8, False, assumed)
        shape = SHAPES[name]
        assert paper.weights == pytest.approx(shape.parameters, rel=1e-4)  # it leaves out norms
        assert paper.state() == pytest.approx(2 * shape.parameters, rel=1e-4)  # 16 bytes / 8 GPUs


def test_paper_traffic_of_one_machine_by_hand():
    """8 GPUs, 25 micro-batches each of 16,384 of the 1,024 x 3,200 tokens, 36 blocks and a root."""
    assumed = SimpleNamespace(**{key: value for key, (value, _) in scaling.ASSUMED.items()})
    paper = scaling.PaperModel("qwen3-4b", "H100", 8, False, assumed)
    bytes_of_a_gpu = (2 + 2 + 4) * paper.weights * 7 / 8
    hops = 3 * 37 * 7 * 5e-6
    assert paper.traffic() == pytest.approx(25 * (bytes_of_a_gpu / 300e9 + hops))


def test_paper_prints_that_it_is_not_measured(capsys):
    rows = scaling.paper()["rows"]
    assert "NOT MEASURED" in capsys.readouterr().out
    for row in rows:  # the trainer has an engine per GPU
        assert row["fits"] == "NO" or row["GPUs of an engine"] == 1


def test_speedup_is_a_median_within_repeats():
    def run(ranks, seconds):
        return {"ranks": ranks, "update s": seconds, "tokens/s": 1, "peak GiB of a rank": 1}

    args = SimpleNamespace(ranks=(1, 2))
    runs = {1: [run(1, 4), run(1, 8), run(1, 6)], 2: [run(2, 2), run(2, 8), run(2, 2)]}
    one, two = scaling.summarize_ranks(args, runs)
    assert (one["speedup"], two["speedup"]) == (1, 2)  # of 2, 1 and 3
    assert two["update s"] == 2


# ---- kill and resume -----------------------------------------------------------------------------


def write_run(folder: Path, steps: list[int], seconds: float, weights: bytes = b"w") -> None:
    (folder / "final").mkdir(parents=True)
    (folder / "final/model.safetensors").write_bytes(weights)
    lines = [json.dumps({"step": step, "loss": 1, "time/step": seconds}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[-1][:5])
    (folder / "samples.jsonl").write_text("")


def test_comparison_ignores_times_and_an_incomplete_line(tmp_path):
    write_run(tmp_path / "whole", [0, 1, 2], seconds=1)
    write_run(tmp_path / "killed", [0, 1, 2], seconds=2)
    laws = kill_resume.compare(tmp_path / "whole", tmp_path / "killed", steps=2)
    assert all(laws.values())


def test_comparison_notices_every_difference(tmp_path):
    write_run(tmp_path / "whole", [0, 1, 2], seconds=1)
    write_run(tmp_path / "killed", [0, 1, 1, 2], seconds=1, weights=b"other")
    (tmp_path / "killed/samples.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "killed/partial-3").touch()
    laws = kill_resume.compare(tmp_path / "whole", tmp_path / "killed", steps=2)
    assert not any(laws.values())


# ---- soak ----------------------------------------------------------------------------------------

# a run of 12 steps, with a child and two grandchildren as grader
FAKE_RUN = """
import subprocess, sys, time
sleep = "import time; time.sleep(60)"
workers = f"import subprocess, sys; a = [sys.executable, '-c', {sleep!r}]; "
workers += "b = [subprocess.Popen(a) for _ in range(2)]; sys.stdin.read(); "
workers += "[p.kill() for p in b]; [p.wait() for p in b]"
server = subprocess.Popen([sys.executable, "-c", workers], stdin=subprocess.PIPE)
time.sleep(1)
with open(sys.argv[1], "w") as file:
    for step in range(13):
        print("{}", file=file, flush=True)
        time.sleep(0.1)
server.stdin.close()
server.wait()
"""


def test_soak_observes_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "WINDOW", 2)
    metrics = tmp_path / "metrics.jsonl"
    run = subprocess.Popen([sys.executable, "-c", FAKE_RUN, str(metrics)])
    seen = soak.Observer(run, metrics)
    monkeypatch.setattr(seen, "look_every", 0.2)
    seen.observe()
    rows = soak.summarize(seen, steps=12)
    assert [row["process"] for row in rows] == ["trainer", "server", "worker", "worker"]
    laws = soak.check_laws(seen, rows, 12, list(range(13)))
    assert all(laws.values()), laws


def test_soak_slope_is_per_100_steps(monkeypatch):
    monkeypatch.setattr(soak, "WINDOW", 10)
    assert soak.slope([0, 1, 2], [5.0, 6.0, 7.0]) == pytest.approx(10)  # 1 MiB per 10 steps


# ---- fuzz ----------------------------------------------------------------------------------------


def test_fuzz_breaks_no_law():
    figures = fuzz_rewards.fuzz(total=20, timeout=5, workers=1, seed=0)
    assert figures["broken"] == []
    assert figures["kinds"]["known"]["answers"] == 2
    assert figures["processes_while_grading"] == 2  # server and worker
    fuzz_rewards.report(figures)


def test_fuzz_notices_a_wrong_verdict():
    known = fuzz_rewards.Answer("", {}, 1.0, "known")
    for verdict in ((0.0, "", 0.1), (1.0, "a reason", 0.1), (0.5, "", 0.1)):
        seen = fuzz_rewards.Statistics()
        seen.add(known, verdict)
        assert seen.broken[0].startswith("order")
    seen = fuzz_rewards.Statistics()
    seen.add(known, (1.0, "", 0.1))
    assert not seen.broken


# ---- mutation ------------------------------------------------------------------------------------


def test_mutants_of_scale_reward():
    found = [m for m in mutation.mutants("tricks.py", "scale_reward") if "return" in m.source]
    changes = {(mutant.kind, mutant.old, mutant.new) for mutant in found}
    bounds = "0 < high - low < float('inf')"
    assert ("comparison", bounds, bounds.replace("0 <", "0 <=")) in changes
    assert ("operator", "1 - correct", "1 + correct") in changes
    assert {mutant.function for mutant in found} == {"scale_reward"}
    assert len({mutant.source for mutant in found}) == len(found)


SURVIVAL = """
import mutation
source = (mutation.ROOT / "support/stats.py").read_text()
changes = [("means = values", "means = values"), ("(1 - level) / 2", "(1 - level)")]
for right, wrong in changes:
    assert right in source
    context = mutation.multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        changed = source.replace(right, wrong)
        print(pool.apply(mutation.survives, ("support/stats.py", changed)))
"""


def test_mutant_is_killed_and_the_original_survives():
    assert run_python("-c", SURVIVAL, EXAMPLES="1").split() == ["True", "False"]


# ---- every script on a tiny model ----------------------------------------------------------------


def run_python(*arguments: str, code: int = 0, **environment: str) -> str:
    """What Python prints, in a new process with `benchmarks` importable."""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)} | environment
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_script(name: str, *arguments: str, output: Path) -> dict:
    """What the script writes."""
    done = forks.run_script(BENCHMARKS / name, *arguments, f"--output={output}").wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


TINY_SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=64,
    vocab_size=32,
)
SHAPE_FLAG = f"--shape={json.dumps(TINY_SHAPE)}"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return common.make_model(common.shape_of(json.dumps(TINY_SHAPE)), folder, torch.float32)


def tiny_run(model: str, root: Path) -> str:
    """Flags of lite_ppo.py for a short run."""
    return (
        f"--model {model} --train-data {root}/train.jsonl --eval-data {root}/dev.jsonl "
        "--reward exact --sampler transformers --prompts-per-step 2 --group-size 2 --minibatches 2 "
        "--max-prompt-tokens 16 --max-new-tokens 8 --eval-samples 1 --eval-size 1 "
        "--reward-workers 1 --no-activation-checkpointing"
    )


def test_random_model_loads_and_is_made_once(tiny_model):
    from support.models import load_tokenizer

    tokenizer, eos_ids = load_tokenizer(tiny_model, 24)
    assert tokenizer.eos_token_id in eos_ids
    weights = Path(tiny_model, "model-00001-of-00003.safetensors")
    written = weights.stat().st_mtime_ns
    shape = common.shape_of(json.dumps(TINY_SHAPE))
    assert common.make_model(shape, Path(tiny_model), torch.float32) == tiny_model
    assert weights.stat().st_mtime_ns == written


def test_logprobs_script(tmp_path, monkeypatch):
    """In this process: five forms in new processes would take half a minute."""

    def run_here(args, only):
        here = dataclasses.replace(args, only=only)
        return logprobs.compare(here) if only == "gradients" else logprobs.run_once(here)

    monkeypatch.setattr(logprobs, "run_in_new_process", run_here)
    output = tmp_path / "logprobs.json"
    args = logprobs.Args(
        tokens=40, hidden=8, vocab=50, rounds=2, check_tokens=16, output=str(output)
    )
    logprobs.main(args)
    rows = json.loads(output.read_text())["rows"]
    assert [row["form"] for row in rows] == list(logprobs.FORMS)
    assert [row["rounds"] for row in rows] == [2, 1, 1, 1, 2][: len(rows)]
    assert all(row["gradient error"] < 1e-4 for row in rows)


def test_logprobs_measures_in_a_new_process():
    args = logprobs.Args(tokens=40, hidden=8, vocab=50, chunk=16)
    found = logprobs.run_in_new_process(args, "linear_logprobs")
    assert found.keys() == {"seconds", "extra_gib"}


def test_packing_script(tmp_path):
    flags = "--max-length 32 --prompt-length 8 --sequences 8 --budget 128 --rounds 1"
    record = run_script("packing.py", SHAPE_FLAG, *flags.split(), output=tmp_path / "packing.json")
    assert len(record["rows"]) == 5
    assert all(row["gradient error"] < 1e-4 for row in record["rows"])
    assert len(record["attention"]) == 2


def test_step_script(tmp_path):
    flags = "--prompts-per-step 2 --group-size 2 --minibatches 2 --max-new-tokens 8 --rounds 1"
    flags += " --sampler transformers --kl-coef 0.1"
    record = run_script("step.py", SHAPE_FLAG, *flags.split(), output=tmp_path / "step.json")
    phases = {row["phase"] for row in record["rows"]}
    assert phases >= {"rollout", "logprobs", "update", "step"}
    assert record["totals"]["sequences"] == 4
    assert record["totals"]["logprob gap"] < 1e-3
    # rounding and the last token of each sequence are the only differences between the two counts
    assert record["totals"]["train_flops / model"] == pytest.approx(1, abs=0.1)


def test_gpu_script_measures_updates(tmp_path):
    """The changes that need no compilation, which takes a minute on a CPU."""
    flags = ["update", f"--shapes={json.dumps(TINY_SHAPE)}", "--changes", "kept", "chunks"]
    flags += "--tokens 132 --sequences 4 --rounds 1".split()
    record = run_script("gpu.py", *flags, output=tmp_path / "gpu.json")
    rows = record["rows"]
    assert [row["changes"] for row in rows] == ["before", "kept", *["chunks"] * 4]
    assert [row["micro_batch"] for row in rows[2:]] == [32_768, 16_384, 65_536, 16_384]
    assert all(row["seconds"] > 0 for row in rows), rows
    norms = [row["grad_norm"] for row in rows]
    assert norms == pytest.approx([norms[0]] * len(rows), rel=1e-5)


def test_scaling_script_measures_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.subprocess, "run", forks.run_command)
    args = scaling.Args(shape=json.dumps(TINY_SHAPE), ranks=(2,), micro_batch_tokens=64)
    weights = scaling.weights_file(str(tmp_path), 2)
    job = scaling.Job(2, length=16, group_size=4, rounds=1, lr=1e-3, weights=weights)
    row = scaling.measure(args, str(tmp_path), job)
    assert row["update s"] > 0
    error, moved = scaling.compare_weights(args, str(tmp_path))
    assert error == 0
    assert moved > 0


def test_memory_plan_check(tmp_path, monkeypatch, tiny_model, capsys):
    flags = "--device-gib cpu --check --threads 1 --sampler transformers --prompts-per-step 2"
    flags += " --group-size 2 --max-prompt-tokens 16 --max-new-tokens 8 --micro-batch-tokens 64"
    output = tmp_path / "check.json"
    words = ["memory_plan.py", tiny_model, *flags.split(), f"--output={output}"]
    monkeypatch.setattr(sys, "argv", words)
    memory_plan.main()
    assert "planned / measured peak" in capsys.readouterr().out
    phases = json.loads(output.read_text())["result"]["phases"]
    assert phases.keys() == {*memory_formulas.PHASES, "peak"}
    assert all(row["measured"] > 100 * MIB for row in phases.values())


def test_one_chunk_of_lite_ppo_against_trl(tiny_model, root, monkeypatch):
    monkeypatch.setattr(versus_trl.subprocess, "run", forks.run_command)
    job = JOB | dict(model=tiny_model, data=f"{root}/train.jsonl")
    steps = versus_trl.chunk("lite_ppo", sys.executable, job, threads=1)["steps"]
    assert len(steps) == 2
    for step in steps:
        phases = sum(step[phase] for phase in versus_trl.PHASES)
        assert phases == pytest.approx(step["step"])


def test_run_kills_itself_in_the_phase(tiny_model, root, tmp_path):
    """The second update is the one of step 2: the log ends with step 1."""
    script = str(BENCHMARKS / "kill_resume.py")
    flags = f"{tiny_run(tiny_model, root)} --steps 3 --eval-every 1 --output-dir {tmp_path}/run"
    doomed = ["--doomed", "update", "2", "0", "0"]
    run_python(script, *doomed, *flags.split(), code=-signal.SIGKILL)
    steps = [row["step"] for row in kill_resume.rows(tmp_path / "run")]
    assert steps == [0, 1]


def test_analysis_script(tiny_model, root, tmp_path):
    flags = ["--steps=1", f"--flags={tiny_run(tiny_model, root)}"]
    record = run_script("analysis.py", *flags, output=tmp_path / "analysis.json")
    parts = {"clipped.jsonl", "counts of clipped tokens", "looping share"}
    assert record["real size"].keys() == parts
    assert record["toy"].keys() >= {"clipped.jsonl", "counts of clipped tokens", "steps"}
