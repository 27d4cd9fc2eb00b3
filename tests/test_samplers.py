"""The engines that sample, and model folders: read, checked and written.

The vLLM helper process runs the tests whose names begin with test_sampler: see conftest.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import AutoConfig, DynamicCache, PreTrainedTokenizerFast

import lite_ppo
from lite_ppo import Problem, Response, build_policy, full_weights, make_micro_batch
from support import failures, models, samplers, toy, transformers_sampler, vllm_sampler
from support.actor import Actor
from support.clock import clock
from support.errors import UserError
from support.sampling import Sample, Sampling
from tests import faulty
from tests.forks import Fork
from tests.world import (
    CPU,
    ENGINE,
    EOS,
    VOCABULARY,
    command_line,
    config,
    load_model,
    predictions,
    start_ranks,
)

QUESTIONS = [
    [3, 7, 4],
    [3, 8, 16, 9, 4],
    [3, 10, 16, 11, 16, 12, 4],
    [3],
    [3, 13, 16, 14, 4],
]
FOUR_EACH = Sampling(n=4, max_new_tokens=12, temperature=1.0)


class Engine:
    """A sampler that holds the weights of a policy."""

    def __init__(self, cfg):
        room = cfg.max_prompt_tokens + cfg.max_new_tokens
        _, eos_ids = models.load_tokenizer(cfg.model, room)
        self.sampler = samplers.make(ENGINE, cfg, cfg.model, eos_ids, CPU, torch.float32)
        self.policy = build_policy(cfg, cfg.model, CPU)
        self.sync()

    def sync(self) -> None:
        self.sampler.load_weights(full_weights(self.policy, torch.float32))

    def ask(self, sampling: Sampling, which=range(5), seed=0) -> list[tuple[list[int], Sample]]:
        """A question and a sample for each response."""
        questions = [QUESTIONS[i] for i in which]
        seeds = [100 * i + seed for i in which]
        groups = self.sampler.generate(questions, seeds, sampling)
        pairs = zip(questions, groups, strict=True)
        return [(question, sample) for question, group in pairs for sample in group]

    def samples(self, sampling: Sampling, which=range(5)) -> list[Sample]:
        return [sample for _, sample in self.ask(sampling, which)]

    def first_tokens(self, sampling: Sampling, question: int) -> list[int]:
        return [int(sample.token_ids[0]) for sample in self.samples(sampling, [question])]

    def logprob_gap(self) -> float:
        """The largest difference between the log-probs of sampler and policy."""
        responses = []
        for question, sample in self.ask(FOUR_EACH):
            responses.append(Response(Problem({}, question), *sample, "", 0.0))
        unused = torch.zeros(len(responses))
        batch = make_micro_batch(responses, range(len(responses)), unused, unused, CPU)
        logprobs, _ = self.policy.response_logprobs(batch, 1.0)
        return (logprobs - batch.rollout_logprobs).abs().max().item()


@pytest.fixture(scope="module")
def engine(root):
    start_ranks()  # a vLLM engine that was closed has ended torch.distributed
    # more sequences than vLLM for CPUs takes
    cfg = config(root, max_prompt_tokens=20, max_new_tokens=20, max_num_seqs=5000)
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="3"):
        engine = Engine(cfg)
        engine.ranks_of_this_machine = os.environ["LOCAL_WORLD_SIZE"]
    yield engine
    engine.sampler.close()


def test_sampler_leaves_the_number_of_ranks_of_this_machine(engine):
    assert engine.ranks_of_this_machine == "3"


# ---- random numbers ------------------------------------------------------------------------------


def check_same_samples(found, expected) -> None:
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.truncated == b.truncated
        assert np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


def test_sampler_draws_are_different(engine):
    texts = {tuple(sample.token_ids) for sample in engine.samples(FOUR_EACH)}
    assert len(texts) > 10  # of 20


def test_sampler_draws_do_not_depend_on_the_batch(engine):
    alone = []
    for i in range(5):
        alone += engine.ask(FOUR_EACH, [i])
    check_same_samples(alone, engine.ask(FOUR_EACH))


def test_sampler_draws_do_not_depend_on_the_order(engine):
    backwards = engine.ask(FOUR_EACH, [4, 3, 2, 1, 0])
    in_order = sorted(backwards, key=lambda pair: QUESTIONS.index(pair[0]))
    check_same_samples(in_order, engine.ask(FOUR_EACH))


def test_sampler_draws_response_k_with_the_seed_plus_k(engine):
    one_by_one = []
    for i in range(5):
        for k in range(4):
            one_by_one += engine.ask(FOUR_EACH._replace(n=1), [i], seed=k)
    check_same_samples(one_by_one, engine.ask(FOUR_EACH))


def test_sampler_reads_more_prompt_tokens_than_vllm_schedules_at_once(engine):
    """On a CPU, vLLM schedules 4,096 tokens at once, and must not split the prompt that is next."""
    prompts = [[3, *[5 + (i // 16**k) % 16 for k in range(3)] * 5, 16, 7, 4] for i in range(256)]
    assert len(prompts) * len(prompts[0]) > 4096
    two_each = Sampling(n=2, max_new_tokens=2, temperature=1.0)
    together = engine.sampler.generate(prompts, list(range(256)), two_each)
    for i in (0, 107, 108, 215, 216, 255):
        (alone,) = engine.sampler.generate([prompts[i]], [i], two_each)
        check_same_samples([(None, s) for s in together[i]], [(None, s) for s in alone])


def test_sampler_shows_a_sign_of_life_for_each_position(engine):
    """No tick: the ranks compare their ticks, and another rank may sample fewer positions."""
    signs = clock.signs
    ticks = clock.ticks
    longest = max(len(sample.token_ids) for sample in engine.samples(FOUR_EACH))
    assert clock.signs - signs >= longest > 4
    assert clock.ticks == ticks


def test_sampler_is_greedy_at_temperature_0(engine, root):
    model = load_model(root / "tied")
    answers = engine.ask(Sampling(n=3, max_new_tokens=12, temperature=0.0))
    assert len(answers) == 15
    for question, sample in answers:
        whole = model.generate(
            torch.tensor([question]),
            attention_mask=torch.ones(1, len(question)),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
        )
        assert sample.token_ids.tolist() == whole[0, len(question) :].tolist()


# ---- the end of a response -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2, 12])
def test_sampler_stops_at_an_end_of_sequence_token_or_truncates(limit, engine):
    ends = set()
    for sample in engine.samples(Sampling(n=40, max_new_tokens=limit, temperature=1.0)):
        *inside, last = sample.token_ids.tolist()
        length = len(sample.token_ids)
        assert not set(inside) & set(EOS)
        assert last in EOS or length == limit
        assert length <= limit
        assert sample.truncated == (last not in EOS)
        assert len(sample.logprobs) == length
        if not sample.truncated:
            ends.add((length, last))
    # each end-of-sequence token, also at the limit of 2
    assert ends >= {(length, token) for length in (1, 2) for token in EOS}


def test_sampler_ends_at_no_other_token(engine, monkeypatch):
    """The ids of the model's own files count only if they are among those of the caller."""
    ids = engine.sampler.eos_ids
    only = torch.tensor([5]) if isinstance(ids, torch.Tensor) else [5]
    monkeypatch.setattr(engine.sampler, "eos_ids", only)
    inside, last = set(), set()
    for sample in engine.samples(Sampling(n=40, max_new_tokens=12, temperature=1.0)):
        inside.update(sample.token_ids[:-1].tolist())
        last.update([] if sample.truncated else [int(sample.token_ids[-1])])
    assert inside >= set(EOS)
    assert last == {5}


# ---- the distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@torch.no_grad()
def test_sampler_returns_the_log_probs_of_the_model(temperature, engine, root):
    model = load_model(root / "tied")
    for question, sample in engine.ask(Sampling(2, 12, temperature)):
        expected, _ = predictions(model, question, sample.token_ids, temperature)
        assert np.allclose(sample.logprobs, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def next_token_logprobs(root: Path, question: int, temperature: float) -> torch.Tensor:
    model = load_model(root / "tied")
    _, logprobs = predictions(model, QUESTIONS[question], [0], temperature)
    return logprobs[0]  # [V]


def test_sampler_draws_from_the_softmax_of_the_model(engine, root):
    draws = 1500
    expected = draws * next_token_logprobs(root, 2, 1.0).exp().numpy()
    tokens = engine.first_tokens(Sampling(draws, max_new_tokens=1, temperature=1.0), 2)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 50  # 20 degrees of freedom: above 50 in 2 of 10,000 cases


@pytest.mark.parametrize(
    "temperature,top_p,top_k",
    [
        (0.9, 1.0, 4),
        (0.9, 0.6, 0),
        (1.3, 0.8, 6),  # top-k first, then top-p of the rest
    ],
)
def test_sampler_applies_top_p_and_top_k(temperature, top_p, top_k, engine, root):
    logprobs = next_token_logprobs(root, 2, temperature)
    probabilities, ids = logprobs.exp().sort(descending=True)
    mass = probabilities[: top_k or None].cumsum(0)
    kept = 1 + int((mass[:-1] < top_p * mass[-1]).sum())  # the fewest with a mass of top_p
    assert 1 < kept < VOCABULARY
    expected = (probabilities[:kept] / mass[kept - 1]).log()
    expected = dict(zip(ids.tolist(), expected.tolist()))

    samples = engine.samples(Sampling(200, 1, temperature, top_p, top_k), [2])
    assert {int(sample.token_ids[0]) for sample in samples} == expected.keys()
    for sample in samples:
        token = int(sample.token_ids[0])
        assert sample.logprobs[0] == pytest.approx(expected[token], abs=1e-4)


# ---- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def test_sampler_takes_the_weights_of_the_trainer(engine):
    parameters = list(engine.policy.parameters())
    original = [parameter.clone() for parameter in parameters]
    assert engine.logprob_gap() < 1e-4
    for parameter in parameters:  # stands for an optimizer step
        parameter.add_(parameter.sin() * 0.3)
    assert engine.logprob_gap() > 0.01
    engine.sync()
    assert engine.logprob_gap() < 1e-4
    for parameter, value in zip(parameters, original, strict=True):
        parameter.copy_(value)
    assert engine.logprob_gap() > 0.01
    engine.sync()
    assert engine.logprob_gap() < 1e-4


# ---- parts of the transformers engine ------------------------------------------------------------


@pytest.mark.parametrize("uniform,token", [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2)])
def test_draw_inverts_the_distribution_function(uniform, token):
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    drawn, logprob = transformers_sampler.draw(
        probabilities.log(), torch.tensor([uniform]), FOUR_EACH
    )
    assert drawn.tolist() == [token]
    assert logprob.exp().tolist() == pytest.approx([probabilities[0, token].item()])


def test_cache_with_spare_room_equals_the_one_of_transformers(root):
    """The prompt, forty tokens, and rows that are dropped in between."""
    model = AutoConfig.from_pretrained(root / "tied")
    heads, width = model.num_key_value_heads, model.head_dim
    layers = model.num_hidden_layers
    cache, expected = transformers_sampler.roomy_cache(model), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    rows = 6
    for t in range(41):
        length = 5 if t == 0 else 1
        if t == 20:
            rows = 3
            for each in (cache, expected):
                each.batch_select_indices(torch.tensor([0, 3, 4]))
        for layer in range(layers):
            new = torch.randn(2, rows, heads, length, width, generator=generator)
            found = cache.update(*new, layer)
            for a, b in zip(found, expected.update(*new, layer), strict=True):
                assert torch.equal(a, b)


# ---- the choice of the engine --------------------------------------------------------------------


def test_fixed_cache_lets_vllm_share_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    card = SimpleNamespace(total_memory=100 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    cfg = SimpleNamespace(gpu_memory_utilization=0.6)
    measured = dict(gpu_memory_utilization=0.6, enable_sleep_mode=True)
    assert vllm_sampler.device_options(cfg, gpu, 1) == measured
    for two_responses, size in ((1, 2**28), (2**30, 2**30)):
        assert vllm_sampler.device_options(cfg, CPU, two_responses)["kv_cache_memory_bytes"] == size

    monkeypatch.setenv("LITE_PPO_KV_CACHE_GIB", "2.5")
    fixed = vllm_sampler.device_options(cfg, gpu, 1)
    assert fixed["kv_cache_memory_bytes"] == 2.5 * 2**30  # so vLLM does not measure
    assert fixed["gpu_memory_utilization"] == 0.025  # what must be free is the cache
    assert "enable_sleep_mode" not in fixed  # falling asleep measures, too
    assert vllm_sampler.device_options(cfg, CPU, 2**30)["kv_cache_memory_bytes"] == 2.5 * 2**30


@pytest.mark.parametrize("flag", ["temperature", "eval_temperature"])
def test_temperatures_that_vllm_changes_or_refuses_are_refused(flag):
    usual = dict(temperature=1.0, eval_temperature=0.0)
    for value in (0.01, 0.7, 2.0):
        vllm_sampler.check_temperatures(SimpleNamespace(**usual | {flag: value}))
    for value in (1e-6, 0.0099, 2.5):
        name = flag.replace("_", "-")
        with pytest.raises(UserError, match=f"--{name} {value}: vLLM takes 0.01 to 2"):
            vllm_sampler.check_temperatures(SimpleNamespace(**usual | {flag: value}))


@pytest.mark.parametrize("text", ["", "much", "-1", "nan", "inf"])
def test_fixed_cache_must_be_a_number(text, monkeypatch):
    monkeypatch.setenv("LITE_PPO_KV_CACHE_GIB", text)
    with pytest.raises(UserError, match=f"LITE_PPO_KV_CACHE_GIB={text}: must be a number of GiB"):
        vllm_sampler.fixed_cache()


@pytest.mark.parametrize(
    "text", ["Error in memory profiling. Initial free", "Memory usage increased after sleeping."]
)
def test_shared_gpu_is_one_message_with_the_remedy(text):
    message = failures.describe(AssertionError(text), 0)
    assert "LITE_PPO_KV_CACHE_GIB lets runs share a GPU" in message and text in message
    assert "\n" not in message


def test_missing_vllm_is_one_message(root):
    argv = command_line(root, **{"--sampler": "vllm"})
    result = Fork(faulty.main_without_vllm, argv=argv).wait()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: --sampler vllm: vLLM is not installed" in result.stderr


UNFIT = {  # name: code of vllm/platforms.py, and why vLLM does not run
    "GPU build": (
        "current_platform = type('Unspecified', (), {'device_type': ''})",
        "GPU build, and this machine has no GPU",
    ),
    "broken": ("raise OSError('libcudart.so.13: no such file')", "OSError: libcudart"),
}


@pytest.fixture(params=["GPU build", "broken"])
def fake_vllm(request, tmp_path, monkeypatch) -> str:
    """An installed vLLM that does not run here; returns the reason."""
    code, reason = UNFIT[request.param]
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "platforms.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for module in list(sys.modules):
            if module.split(".")[0] == "vllm":
                del sys.modules[module]
        yield reason


def test_auto_chooses_transformers_where_vllm_does_not_run(fake_vllm):
    kind, reason = samplers.choose_sampler("auto")
    assert kind == "transformers"
    assert fake_vllm in reason


def test_vllm_that_does_not_run_is_one_message(fake_vllm):
    message = f"--sampler vllm: .*{fake_vllm}.*--sampler transformers"
    with pytest.raises(UserError, match=message):
        samplers.choose_sampler("vllm")


@pytest.fixture
def own_classes(monkeypatch):
    """A vLLM that implements one class, and takes another from transformers."""
    own = SimpleNamespace(module_name="vllm.model_executor.models.qwen3")
    borrowed = SimpleNamespace(module_name="vllm.model_executor.models.transformers")
    registry = SimpleNamespace(models={"Own": own, "Borrowed": borrowed})
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setattr(samplers, "vllm_problem", lambda: "")


def test_class_that_vllm_takes_from_transformers_is_not_sampled_by_it(own_classes):
    assert samplers.choose_sampler("auto", ["Own"])[0] == "vllm"
    for name in ("Borrowed", "Unknown"):
        kind, reason = samplers.choose_sampler("auto", [name])
        assert kind == "transformers"
        assert f"no implementation of its own of {name}" in reason
        with pytest.raises(UserError, match=f"{name}; .*--sampler transformers"):
            samplers.choose_sampler("vllm", [name])


def test_transformers_does_not_need_vllm(fake_vllm):
    kind, _ = samplers.choose_sampler("transformers")
    assert kind == "transformers"


def test_text_of_a_response_keeps_its_spaces():
    """The default of some tokenizers is to remove those before punctuation."""
    words = Tokenizer(WordLevel({"a": 0, " ": 1, "?": 2}))
    words.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1, 2]) == "a?"
    assert Actor(None, tokenizer, None).decode(np.array([0, 1, 2])) == "a ?"


# ---- model folders -------------------------------------------------------------------------------


def test_tokenizer_and_generation_config_name_the_ends_of_a_response(root):
    _, eos_ids = models.load_tokenizer(str(root / "tied"), 40)
    assert eos_ids == EOS


@pytest.mark.parametrize("found", [-1, "<eos>", [1, "<eos>"]])
def test_end_of_a_response_must_be_a_token_id(found, root, tmp_path):
    """-1 was taken, and no response ended; a text was an error about < of str and int."""
    folder = shutil.copytree(root / "tied", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(UserError, match=r"--model .*eos_token_id in gen.* is no token id; give"):
        models.load_tokenizer(str(folder), 40)


def test_attention_of_the_config_need_not_be_installed(root, tmp_path):
    """A config.json that asks for FlashAttention 2 was refused, although it is never used."""
    folder = shutil.copytree(root / "tied", tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())
    flash = {"attn_implementation": "flash_attention_2"}
    (folder / "config.json").write_text(json.dumps(text | flash))
    models.load_tokenizer(str(folder), 40)
    model = models.build_model(str(folder), torch.float32, "sdpa", CPU)
    models.load_weights(model, str(folder))
    models.write_model(model.state_dict(), str(folder), tmp_path / "final")
    assert models.stored_shapes(str(tmp_path / "final")) == models.stored_shapes(str(folder))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_stored_shapes_are_those_of_the_tensors(name, root):
    tensors = load_file(root / name / "model.safetensors")
    expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert models.stored_shapes(str(root / name)) == expected


def test_weights_come_from_the_files_that_transformers_reads(root, tmp_path):
    """Shards of an earlier model beside model.safetensors took its place, and counted too."""
    folder = shutil.copytree(root / "tied", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in parts.items():
        save_file({name: tensors[name] + 1 for name in part}, folder / file)
    save_file({"layers.0.attention.wk.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    index = {name: file for file, part in parts.items() for name in part}
    for added in (0, 1):
        model = models.build_model(str(folder), torch.float32, "sdpa", CPU)
        models.load_weights(model, str(folder))
        assert all(torch.equal(model.state_dict()[n], tensors[n] + added) for n in names)
        assert models.stored_shapes(str(folder)).keys() == tensors.keys()
        (folder / "model.safetensors").unlink(missing_ok=True)
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model.safetensors.index.json is damaged"):
        models.stored_shapes(str(folder))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_must_be_finite(value, root, tmp_path):
    """All optimizer steps were skipped, the responses were blamed, and a final model was saved."""
    folder = shutil.copytree(root / "tied", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"--model .*: its tensor model.norm.weight has values that"
    ):
        build_policy(config(root), str(folder), CPU)


@pytest.mark.parametrize("with_weights", [True, False])
def test_adapter_is_refused(with_weights, root, tmp_path):
    """Beside whole weights it was ignored; alone, its folder was called no model."""
    if with_weights:
        shutil.copytree(root / "tied", tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"--model .* an adapter .*; merge it"):
        models.load_tokenizer(str(tmp_path), 40)


def test_final_model_keeps_precision_and_generation_config(root):
    half = root / "half"
    load_model(root / "tied", dtype=torch.bfloat16).save_pretrained(half)
    toy.make_tokenizer().save_pretrained(half)
    # transformers reads this file, but refuses to write it, because do_sample is missing
    generation = json.dumps(dict(eos_token_id=EOS, temperature=0.6, top_p=0.9))
    (half / "generation_config.json").write_text(generation)
    folder = root / "half-run"
    lite_ppo.train(config(root, model=str(half), output_dir=str(folder), steps=1))

    final = folder / "final"
    tensors = load_file(final / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    assert (final / "generation_config.json").read_text() == generation
    _, eos_ids = models.load_tokenizer(str(final), 20)
    assert eos_ids == EOS
