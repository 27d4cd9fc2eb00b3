"""lite_ppo.py and its parts, run for real on a tiny random model. Run: pytest test_lite_ppo.py

Gradients are compared with a reference that knows nothing of packs, ranks and weights: one sequence at a time, in float64, the formulas in plain Python.
Some of the tests run again, in processes of their own: on two ranks, and with vLLM, which changes the process that it lives in (see `helpers`).
"""

import contextlib, ctypes, dataclasses, functools, inspect, json, math, os, random, re, resource, shutil, signal, socket, subprocess, sys, time, typing  # noqa: E401
from pathlib import Path
from types import SimpleNamespace

one_rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
os.environ.update(one_rank | os.environ | dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"))  # CPUs compute in float32

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

import data, guard, lite_ppo, rundir, samplers, toy  # noqa: E401  before transformers: puts broken companions of torch out of the way
from lite_ppo import Clock, Config, Problem, Response, build_policy, full_weights, make_pack
from samplers import Sample, Sampling
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

settings.register_profile("repeatable", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)
CPU, HERE, load_model = torch.device("cpu"), Path(__file__).parent, AutoModelForCausalLM.from_pretrained
WORLD, ENGINE = int(os.environ["WORLD_SIZE"]), os.environ.get("TEST_ENGINE", "transformers")

# ---- a tiny world ----------------------------------------------------------------------------------------------------

EOS = [1, 9]  # the tokenizer's, and "3"
REWARDS = r"""
import os
def sevens(response, row): return float(response[:1] == "7" and row["answer"].isdigit())
def even(response, row): return float(len(response) % 2 == 0)
def trouble(response, row):
    while response == "hangs": pass
    if response == "exits": os._exit(3)
    if response == "raises": raise KeyError("no such thing")
    return float({"nan": "nan", "word": "seven"}.get(response, row["answer"]))
"""
GOOD, LONG = '{"problem": "1+1", "answer": 2}\n', '{"problem": "1+1+1+1+1+1+1+1+1+1", "answer": 10}\n'
FILES = {"dev.jsonl": GOOD, "long.jsonl": LONG, "mixed.jsonl": GOOD + LONG, "syntax.jsonl": GOOD + "\n{'problem': 1}\n", "list.jsonl": '["1+1", "2"]\n',
         "empty.jsonl": "\n", "unanswered.jsonl": GOOD + '{"problem": "1+2"}\n', "rewards.py": REWARDS, "syntax.py": "def f(:\n",
         "train.jsonl": "".join(json.dumps({"problem": "+".join("12345"[: 1 + i % 5]) + f"+{i}", "answer": str(i)}) + "\n" for i in range(10))}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def root(tmp_path_factory):
    """A folder with models of random weights, data and reward functions, some of them broken; and torch.distributed."""
    start_ranks()
    if ENGINE == "vllm" and samplers.choose_sampler("auto")[0] != "vllm":
        pytest.skip(samplers.choose_sampler("auto")[1])  # not installed, or not for this machine
    if "TEST_ROOT" in os.environ:
        return Path(os.environ["TEST_ROOT"])
    root = tmp_path_factory.mktemp("world")
    for name in ("tied", "untied"):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96, vocab_size=21,
            max_position_embeddings=64, tie_word_embeddings=name == "tied", initializer_range=0.15, eos_token_id=1, bos_token_id=None, dtype="float32",
        ))  # fmt: skip
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
        model.save_pretrained(root / name)
        toy.make_tokenizer().save_pretrained(root / name)
    for name, dropped in {"weightless": "model.safetensors", "silent": "chat_template.jinja", "hollow": "config.json"}.items():
        shutil.copytree(root / "tied", root / name, ignore=shutil.ignore_patterns(dropped))
    for name, lost in dict(cut=4, stub=200_000).items():  # downloads that broke off, in the numbers and before them
        shutil.copytree(root / "tied", root / name)
        os.truncate(path := root / name / "model.safetensors", max(500, os.path.getsize(path) - lost))
    for name, spoil in SPOILT.items():
        shutil.copytree(root / "tied", root / name)
        spoil(root / name)
    for name, text in FILES.items():
        (root / name).write_text(text)
    return root


def setting(file: str, **values):
    """A change of a JSON file in a model folder."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, folder / "model.safetensors", {"format": "pt"})


SPOILT = {  # folder: what is done to a copy of the model
    "lost": without_tensor, "wide": setting("config.json", intermediate_size=128), "quantized": setting("config.json", quantization_config=dict(quant_method="fp8")),
    "garbled": lambda folder: (folder / "tokenizer.json").write_text("{}"), "crowd": setting("config.json", vocab_size=20),
    "dumb": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "unspoken": lambda folder: (folder / "generation_config.json").write_text("{"), "gpt": lambda folder: GPT2LMHeadModel(GPT2Config(
        n_embd=8, n_layer=1, n_head=1, vocab_size=21)).save_pretrained(folder),
    "window": lambda folder: MistralForCausalLM(MistralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8,
                                                              vocab_size=21, sliding_window=16)).save_pretrained(folder),
}  # fmt: skip


def start_ranks() -> None:
    if not dist.is_initialized():  # vLLM ends it when it is closed
        dist.init_process_group("gloo", **({} if WORLD > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)))


@pytest.fixture(scope="session", autouse=True)
def helpers(request, root):
    """Processes that work while other tests run; helpers(name) waits for one, and returns what it printed."""
    tests = {"two_ranks": """test_gradient_and_metrics test_named_mutants test_clipped_tokens_are_counted test_every_preset_runs[lite_ppo]
        test_a_forgotten_sync_stops_the_run""".split()}
    tests["vllm"] = ["test_every_preset_runs[grpo]", *(name for name in globals() if name.startswith("test_sampler"))]
    commands = {name: ["-m", "pytest", "-xqrs", *(f"{__file__}::{test}" for test in chosen)] for name, chosen in tests.items()}
    commands["two_ranks"] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *commands["two_ranks"]]
    commands["script"], running = [HERE / "lite_ppo.py", *command_line(root)], {}
    wanted = any("helpers" in inspect.signature(item.function).parameters for item in request.session.items)
    for name, command in commands.items() if wanted else ():
        environment = os.environ | {"TEST_ROOT": str(root), "TEST_ENGINE": "vllm" if name == "vllm" else "transformers"}
        running[name] = subprocess.Popen([sys.executable, *command], stdout=open(root / name, "w"), stderr=subprocess.STDOUT, cwd=root, env=environment)

    def finish(name: str) -> str:
        assert running[name].wait(timeout=300) == 0, (root / name).read_text()[-8000:]
        return (root / name).read_text()

    yield finish
    [process.terminate() for process in running.values()]  # torchrun passes it on to the ranks


def config(root: Path, **changes) -> Config:
    return Config(**dict(
        model=f"{root}/tied", train_data=f"{root}/train.jsonl", eval_data=(f"{root}/dev.jsonl",), reward=f"{root}/rewards.py:even", lr=1e-3, warmup_steps=0,
        sampler="transformers", prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=12, steps=2, minibatches=2, micro_batch_tokens=100,
        eval_samples=2, eval_pass_k=2, reward_workers=1, max_num_seqs=64, activation_checkpointing=False, samples_per_step=16,
    ) | changes)  # fmt: skip


def predictions(model, prompt: list[int], tokens, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens, and of the whole vocabulary [length, V]; this sequence alone, no cache, no packing."""
    logits = model(torch.tensor([[*prompt, *map(int, tokens)]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logprobs := (logits / temperature).log_softmax(-1))[range(len(tokens)), torch.as_tensor(tokens).long()], logprobs


def read(path, *without: str) -> list[dict]:
    """The rows of a JSONL file, without the keys that start so."""
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(without)} for line in Path(path).read_text().splitlines()]


# ---- the gradient: any split, any number of ranks, and the formulas --------------------------------------------------

LENGTHS, PROMPTS = [1, 5, 12, 3, 12, 8, 2, 7, 4], [4, 1, 6, 2, 3, 9, 5, 1, 7]
CUT = (2, 5)  # truncated; number 4 is as long as the limit, but ends with an end-of-sequence token
CASES = {  # name: responses, settings
    **{f"{level}{' filtered' * cut}": (range(9), dict(loss_level=level, overlong_filter=cut)) for level in ("token", "sequence", "constant") for cut in (0, 1)},
    "one step": (range(9), dict(minibatches=1)), "a single EOS": ([0], dict(minibatches=1)), "fewer responses than ranks": ([3], dict(minibatches=1)),
    "a rank with nothing to train": ([0, 2], dict(minibatches=1, overlong_filter=True)), "nothing": ([2, 5], dict(minibatches=1, overlong_filter=True)),
    "everything on": (range(9), dict(minibatches=3, temperature=0.7, clip_high=0.28, dual_clip=1.3, kl_coef=0.3, tis_cap=1.2)),
}  # fmt: skip
RATE = 0.1  # of the plain gradient steps between mini-batches: enough to clip


def the_case(case: str, root: Path, **changes) -> tuple[Config, list[Response], torch.Tensor]:
    """Settings, responses, advantages."""
    draw, responses = torch.Generator().manual_seed(5), []
    for i, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS)):
        tokens = torch.randint(2, 21, (prompt + length,), generator=draw).tolist()
        tokens[-1] = tokens[-1] if i in CUT else 1
        logprobs = torch.randn(length, generator=draw).sub(3).numpy()  # of no sampler; only tis_cap looks at them
        responses.append(Response(Problem({}, tokens[:prompt]), np.array(tokens[prompt:], np.int32), logprobs, i in CUT, "", 0.0, ""))
    advantages, (which, options) = torch.tensor([0.9, -1.1, 0.7, -0.4, 1.3, -0.8, 0.5, -0.6, 1.0]), CASES[case]
    cfg = config(root, **dict(lr=RATE, max_logprob_gap=1e9, max_grad_norm=1e9) | options | changes)
    return cfg, [responses[i] for i in which], advantages[list(which)]


def run_update(case: str, root: Path, mistake: str = "", **changes) -> tuple[list[dict], dict]:
    """Gradients of every optimizer step, and metrics; of update() as it is, or with a mistake."""
    (cfg, responses, advantages), gradients = the_case(case, root, activation_checkpointing=case == "token", **changes), []
    policy, reference = (build_policy(cfg, cfg.model, CPU, trainable) for trainable in (True, False))
    optimizer, scope = torch.optim.SGD(policy.parameters()), dict(vars(lite_ppo))
    optimizer.register_step_pre_hook(lambda *_: gradients.append({name: p.grad.full_tensor().clone() for name, p in policy.named_parameters()}))
    if mistake:
        (_, right, wrong), source = (MUTANTS | UNCOUNTED)[mistake], inspect.getsource(make_pack) + inspect.getsource(lite_ppo.update)
        assert right in source, f"the line of the mutant {mistake!r} has changed"
        exec(source.replace(right, wrong), scope)
    metrics, clipped = scope["update"](policy, reference, optimizer, responses, advantages, 7, cfg, Clock())
    return gradients, metrics | {f"{side} {token}": int(n) for side, counts in zip(("low", "high"), clipped) for token, n in enumerate(counts)}


@functools.cache
def expected(case: str, root: Path) -> tuple[list[dict], dict]:
    """The same from the formulas: float64, one sequence at a time, one token at a time."""
    (cfg, responses, advantages), model = the_case(case, root), load_model(root / "tied", dtype=torch.float64)
    now = lambda r: predictions(model, r.problem.prompt_ids, r.token_ids, cfg.temperature)  # noqa: E731
    old = [now(r)[0].detach() for r in responses]  # the reference model's, too
    gradients, losses, sums, clipped = [], [], np.zeros(6), {f"{side} {token}": 0 for side in ("low", "high") for token in range(21)}
    for members in np.array_split(lite_ppo.permutation(len(responses), cfg.seed, "minibatches", 7), cfg.minibatches):
        kept = [i for i in members if not (cfg.overlong_filter and responses[i].truncated)]
        tokens, total = sum(len(responses[i].token_ids) for i in kept), torch.zeros((), dtype=torch.float64, requires_grad=True)
        for i in members:
            A, (logprobs, full) = advantages[i].item(), now(responses[i])
            for t in range(len(logprobs)):
                ratio, kl = (logprobs[t] - old[i][t]).exp(), (old[i][t] - logprobs[t]).exp() - (old[i][t] - logprobs[t]) - 1
                objective = max(min(ratio * A, min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high) * A), cfg.dual_clip * A if cfg.dual_clip and A < 0 else -99)
                objective = objective * (min(math.exp(old[i][t] - responses[i].logprobs[t]), cfg.tis_cap) if cfg.tis_cap else 1)
                if i in kept:
                    count = {"token": tokens, "sequence": len(kept) * len(logprobs), "constant": len(kept) * 12}[cfg.loss_level]
                    total = total + (cfg.kl_coef * kl - objective) / count
                rho, entropy = ratio.item(), -(full[t].exp() * full[t]).sum().item()
                low, high = A < 0 and rho < 1 - cfg.clip_low, A > 0 and rho > 1 + cfg.clip_high
                sums += [1, entropy, low, high, rho - 1 - math.log(rho), kl.item() * (cfg.kl_coef > 0)]
                clipped[f"low {responses[i].token_ids[t]}"] += low
                clipped[f"high {responses[i].token_ids[t]}"] += high
        total.backward()
        gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
        losses.append(total.item())
        model.zero_grad()
        with torch.no_grad():
            [p.sub_(RATE * gradients[-1][name]) for name, p in model.named_parameters()]
    names = ("entropy", "clip_low", "clip_high", "approx_kl", "reference_kl")
    averages = {f"policy/{name}": value for name, value in zip(names, sums[1:] / sums[0])}
    return gradients, averages | clipped | {"policy/loss": np.mean(losses), "policy/skipped": 0}


def difference(gradients: list[dict], truth: list[dict]) -> float:
    """Largest distance of a step's gradient from the truth, relative to the truth."""
    assert [g.keys() for g in gradients] == [t.keys() for t in truth]
    norm = lambda tensors: torch.cat([x.double().flatten() for x in tensors]).norm().item()  # noqa: E731
    return max(norm(g[name] - t[name] for name in t) / (norm(t.values()) or 1) for g, t in zip(gradients, truth))


@pytest.mark.parametrize("case", CASES)
def test_gradient_and_metrics(case, root):
    truth, metrics = expected(case, root)  # whatever the micro-batches, on one rank or two
    for gradients, found in (run_update(case, root, micro_batch_tokens=budget) for budget in (12, 10**6)):
        assert difference(gradients, truth) <= 1e-5
        assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-6)


MUTANTS = {  # mistake: the case that notices it, a part of update() or make_pack(), and what it becomes
    "averaged over ranks": ("token", "loss * world", "loss"),
    "normalised by the micro-batch": ("token", "(per_token(weights, pack) * token_loss).sum()", "token_loss.mean() / len(packs) / world"),
    "weights of the whole step": ("token", "weights[members] = tricks.loss_weights(lengths[members], cfg.loss_level, keep[members]",
                                  "weights = tricks.loss_weights(lengths, cfg.loss_level, keep"),
    "filter ignored": ("token filtered", "keep[members]", "None"),
    "filtered by length": ("token filtered", "r.truncated", "len(r.token_ids) == 12"),
    "old log-probs with gradient": ("token", "logprobs.detach()", "logprobs"),
    "old log-probs of the moved weights": ("token", "(logprobs, pack.old_logprobs,", "(logprobs, logprobs.detach(),"),
    "advantage of the next response": ("token", "per_token(advantages, pack)", "per_token(advantages.roll(1), pack)"),
    "end of sequence not trained": ("a single EOS", "per_token(weights, pack) *", "per_token(weights, pack) * (pack.targets != 1) *"),
    "temperature forgotten": ("everything on", "policy.response_logprobs(pack, cfg.temperature)", "policy.response_logprobs(pack, 1.0)"),
    "predicted one token too early": ("token", "s + len(prompt) - 1, s + n", "s + len(prompt) - 2, s + n - 1"),
    "KL forgotten": ("everything on", "cfg.kl_coef * kl", "0 * kl"),
}
UNCOUNTED = {  # the same, of the tokens that are clipped
    "sides swapped": ("token", "zip(clipped, (low, high))", "zip(clipped, (high, low))"),
    "the token before": ("token", "side.index_add_(0, pack.targets,", "side.index_add_(0, pack.targets.roll(1),"),
    "of this rank": ("token", "    dist.all_reduce(clipped)\n", ""),
    "of the last micro-batch": ("token", "for side, mask in zip(clipped,", "clipped.zero_()\n                    for side, mask in zip(clipped,"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", [mistake for mistake in MUTANTS if WORLD > 1 or "ranks" not in mistake])
def test_named_mutants(mistake, root):
    assert difference(run_update(MUTANTS[mistake][0], root, mistake, micro_batch_tokens=12)[0], expected(MUTANTS[mistake][0], root)[0]) > 1e-3


@pytest.mark.parametrize("mistake", [mistake for mistake in UNCOUNTED if WORLD > 1 or "rank" not in mistake])
def test_clipped_tokens_are_counted(mistake, root):
    case = UNCOUNTED[mistake][0]
    truth = {key: n for key, n in expected(case, root)[1].items() if key.startswith(("low ", "high "))}
    of = lambda metrics: {key: metrics[key] for key in truth}  # noqa: E731
    assert of(run_update(case, root, micro_batch_tokens=12)[1]) == truth != of(run_update(case, root, mistake, micro_batch_tokens=12)[1])


def test_the_cases_exercise_what_they_should_and_gradients_are_clipped_or_skipped(root, monkeypatch):
    assert min(expected("token", root)[1][f"policy/{name}"] for name in ("clip_low", "clip_high")) > 0.05 > expected("one step", root)[1]["policy/clip_low"]
    (gradient,), metrics = run_update("one step", root, max_grad_norm=0.01)
    assert torch.stack([g.norm() for g in gradient.values()]).norm() == pytest.approx(0.01, rel=1e-4) and metrics["policy/grad_norm"] > 1
    monkeypatch.setattr(lite_ppo.tricks, "loss_weights", lambda lengths, *_: torch.full((len(lengths),), math.inf))
    gradients, metrics = run_update("token", root)
    assert gradients == [] and metrics["policy/skipped"] == 2


@torch.no_grad()
def test_packed_log_probs_are_those_of_each_sequence_alone(root):
    (cfg, responses, _), model, order = the_case("token", root), load_model(root / "tied"), [3, 0, 8, 1, 7, 2]
    policy, pack = build_policy(cfg, cfg.model, CPU), make_pack(responses, order, CPU)
    logprobs, _ = policy.response_logprobs(pack, 0.7)
    alone = [predictions(model, responses[i].problem.prompt_ids, responses[i].token_ids, 0.7)[0] for i in order]
    assert torch.allclose(logprobs, torch.cat(alone), rtol=0, atol=1e-5)
    every = [(i, token) for i in order for token in responses[i].token_ids]  # of the responses, the last one, too; no padding
    assert list(zip(pack.owner.tolist(), pack.targets.tolist())) == every and len(pack.token_ids) == sum(LENGTHS[i] + PROMPTS[i] - 1 for i in order)
    responses[0].problem.prompt_ids[:] = [20] * 4  # another prompt for the second sequence: no other one notices
    changed, _ = policy.response_logprobs(make_pack(responses, order, CPU), 0.7)
    assert torch.allclose(changed[pack.owner != 0], logprobs[pack.owner != 0], rtol=0, atol=1e-6) and abs(changed - logprobs).max() > 0.01


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80), st.integers(1, 5))
def test_laws_of_micro_batches(lengths, budget, world):
    plan = lite_ppo.plan_micro_batches(lengths, budget, world)
    assert len(plan) == world and len({len(rank) for rank in plan}) == 1 and len(plan[0]) <= math.ceil(len(lengths) / world)
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(len(lengths)))
    assert all(len(micro) <= 1 or sum(lengths[i] for i in micro) <= max([budget, *lengths]) for rank in plan for micro in rank)


# ---- configuration, and mistakes of the caller's ---------------------------------------------------------------------

def test_presets_are_the_published_settings_and_flags_win(root, monkeypatch):
    common = vars(lite_ppo.parse_config(line := ["--train-data", f"{root}/train.jsonl", "--model", f"{root}/tied"]))
    assert common.items() >= dict(
        advantage_mean="group", advantage_std="batch", advantage_eps=1e-6, loss_level="token", clip_low=0.2, clip_high=0.2, dual_clip=0, kl_coef=0, tis_cap=0,
        overlong_filter=False, overlong_buffer=0, dynamic_sampling=False, temperature=1, top_p=1, top_k=0, prompts_per_step=128, group_size=8, lr=1e-6,
    ).items()  # fmt: skip
    raw, group = dict(advantage_mean="none", advantage_std="none"), dict(advantage_std="group")
    differences = {
        "lite_ppo": {}, "paper": dict(temperature=0.99, top_p=0.99, top_k=100), "reinforce": dict(raw, loss_level="sequence"),
        "grpo": dict(group, loss_level="sequence", kl_coef=0.04), "dr_grpo": dict(advantage_std="none", loss_level="constant"),
        "dapo": dict(group, clip_high=0.28, dynamic_sampling=True, overlong_filter=True, overlong_buffer=0.2),
        "rloo": dict(raw, advantage_mean="leave_one_out", loss_level="sequence"),
    }  # fmt: skip
    assert differences.keys() == lite_ppo.PRESETS.keys()
    for preset, changes in differences.items():
        assert vars(lite_ppo.parse_config([*line, "--preset", preset])) == common | changes | {"preset": preset}
    monkeypatch.setitem(lite_ppo.TOY, "clip_high", 0.5)  # flag > preset > toy
    values = [lite_ppo.parse_config(f"--model toy:large {more}".split()).clip_high for more in ("", "--preset dapo", "--clip-high 0.3 --preset=dapo")]
    toys = lite_ppo.parse_config(["--preset", "dapo", "--no-dynamic-sampling", "--steps", "3"])
    assert values == [0.5, 0.28, 0.3] and (toys.dynamic_sampling, toys.overlong_filter, toys.steps, toys.lr) == (False, True, 3, lite_ppo.TOY["lr"])


@pytest.mark.parametrize("mistake,named", [  # a flag; what the message must name
    ("--groups 3", "--groups"), ("--preset ppo2", "--preset ppo2 dr_grpo"), ("--steps many", "--steps many"), ("--group-size 1", "--group-size 1 2 responses"),
    ("--clip-low -0.1", "--clip-low -0.1 at least 0"), ("--top-p 1.5", "--top-p 1.5 at most 1"), ("--temperature 0", "--temperature 0.0 positive"),
    ("--reward-low 2", "--reward-high 1.0 above --reward-low 2.0"), ("--minibatches 9999", "--minibatches 9999 responses per step"),
    ("--eval-pass-k 8", "--eval-pass-k 8 --eval-samples 4"), ("--train-data ", "--train-data missing JSONL"), ("--model ROOT/none", "--model ROOT/none"),
    ("--train-data ROOT/none.jsonl", "ROOT/none.jsonl No such file"), ("--train-data toy:extreme", "--train-data extreme easy, medium, hard"),
    ("--train-data ROOT/syntax.jsonl", "ROOT/syntax.jsonl:3 JSON object"), ("--train-data ROOT/list.jsonl", "ROOT/list.jsonl:1 problem"),
    ("--eval-data ROOT/unanswered.jsonl", "ROOT/unanswered.jsonl:2 answer None"), ("--train-data ROOT/empty.jsonl", "ROOT/empty.jsonl no problems"),
    ("--train-data ROOT/long.jsonl", "ROOT/long.jsonl --max-prompt-tokens 16"), ("--eval-data ROOT/mixed.jsonl", "ROOT/mixed.jsonl --max-prompt-tokens 16 1"),
    ("--model nobody/nothing", "--model nobody/nothing"), ("--model toy:huge", "--model toy:huge small, large"), ("--model ROOT/hollow", "--model ROOT/hollow"),
    ("--model ROOT/weightless", "ROOT/weightless safetensors"), ("--model ROOT/silent", "--model ROOT/silent chat_template.jinja"),
    ("--model ROOT/cut", "--model ROOT/cut model.safetensors bytes instead of"), ("--model ROOT/stub", "--model ROOT/stub no whole safetensors file"),
    ("--model ROOT/lost", "--model ROOT/lost: 1 of its 24 tensors model.layers.1.mlp.up_proj.weight missing instead of"),
    ("--model ROOT/wide", "--model ROOT/wide (96, 64) instead of (128, 64)"), ("--model ROOT/quantized", "--model ROOT/quantized quantization_config not supported"),
    ("--model ROOT/garbled", "--model ROOT/garbled: does not load"), ("--model ROOT/crowd", "--model ROOT/crowd tokenizer has 21 tokens, config.json 20"), ("--model ROOT/dumb", "--model ROOT/dumb tokenizer.json missing?"),
    ("--model ROOT/unspoken", "--model ROOT/unspoken: does not load"), ("--model ROOT/gpt", "--model ROOT/gpt GPT2LMHeadModel has no list of layers"),
    ("--model ROOT/window", "--model ROOT/window sliding_window not supported"), ("--eval-data ROOT/no=3/t.jsonl", "--eval-data: ROOT/no=3/t.jsonl No such file"),
    ("--max-new-tokens 60", "--model ROOT/tied 64 --max-new-tokens 76"), ("--tensor-parallel-size 2", "--tensor-parallel-size 2 ranks"),
    ("--reward accuracy", "--reward accuracy FILE.py:FUNCTION"), ("--reward ROOT/none.py:f", "--reward ROOT/none.py:f FILE.py:FUNCTION"),
    ("--reward ROOT/rewards.py:odd", "--reward ROOT/rewards.py:odd 'odd'"), ("--reward ROOT/syntax.py:f", "--reward ROOT/syntax.py:f SyntaxError"),
    ("--output-dir ROOT/train.jsonl", "--output-dir ROOT/train.jsonl"),
])  # fmt: skip
def test_a_mistake_is_named_in_one_message(mistake, named, root, monkeypatch, capfd):
    flag, value = mistake.replace("ROOT", str(root)).split(" ")
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py", *command_line(root, **{"--output-dir": f"{root}/mistakes", flag: value})])
    monkeypatch.setattr(lite_ppo, "connect", lambda cfg: None)  # it is, and stays so
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with pytest.raises(SystemExit) as end:
        sys.exit(lite_ppo.main())
    out = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert end.value.code == 2 and "Traceback" not in out and out.count("error: ") <= 1, out
    assert all(word in out for word in named.replace("ROOT", str(root)).split()), out


def test_a_port_in_use_or_none_at_all_is_named_in_one_message_at_once(monkeypatch, capfd):
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py"])
    with socket.socket() as other:  # another run's
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for value, named in {port: "EADDRINUSE", "http": "invalid literal", "99999": "65535"}.items():
            [monkeypatch.setenv(name, text) for name, text in dict(one_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=value).items()]
            assert lite_ppo.main() == 2  # rank 0 opens the port itself: nothing to wait for
            err = capfd.readouterr().err
            assert err.startswith(f"error: MASTER_ADDR 127.0.0.1, MASTER_PORT {value}: ") and err.count("\n") == 1, err
            assert named in err and err.rstrip().endswith("is another run using the port? torchrun --master-port takes another"), err


def test_a_disk_with_too_little_room_is_named_before_models_load(root, tmp_path, monkeypatch):
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [10, 10**8], "data_offsets": [0, 2 * 10**9]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "model.safetensors", 8 + len(header) + (final := 2 * 10**9))  # a hole: it takes no room
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "dtype": "bfloat16"}')
    folder, free = tmp_path / "run", [0]
    (folder / "partial-7").mkdir(parents=True)
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]) if path == folder else None)
    for options, count, need in (((0, 2, 10), 0, 1.86), ((1, 2, 10), 3, 35.39), ((4, 2, 10), 3, 35.39), ((5, 2, 10), 2, 24.21), ((1, 1, 10), 2, 24.21), ((20, 2, 10), 1, 13.04)):
        cfg = Config(**dict(zip(("save_every", "keep_checkpoints", "steps"), options)))
        for held in (0, 700):  # of a run that was killed: deleted at the start
            (folder / "partial-7/half").write_bytes(bytes(held))
            free[0] = final + count * 12 * 10**9 - held  # 10^9 weights and two moments of each, in float32
            rundir.check_space(folder, str(tmp_path), cfg)
            free[0] -= 1
            with pytest.raises(data.UserError) as error:
                rundir.check_space(folder, str(tmp_path), cfg)
            assert f"--output-dir {folder}: {need:.2f} GiB free, and this run needs {need:.2f}: 1.86 for the final model" in str(error.value)
            assert f"11.18 for each of {count} checkpoints. Make room" in str(error.value)
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(samplers, "build_model", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(data.UserError, match="--output-dir .*/crowded: 0.00 GiB free, and this run needs 0.00: 0.00 for the final model"):
        lite_ppo.train(config(root, output_dir=str(root / "crowded")))


def test_300_fuzzed_configurations_run_or_name_the_culprit(root, monkeypatch, capfd, tmp_path):
    """Every sixth of the valid ones is really run, or all of them with FUZZ=all in the environment."""
    rng, train, ends, ran = random.Random(7), lite_ppo.train, [], 0
    numbers = ["-1", "0", "1", "2", "3", "0.5", "1.5", "1e-3", "-0.1", "nan", "inf", "-inf", "1e30", "9" * 40, "", "many", "0x10", "1,5", "True"]
    texts = ["", "x", "auto", f"{root}/dev.jsonl", f"{root}/none.jsonl", f"{root}/tied", f"{root}/syntax.py:f", "a/b/c", "toy:huge", "easy ", "-", "\u2028", "a" * 300]
    choose = samplers.choose_sampler
    monkeypatch.setattr(samplers, "choose_sampler", lambda wanted: choose(wanted.replace("auto", "transformers")))  # vLLM changes the process that it lives in
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lite_ppo, "connect", lambda cfg: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for i in range(300):
        line = command_line(root, **{"--steps": "1", "--prompts-per-step": "2", "--group-size": "2", "--output-dir": f"{tmp_path}/{i}", "--eval-every": "0"})
        fuzzed = rng.sample(dataclasses.fields(Config), rng.choice([1, 1, 2, 3]))
        for field in fuzzed:
            flag, choices = "--" + field.name.replace("_", "-"), list(typing.get_args(field.type)) if "Literal" in str(field.type) else []
            if field.type is bool:
                line += [rng.choice([flag, flag.replace("--", "--no-", 1)])] + rng.choice([[], [], ["maybe"]])
            else:
                pool = [c for c in choices if c != "vllm"] * 2 + ["nonsense"] if choices else numbers if field.type in (int, float) else texts
                line += [flag, rng.choice(pool)] if rng.random() < 0.97 else [flag]
        really = os.environ.get("FUZZ") == "all" or i % 6 == 0
        monkeypatch.setattr(lite_ppo, "train", train if really else lambda cfg: None)
        monkeypatch.setattr(sys, "argv", ["lite_ppo.py", *line])
        try:
            code = lite_ppo.main()
        except SystemExit as end:
            code = end.code
        out = " ".join(capfd.readouterr().err.replace("│", " ").split())
        assert code in (0, 1, 2) and "Traceback" not in out, f"{line[34:]} {code} {out[-1500:]}"
        named = ["--" + field.name.replace("_", "-") for field in fuzzed] + ["Unrecognized options: maybe"]
        assert code == 0 or any(name in out for name in named), f"{line[34:]} {code} {out[-1500:]}"
        ends, ran = ends + [code], ran + (really and code == 0)
    assert ends.count(0) > 50 and ends.count(2) > 50 and ran > 10, (ends.count(0), ends.count(1), ends.count(2), ran)


# ---- whole runs ------------------------------------------------------------------------------------------------------

METRICS = """step reward/mean reward/std reward/solve_all reward/solve_none response/length_mean response/length_max response/truncated response/looping
policy/loss policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm policy/lr rollout/logprob_gap_mean rollout/logprob_gap_max
time/rollout time/reward time/slowest_reward time/logprobs time/update time/sync time/step perf/rollout_tokens_per_s perf/train_tokens_per_s perf/peak_memory_gib""".split()


def command_line(root: Path, **flags: str) -> list[str]:
    line = f"""--model {root}/tied --train-data {root}/train.jsonl --eval-data {root}/dev.jsonl --reward {root}/rewards.py:sevens --sampler transformers
        --steps 16 --prompts-per-step 8 --group-size 8 --minibatches 2 --max-prompt-tokens 16 --max-new-tokens 4 --lr 3e-3 --warmup-steps 4 --eval-every 10
        --samples-per-step 64 --reward-workers 1""".split()
    return [part for pair in (dict(zip(line[::2], line[1::2])) | flags).items() for part in pair]


def test_the_script_learns_and_writes_everything_down(helpers, root):
    printed, (folder,) = helpers("script"), (root / "runs").glob("tied-lite_ppo-seed42-*")
    rows, samples = read(folder / "metrics.jsonl"), read(folder / "samples.jsonl")
    assert [row["step"] for row in rows] == list(range(17)) and all(math.isfinite(value) for row in rows for value in row.values())
    assert all(set(METRICS) <= row.keys() for row in rows[1:])
    evaluation = {f"eval/dev/{key}" for key in ("accuracy", "pass_at_k", "length_mean", "truncated")}
    assert [row["step"] for row in rows if evaluation <= row.keys()] == [row["step"] for row in rows if evaluation & row.keys()] == [0, 10, 16]
    assert [row["policy/lr"] for row in rows[1:6]] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3])
    assert rows[1]["reward/mean"] < 0.2 and np.mean([row["reward/mean"] for row in rows[-3:]]) > 0.5  # it learns
    assert f"dev: accuracy {rows[0]['eval/dev/accuracy']:.3f} -> {rows[-1]['eval/dev/accuracy']:.3f}" in printed and str(folder.relative_to(root)) in printed
    golds = {row["problem"]: row["answer"] for row in read(root / "train.jsonl")}
    for s in samples:
        assert s["gold"] == golds[s["prompt"]] and s["reward"] == (s["response"][:1] == "7") and s["truncated"] <= (s["length"] == 4) and s["failure"] == ""
    rewards, advantages = (np.array([s[key] for s in samples]).reshape(16, 8, 8) for key in ("reward", "advantage"))
    std = rewards.std((1, 2), ddof=1, keepdims=True)
    assert np.allclose(advantages, (rewards - rewards.mean(2, keepdims=True)) / (std + 1e-6), atol=1e-5)  # trick 1, end to end
    within = np.sqrt(((rewards - rewards.mean(2, keepdims=True)) ** 2).mean((1, 2)))
    assert [row["reward/std_within"] for row in rows[1:]] == pytest.approx(within.tolist()) and {row["rollout/responses"] for row in rows[1:]} == {64}
    clipped = {row["step"]: row for row in read(folder / "clipped.jsonl")}
    for row in rows[1:]:  # the counts of the tokens are the clip fractions
        for side in ("low", "high"):
            counts = [n for _, n in clipped.get(row["step"], {}).get(side, [])]
            assert sum(counts) == round(row[f"policy/clip_{side}"] * row["response/length_mean"] * 64) and counts == sorted(counts, reverse=True)
    assert len(clipped) > 8 and {token for row in clipped.values() for token, _ in row["low"] + row["high"]} <= {*"0123456789+=?}\n", "\\boxed{", *toy.SPECIAL}
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(vars(lite_ppo.parse_config(command_line(root)))))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and list(folder.glob("events.out.tfevents*"))


@pytest.mark.parametrize("preset", lite_ppo.PRESETS)
def test_every_preset_runs(preset, root):
    model, folder = root / ("untied" if preset in ("paper", "grpo") else "tied"), root / f"{preset}-{WORLD}-{ENGINE}"
    lite_ppo.train(config(root, **lite_ppo.PRESETS[preset] | dict(preset=preset, model=str(model), sampler=ENGINE, output_dir=str(folder))))
    rows, (before, after) = read(folder / "metrics.jsonl"), (load_model(path).state_dict() for path in (model, folder / "final"))
    assert [row["step"] for row in rows] == [0, 1, 2] and all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0 == row["policy/skipped"] and (preset == "paper" or row["rollout/logprob_gap_max"] < 1e-4)
    assert (rows[2]["policy/reference_kl"] > 0) == (preset == "grpo")
    for s in read(folder / "samples.jsonl"):  # DAPO: the last fifth of the 12 tokens, 3, cost up to 1
        assert s["reward"] == pytest.approx((len(s["response"]) % 2 == 0) + (min(0, max(-1, (9 - s["length"]) / 3)) if preset == "dapo" else 0))
    assert before.keys() == after.keys() and all(1e-5 < (after[name] - before[name]).abs().max() < 0.1 for name in before)


def test_two_ranks_pass_the_same_tests_and_train_as_one(helpers, root):
    helpers("two_ranks")
    if not (root / "lite_ppo-1-transformers").exists():
        test_every_preset_runs("lite_ppo", root)
    for file, without in {"metrics.jsonl": ("time/", "perf/", "memory/"), "samples.jsonl": ("prompt", "response", "gold", "failure", "time/")}.items():
        one, two = (read(root / f"lite_ppo-{ranks}-transformers" / file, *without) for ranks in (1, 2))
        assert len(one) == len(two) and all(b == pytest.approx(a, rel=1e-3, abs=1e-5) for a, b in zip(one, two))


def test_vllm_passes_the_same_tests(helpers):
    printed = helpers("vllm")
    if " passed" not in printed:
        pytest.skip(printed.split(": ", 1)[1].split("\n")[0])  # the reason


def test_a_resumed_run_is_the_uninterrupted_one_and_the_final_folder_the_trainers_model(root):
    whole, resumed, options = root / "whole", root / "resumed", dict(steps=4, save_every=1, eval_every=1)
    lite_ppo.train(config(root, output_dir=str(whole), **options))
    assert sorted(path.name for path in whole.glob("*-*")) == ["checkpoint-3", "checkpoint-4"]  # keep_checkpoints
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    (resumed / "partial-4").mkdir()  # killed while it saved; the logs are ahead of the checkpoint
    lite_ppo.train(config(root, output_dir=str(resumed), **options))
    model, again = load_model(whole / "final"), load_model(resumed / "final").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items()) and samplers.load_tokenizer(whole / "final", 40)[1] == EOS
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read(whole / file, "time/", "perf/", "memory/") == read(resumed / file, "time/", "perf/", "memory/")  # each step once, with the same numbers
    (cfg, responses, _), policy = the_case("token", root), build_policy(config(root), f"{root}/tied", CPU)
    assert lite_ppo.load_checkpoint(whole / "checkpoint-4", policy, torch.optim.AdamW(policy.parameters())) == rundir.Position(4, 16, None)
    with torch.no_grad():
        alone = [predictions(model, r.problem.prompt_ids, r.token_ids)[0] for r in responses]
        assert torch.allclose(policy.response_logprobs(make_pack(responses, range(9), CPU), 1.0)[0], torch.cat(alone), rtol=0, atol=1e-5)


def test_a_run_that_left_no_checkpoint_begins_anew_and_logs_each_step_once(root):
    for _ in range(2):
        lite_ppo.train(config(root, output_dir=str(root / "anew"), steps=1))
        shutil.rmtree(root / "anew/final")  # as if it had not come so far
    assert [row["step"] for row in read(root / "anew/metrics.jsonl")] == [0, 1] and len(read(root / "anew/samples.jsonl")) == 16


def test_a_forgotten_sync_stops_the_run(root, monkeypatch):
    load, loads = samplers.TransformersSampler.load_weights, []
    monkeypatch.setattr(samplers.TransformersSampler, "load_weights", lambda self, weights: loads or loads.append(load(self, weights)))  # the first time only
    with pytest.raises(guard.RunError, match="differ by .* --max-logprob-gap 0.001: the sampler does not hold the trainer's weights"):
        lite_ppo.train(config(root, lr=1e-2, output_dir=f"{root}/forgetful"))


def test_a_checkpoint_goes_on_with_other_ranks_hybrid_sharding_and_never_with_other_settings(root, monkeypatch, capfd):
    options = dict(save_every=2, keep_checkpoints=9, eval_every=0, max_grad_norm=0.5)
    lite_ppo.train(config(root, output_dir=str(root / "one_first"), steps=2, **options))
    code = "import lite_ppo, test_lite_ppo as t, pathlib; t.start_ranks(); root = pathlib.Path(t.os.environ['TEST_ROOT'])\n"
    for folder, more in {"one_first": dict(steps=7, shard_ranks=1), "two_first": dict(steps=2)}.items():
        code += f"lite_ppo.train(t.config(root, output_dir=str(root / '{folder}'), **{options | more}))\n"
    (root / "tied" / "resharded.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{root}/tied/resharded.py"]
    two = subprocess.run(launcher, capture_output=True, text=True, env=os.environ | {"TEST_ROOT": str(root), "PYTHONPATH": str(HERE)})
    assert two.returncode == 0, two.stderr[-6000:]
    lite_ppo.train(config(root, output_dir=str(root / "two_first"), steps=7, **options))
    lite_ppo.train(config(root, output_dir=str(root / "one"), steps=7, **options))
    out = two.stdout + capfd.readouterr().out
    assert all(f"resumed from {root}/{folder}/checkpoint-2, 2 of 7 steps done" in out for folder in ("one_first", "two_first"))

    def distance(folder):
        found, truth = (load_model(root / name / "final").state_dict() for name in (folder, "one"))
        return max((found[name] - truth[name]).abs().max().item() for name in truth)

    for folder in ("two_first", "one_first"):  # 2 -> 1 rank, and 1 -> 2 ranks, each of which holds all of the model
        assert distance(folder) <= 1e-6
        said = [[row["response"] for row in read(root / run / "samples.jsonl")] for run in (folder, "one")]  # all of them
        assert said[0] == said[1] and len(said[0]) == 7 * 16
        assert [row["step"] for row in read(root / folder / "metrics.jsonl")] == list(range(8))
    with monkeypatch.context() as mutant:  # optimizer state forgotten
        mutant.setattr(lite_ppo, "load_checkpoint", lambda *args: (rundir.load_checkpoint(*args), args[-1].state.clear())[0])
        lite_ppo.train(config(root, resume=f"{root}/one/checkpoint-2", output_dir=str(root / "amnesia"), steps=7, **options))
    assert distance("amnesia") > 1e-4
    for changes, message in {
        "clip_high": (dict(clip_high=0.3), "clip_high: 0.2 -> 0.3"), "lr": (dict(lr=1.0), "lr: 0.001 -> 1.0"), "steps": (dict(steps=3), "--steps 3: .*7 steps"),
        "data": (dict(train_data=f"{root}/dev.jsonl"), "training problems: 10 problems.* -> 1 problems"), "never": (dict(resume="never"), "holds checkpoint-7"),
        "nothing": (dict(resume=f"{root}/tied"), "nor a checkpoint folder"), "older": (dict(resume=f"{root}/one/checkpoint-2"), "holds checkpoint-7, another"),
    }.values():  # fmt: skip
        with pytest.raises(data.UserError, match=message):
            lite_ppo.train(config(root, **dict(output_dir=str(root / "one"), steps=7, **options) | changes))
    (root / "old/checkpoint-3").mkdir(parents=True)
    (root / "old/checkpoint-3/state.json").write_text('{"step": 3, "cursor": 12}')
    with pytest.raises(data.UserError, match="checkpoint-3: not a checkpoint of this version .*config.*move it away"):
        lite_ppo.train(config(root, output_dir=str(root / "old")))
    lite_ppo.train(config(root, resume=f"{root}/one/checkpoint-6", output_dir=str(root / "fork"), steps=7, clip_high=0.3, **options))
    assert [row["step"] for row in read(root / "fork/metrics.jsonl")] == [7]  # with other settings only where it is asked for
    capfd.readouterr()
    lite_ppo.train(config(root, resume=f"{root}/one/checkpoint-6", output_dir=str(root / "fork"), steps=9, clip_high=0.3, **options))  # by the same command
    assert f"resumed from {root}/fork/checkpoint-7, 7 of 9" in capfd.readouterr().out
    with pytest.raises(data.UserError, match="clip_high: 0.3 -> 0.4"):
        lite_ppo.train(config(root, resume=f"{root}/one/checkpoint-6", output_dir=str(root / "fork"), steps=9, clip_high=0.4, **options))
    reward = root / "tied/edited.py"
    reward.write_text(REWARDS)
    lite_ppo.train(config(root, reward=f"{reward}:even", output_dir=str(root / "edited"), **options))
    reward.write_text(REWARDS + "# another grader\n")
    for change, message in ((dict(), "reward file: [0-9a-f]{12} -> "), (dict(dtype="bfloat16"), "dtype in use: torch.float32 -> torch.bfloat16")):
        with pytest.raises(data.UserError, match=message):
            lite_ppo.train(config(root, reward=f"{reward}:even", output_dir=str(root / "edited"), **options, **change))


def test_an_output_directory_is_one_runs_and_nobody_elses_files_are_touched(root, tmp_path, monkeypatch):
    folder, options = tmp_path / "run", dict(steps=1, eval_every=0)
    for name in ("partial_results", "partial-7", "checkpoint-best-2", "checkpoint-old3"):
        (folder / name).mkdir(parents=True)
    (folder / "partial.csv").write_text("mine")
    lite_ppo.train(config(root, output_dir=str(folder), **options))
    assert {path.name for path in folder.iterdir()} >= {"partial_results", "partial.csv", "checkpoint-best-2", "checkpoint-old3", "final", "metrics.jsonl"}
    assert not (folder / "partial-7").exists() and not list(folder.glob(".seen*"))
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(data.UserError, match=f"--output-dir {folder}: holds the final model of a run and no checkpoint"):
        lite_ppo.train(config(root, output_dir=str(folder), seed=7, **options))
    assert (folder / "metrics.jsonl").read_bytes() == before
    with contextlib.ExitStack() as held:
        cfg, alone = config(root, output_dir=str(tmp_path / "shared")), lambda items: items
        rundir.open_folder(cfg, alone, held)
        with pytest.raises(data.UserError, match="shared: another run is using it"):
            lite_ppo.train(cfg)
    rundir.open_folder(cfg, alone, contextlib.ExitStack())  # free again
    monkeypatch.setattr(dist, "get_rank", lambda: 1)  # of another machine, with a disk of its own
    with contextlib.ExitStack() as held, pytest.raises(data.UserError, match=r"ranks \[0\] do not see what rank 0 writes there; give a folder .* all machines share"):
        rundir.open_folder(config(root, output_dir=str(tmp_path / "local")), alone, held, patience=0.2)


def test_the_final_model_has_the_precision_and_the_generation_config_of_the_first(root):
    model = load_model(root / "tied", dtype=torch.bfloat16)
    model.save_pretrained(root / "half")
    toy.make_tokenizer().save_pretrained(root / "half")
    sampling = json.dumps(dict(eos_token_id=EOS, temperature=0.6, top_p=0.9))  # without do_sample: transformers reads it and refuses to write it
    (root / "half/generation_config.json").write_text(sampling)
    lite_ppo.train(config(root, model=f"{root}/half", output_dir=str(root / "halved"), steps=1))
    final = load_file(root / "halved/final/model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16} and (root / "halved/final/generation_config.json").read_text() == sampling
    assert json.loads((root / "halved/final/config.json").read_text())["dtype"] == "bfloat16"
    assert samplers.load_tokenizer(str(root / "halved/final"), 20)[1] == EOS


def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(root, tmp_path, monkeypatch):
    policy = build_policy(config(root), f"{root}/tied", CPU)
    (tmp_path / "state.json").write_text('{"step": 1, "cursor": 4, "pending": null}')
    for error, raised in ((MemoryError(), MemoryError), (RuntimeError("can't allocate memory: 9 GiB"), RuntimeError), (RuntimeError("Connection closed by peer"), RuntimeError), (OSError("cut off"), data.UserError)):
        monkeypatch.setattr(rundir.dcp, "load", lambda *args, error=error, **rest: (_ for _ in ()).throw(error))
        with pytest.raises(raised):
            rundir.load_checkpoint(tmp_path, policy, torch.optim.AdamW(policy.parameters()))


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(root, monkeypatch, capfd):
    write, broken = rundir.dcp.HuggingFaceStorageWriter.write_data, []

    def full_disk(self, *args):
        if any(f"partial-{step}" in str(self.path) for step in broken):
            raise OSError(28, "No space left on device")
        return write(self, *args)

    monkeypatch.setattr(rundir.dcp.HuggingFaceStorageWriter, "write_data", full_disk)
    for background in (True, False):
        folder = root / f"full-{background}"
        run = lambda **more: lite_ppo.train(config(root, output_dir=str(folder), save_every=1, background_save=background, **more))  # noqa: E731,B023
        broken[:] = [2]
        run(steps=3)
        out = capfd.readouterr().out
        assert "warning: checkpoint-2 could not be written" in out and "No space left" in out and "newest whole one: checkpoint-1" in out
        assert [path.name for path in rundir.checkpoints(folder)] == ["checkpoint-1", "checkpoint-3"]
        broken[:] = [4, 5]
        with pytest.raises(guard.RunError, match="checkpoint-5 could not be written .*No space left.*newest whole one: checkpoint-3.*Make room"):
            run(steps=6)
        broken.clear()
        run(steps=6)
        assert not list(folder.glob("partial*")) and [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(7))


@contextlib.contextmanager
def little_room(folder):
    """A disk with room for the logs, but not for a checkpoint; where nobody may mount one, a limit on the size of files."""
    if not os.path.ismount(folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))  # Python ignores the signal: the write fails
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(bytes(free - 400_000))
    yield
    (folder / "ballast").unlink()


@contextlib.contextmanager
def no_permission(folder):
    """Nothing can be made in the folder, not even by root, whose right to ignore that is laid down for a while."""
    libc, header, now, less = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0:
        assert libc.capget(header, now) == 0
        less[:] = now
        less[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE, effective, of this thread and those that it starts
        assert libc.capset(header, less) == 0
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)
        assert os.geteuid() or libc.capset(header, now) == 0


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 16 MiB of its own, where one may be mounted."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], capture_output=True).returncode == 0 if shutil.which("mount") else False
    yield tmp_path
    if mounted:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("trouble,said", [(little_room, "No space left on device|File too large|os error 28|os error 27"), (no_permission, "Permission denied")])
def test_a_disk_that_is_really_full_or_closed_leaves_the_checkpoints_before(trouble, said, background, root, disk, monkeypatch, capfd):
    metrics, stack = rundir.Log.metrics, contextlib.ExitStack()
    run = lambda: lite_ppo.train(config(root, output_dir=str(disk), save_every=1, steps=4, background_save=background))  # noqa: E731
    monkeypatch.setattr(rundir.Log, "metrics", lambda self, step, values: (step == 2 and stack.enter_context(trouble(disk)), metrics(self, step, values))[1])
    with stack, pytest.raises(guard.RunError, match=f"(?s)checkpoint-3 could not be written.*({said}).*newest whole one: checkpoint-1.*Make room or give write"):
        run()
    out = capfd.readouterr().out
    assert "warning: checkpoint-2 could not be written" in out and re.search(said, out), out
    assert [path.name for path in rundir.checkpoints(disk)] == ["checkpoint-1"]
    monkeypatch.setattr(rundir.Log, "metrics", metrics)
    run()
    assert f"resumed from {disk}/checkpoint-1, 1 of 4" in capfd.readouterr().out and not list(disk.glob("partial*"))
    assert [row["step"] for row in read(disk / "metrics.jsonl")] == list(range(5)) and [path.name for path in rundir.checkpoints(disk)] == ["checkpoint-3", "checkpoint-4"]


def test_a_log_that_cannot_be_written_ends_the_run_in_one_message(root, monkeypatch, capfd):
    folder, metrics = root / "logless", rundir.Log.metrics
    monkeypatch.setattr(lite_ppo, "connect", lambda cfg: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py", *command_line(root, **{"--output-dir": str(folder), "--steps": "3", "--save-every": "1"})])

    def full(self, step, values):
        if step == 2:
            (folder / "metrics.jsonl").rename(folder / "kept")
            (folder / "metrics.jsonl").symlink_to("/dev/full")  # to which every write fails
        return metrics(self, step, values)

    monkeypatch.setattr(rundir.Log, "metrics", full)
    assert lite_ppo.main() == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err and "error: rank 0, step 2, " in err, err
    assert "No space left on device; checkpoints are as they were, and the same command goes on from the newest one" in err, err
    (folder / "kept").rename(folder / "metrics.jsonl")
    monkeypatch.setattr(rundir.Log, "metrics", metrics)
    assert lite_ppo.main() == 0 and f"resumed from {folder}/checkpoint-1" in capfd.readouterr().out
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_every_tenth_step_gives_back_what_is_free_and_finds_cycles(root):
    """Else the heap's holes and what hangs in cycles let a long run grow: benchmarks/soak.py."""
    code = """if True:
    import atexit, ctypes, gc, guard, weakref
    atexit.register(lambda: print(gc.get_freeze_count(), "at the end"))  # what is registered first comes last
    libc, resident = ctypes.CDLL(None), lambda: int(open("/proc/self/statm").read().split()[1]) / 256
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    class Node: pass
    gc.disable()
    for call in range(1, 21):
        node = Node()
        node.itself, watched = node, weakref.ref(node)
        del node
        blocks = [libc.malloc(2**16) for _ in range(1600)]
        [ctypes.memset(block, 1, 2**16) for block in blocks]
        [libc.free(block) for block in blocks[::2]]  # 50 MiB of holes
        before = resident()
        guard.tidy()
        print(call, before - resident() > 40, watched() is None, gc.get_freeze_count() > 1000)
        [libc.free(block) for block in blocks[1::2]]"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    calls = [line.split() for line in result.stdout.splitlines()]
    assert calls == [*([str(n), *[str(n in (1, 2, 10, 20))] * 2, "True"] for n in range(1, 21)), ["0", "at", "the", "end"]], result.stdout + result.stderr


def test_the_log_keeps_little_of_old_steps_in_memory_and_curves_all_of_them(tmp_path):
    log, row = rundir.Log(tmp_path, Config(), rundir.Position(pending={})), {"reward/mean": 0.5, "policy/entropy": 1.0, "eval/toy/accuracy": 0.5} | {f"time/{i}": 1.0 for i in range(40)}
    row |= {"response/length_mean": 9.0, "response/truncated": 0.0, "reward/std": 0.1, "reward/failed": 0.0}
    [log.metrics(step, row) for step in range(12)]
    kept = {"step", "reward/mean", "policy/entropy", "eval/toy/accuracy", "response/length_mean"}
    assert [row.keys() == kept for row in log.rows] == [True] * 7 + [False] * 5 and [row["step"] for row in log.rows] == list(range(12))
    assert log.rows[7:] == rundir.read_jsonl(tmp_path / "metrics.jsonl")[7:]
    again = rundir.Log(tmp_path, Config(), rundir.Position(9))  # killed: nothing has been closed
    assert [row["step"] for row in again.rows] == list(range(10)) and [row.keys() == kept for row in again.rows] == [True] * 5 + [False] * 5
    hostile = Response(Problem({"problem": "</pre><script>1</script>", "answer": "1"}, [3]), np.array([1]), np.zeros(1), False, "<img onerror=x>", 0.0, "")
    again.samples(10, [hostile], torch.zeros(1, 1), torch.zeros(1, 1), 1)
    again.metrics(10, row)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Scalars("reward/mean")] == list(range(11))  # each step once, there, too
    text = shown.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("<pre>") and text.endswith("</pre>") and text.count("<") == 2 and "&lt;script&gt;" in text  # nothing that a browser would run


def test_a_gradient_that_is_not_finite_is_skipped_blamed_and_soon_ends_the_run(root, monkeypatch, capfd):
    surrogate, calls = lite_ppo.tricks.clipped_surrogate, []

    def sick(logprobs, *args):
        calls.append(1)
        return surrogate(logprobs, *args) * torch.where(torch.arange(len(logprobs)) == 0, math.nan if len(calls) in (1, 9) or len(calls) > 20 else 1.0, 1.0)

    monkeypatch.setattr(lite_ppo.tricks, "clipped_surrogate", sick)
    folder = root / "sick"
    with pytest.raises(guard.RunError, match="no finite gradient in 2 rollouts in a row .*--max-skipped-steps.*; responses .*samples.jsonl"):
        lite_ppo.train(config(root, output_dir=str(folder), steps=50, max_skipped_steps=2, micro_batch_tokens=1000, samples_per_step=0))
    skipped = [row["policy/skipped"] for row in read(folder / "metrics.jsonl")[1:]]
    assert skipped[0] == 1 and skipped[4] == 1 and sum(skipped) == 3 + (skipped[-1] - 1) and "NaN" not in (folder / "metrics.jsonl").read_text()
    assert "step 1: 1 optimizer step(s) skipped, the gradient is not finite; responses [" in capfd.readouterr().out
    assert {s["failure"] for s in read(folder / "samples.jsonl")} == {lite_ppo.NOT_FINITE}


def test_log_probs_that_are_not_finite_are_no_stale_weights(root, monkeypatch, capfd):
    forward, calls, folder = lite_ppo.response_logprobs, [], root / "forward"

    def sick(model, pack, temperature):
        logprobs, entropy = forward(model, pack, temperature)
        calls.append(1)
        return logprobs * torch.where((pack.owner == 3) & (len(calls) == 2), math.nan, 1.0), entropy

    monkeypatch.setattr(lite_ppo, "response_logprobs", sick)
    lite_ppo.train(config(root, output_dir=str(folder), steps=3, minibatches=1, micro_batch_tokens=1000, samples_per_step=0))
    rows = read(folder / "metrics.jsonl")
    assert [row.get("policy/skipped") for row in rows] == [None, 0, 1, 0] and all(row["rollout/logprob_gap_max"] < 1e-4 for row in rows[1:])
    assert "step 2: 1 optimizer step(s) skipped, the gradient is not finite; responses [3] of the step" in capfd.readouterr().out
    with pytest.raises(guard.RunError, match="does not hold the trainer's weights"):  # the sampler's own must be finite
        pack = make_pack(the_case("a single EOS", root)[1], [0], CPU)
        pack.old_logprobs, pack.rollout_logprobs = torch.zeros(1), torch.tensor([math.nan])
        lite_ppo.check_gap([pack], 1, config(root))


def test_verdicts_that_fail_in_an_evaluation_are_counted_and_logged_once(root, monkeypatch, capfd):
    (root / "tied/moody.py").write_text("def moody(response, row):\n    return float('nan') if len(response) % 3 == 0 and row['answer'] == '2' else 0.0\n")
    options, evaluate = dict(reward=f"{root}/tied/moody.py:moody", steps=2, save_every=1, eval_every=1, eval_samples=8, samples_per_step=0), lite_ppo.evaluate
    folder = root / "moody"
    monkeypatch.setattr(lite_ppo, "evaluate", lambda *args: (evaluate(*args), Clock.step == 1 and (_ for _ in ()).throw(guard.Stopped))[0])
    with pytest.raises(guard.Stopped):  # when it was logged, but its step was not
        lite_ppo.train(config(root, output_dir=str(folder), **options))
    monkeypatch.setattr(lite_ppo, "evaluate", evaluate)
    lite_ppo.train(config(root, output_dir=str(folder), **options))
    shares = [row["eval/dev/failed"] for row in read(folder / "metrics.jsonl")]
    logged = [row for row in read(folder / "samples.jsonl") if row.get("eval") == "dev"]
    assert [sum(row["step"] == step for row in logged) / 8 for step in range(3)] == shares and max(shares) > 0
    assert all("not a finite number" in row["failure"] and len(row["response"]) % 3 == 0 for row in logged)
    assert "of the responses to dev got no verdict and count as wrong: reasons in samples.jsonl" in capfd.readouterr().out


def test_a_run_whose_rewards_fail_ends_with_the_reason(root):
    with pytest.raises(guard.RunError, match="4 of 4 responses got no verdict.*--max-failed-rewards 0.5.*ValueError.*x"):
        play([(0.0, "ValueError: x")] * 4)
    assert play([(0.0, "ValueError: x"), (0.0, "late"), (1, ""), (0, "")])[0] == [0, 0, 1, 0]


def test_slow_verdicts_are_told_by_their_seconds(root):
    (root / "tied" / "late.py").write_text("def late(response, row):\n    while len(response) % 2: pass\n    return 1.0\n")
    lite_ppo.train(config(root, reward=f"{root}/tied/late.py:late", reward_timeout=0.2, max_failed_rewards=1, steps=1, output_dir=str(root / "late")))
    rows = read(root / "late/samples.jsonl")  # all of the step
    assert {row["failure"] for row in rows} == {"", "no verdict within 0.2 s"}
    assert all((row["time/reward"] >= 0.2) == bool(row["failure"]) == len(row["response"]) % 2 for row in rows)
    assert read(root / "late/metrics.jsonl")[1]["time/slowest_reward"] == max(row["time/reward"] for row in rows)


FAULTS = {  # name: what happens on rank 1 of 2, what the message must say
    "hung": ("samplers.TransformersSampler.generate = lambda *a: time.sleep(9999)", "rank 1, step 1, rollout: no progress for --timeout-minutes"),
    "dead": ("lite_ppo.make_pack = lambda *a: os._exit(7)", ["another rank has ended", "exitcode  : 7"]),
    "fails": ("lite_ppo.make_pack = lambda *a: 1 / 0", "rank 1, step 1, step: ZeroDivisionError"),
    "nan": ("c = torch.nn.utils.clip_grad_norm_; torch.nn.utils.clip_grad_norm_ = lambda p, m: (q := list(p), q[0].grad.to_local().fill_(torch.nan), c(q, m))[2]",
            ["no finite gradient in 3 rollouts in a row", "every loss is finite"]),
    "memory": ("lite_ppo.check_gap = lambda *a: torch.empty(2**46)", "rank 1, step 1, update: out of memory; a lower --micro-batch-tokens"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_in_trouble_ends_the_others_soon_and_is_named(fault, root):
    what, said = FAULTS[fault]
    code = f"import os, sys, time, torch, lite_ppo, samplers\nif os.environ['RANK'] == '1':\n    {what}\nsys.exit(lite_ppo.main())"
    (root / "tied" / f"{fault}.py").write_text(code)
    line = command_line(root, **{"--output-dir": f"{root}/{fault}", "--timeout-minutes": "0.4" if fault == "hung" else "5"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{root}/tied/{fault}.py", *line]
    result = subprocess.run(launcher, capture_output=True, text=True, cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=120)
    assert result.returncode == 1 and all(words in result.stderr for words in ([said] if isinstance(said, str) else said)), result.stderr[-6000:]


def test_the_launcher_restarts_a_run_that_goes_on_by_itself(root):
    kill = "lite_ppo.compute_advantages = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if lite_ppo.Clock.step == 3 else whole(*a)"
    code = "import os, signal, sys, lite_ppo\nwhole = lite_ppo.compute_advantages\n"
    code += f"if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10':\n    {kill}\nsys.exit(lite_ppo.main())"
    (root / "tied" / "restarted.py").write_text(code)
    line = command_line(root, **{"--output-dir": f"{root}/restarted", "--steps": "4", "--save-every": "1"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", f"{root}/tied/restarted.py"]
    result = subprocess.run([*launcher, *line], capture_output=True, text=True, cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=200)
    assert result.returncode == 0 and re.search("resumed from .*/restarted/checkpoint-[12], [12] of 4 steps done", result.stdout), result.stderr[-6000:]
    assert [row["step"] for row in read(root / "restarted/metrics.jsonl")] == list(range(5)) and (root / "restarted/final").is_dir()


def test_a_frozen_rank_is_named_by_the_others(root):
    what = "if os.environ['RANK'] == '1':\n    samplers.TransformersSampler.generate = lambda *a: os.kill(os.getpid(), signal.SIGSTOP)"
    code = f"import os, signal, sys, lite_ppo, samplers\n{what}\nsys.exit(lite_ppo.main())"
    command = [sys.executable, "-c", code, *command_line(root, **{"--output-dir": f"{root}/frozen", "--timeout-minutes": "0.4"})]
    with socket.socket() as free:  # no launcher: it would wait half a minute before it kills a frozen process
        free.bind(("127.0.0.1", 0))
        common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), PYTHONPATH=str(HERE))
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | common | dict(RANK=i, LOCAL_RANK=i)) for i in "01"]
    try:
        _, err = ranks[0].communicate(timeout=100)
        assert ranks[0].returncode == 1 and "no progress for --timeout-minutes 0.4; rank 1 is behind, in step" in err, err[-6000:]
    finally:
        [process.kill() for process in ranks]


def test_the_watchdog_lets_a_process_end(root):
    """A thread that comes back from C++ while Python ends would abort the process, after all its work: exit code -6."""
    code = """if True:
    import threading, torch.distributed as dist, guard
    from datetime import timedelta
    asked, store = threading.Event(), dist.HashStore()
    class Slow:
        def set(self, key, value):
            asked.set()
            for _ in range(300):
                try:
                    store.wait(["never"], timedelta(milliseconds=1))
                except dist.DistError:
                    pass
    guard.Clock.since -= 9999  # what came before the watchdog does not count: the process may be a fork of an old one
    guard.watch(60, 0, 2, Slow())
    asked.wait()"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0 and result.stderr == "", result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(number, root):
    folder = root / f"signal-{number}"
    line = command_line(root, **{"--output-dir": str(folder), "--steps": "500", "--eval-every": "1"})
    process = subprocess.Popen([sys.executable, "lite_ppo.py", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    while process.poll() is None and len(read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []) < 3:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    (checkpoint,) = rundir.checkpoints(folder)
    position = json.loads((checkpoint / "state.json").read_text())
    assert f"ended by a signal after step {position['step']}" in out and position["step"] >= 2
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(position["step"] + (position["pending"] is None)))
    line = command_line(root, **{"--output-dir": str(folder), "--steps": str(position["step"] + 1), "--eval-every": "1"})
    again = subprocess.run([sys.executable, "lite_ppo.py", *line], capture_output=True, text=True, cwd=HERE)
    assert again.returncode == 0 and f"resumed from {checkpoint}" in again.stdout, again.stderr
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(position["step"] + 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_start_ends_the_process_at_once_and_quietly(number, root):
    code = "import runpy, sys, time, lite_ppo, samplers\nsamplers.resolve_model = lambda name: (print('loading', flush=True), time.sleep(99))\n"
    code += f"sys.argv[0] = 'lite_ppo.py'\nrunpy.run_path({str(HERE / 'lite_ppo.py')!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code, *command_line(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -number and "Traceback" not in err, err


def test_a_signal_during_an_evaluation_loses_nothing(root, monkeypatch):
    options, evaluate = dict(steps=4, save_every=2, eval_every=1), lite_ppo.evaluate
    lite_ppo.train(config(root, output_dir=str(root / "calm"), **options))
    for _ in range(2):  # the second time while it makes good for the first
        monkeypatch.setattr(lite_ppo, "evaluate", lambda *args: evaluate(*args) if Clock.step != 2 else (_ for _ in ()).throw(guard.Stopped))
        with pytest.raises(guard.Stopped):
            lite_ppo.train(config(root, output_dir=str(root / "stopped"), **options))
        assert json.loads((root / "stopped/checkpoint-2/state.json").read_text())["pending"]["policy/grad_norm"] > 0
        assert [row["step"] for row in read(root / "stopped/metrics.jsonl")] == [0, 1]
    monkeypatch.setattr(lite_ppo, "evaluate", evaluate)
    lite_ppo.train(config(root, output_dir=str(root / "stopped"), **options))
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read(root / "calm" / file, "time/", "perf/", "memory/") == read(root / "stopped" / file, "time/", "perf/", "memory/")
    assert [path.name for path in rundir.checkpoints(root / "stopped")] == ["checkpoint-2", "checkpoint-4"] and not list((root / "stopped").glob("partial*"))


@pytest.mark.parametrize("words,change", {
    "entropy collapse": {"policy/entropy": 0.001}, "entropy explosion": {"policy/entropy": 5.0}, "short responses": {"response/length_mean": 2.0},
    "truncated responses": {"response/truncated": 0.9}, "nothing to learn": {"reward/std": 0.0}, "failing rewards": {"reward/failed": 0.2},
    "": {"policy/entropy": 0.5, "response/length_mean": 30.0},
}.items())  # fmt: skip
def test_collapse_is_told_in_words_and_once(words, change, tmp_path):
    healthy = {"policy/entropy": 1.0, "response/length_mean": 100.0, "response/truncated": 0.1, "reward/std": 0.4, "reward/failed": 0.0}
    log = rundir.Log(tmp_path, Config(), rundir.Position(pending={}))
    news = [text for step in range(30) for text in log.metrics(step, healthy | (change if step >= 10 else {}))]
    assert [text.split(":")[0] for text in news] == [words] * bool(words)
    lost = rundir.Log(tmp_path, Config(), rundir.Position(29))  # goes on after a step whose figures were not finite
    lost.rows[-2] |= {"policy/entropy": None}
    for step in range(30, 37):
        lost.metrics(step, healthy | {"policy/entropy": math.nan if step == 31 else 1.0})


def play(*calls, cursor=0, evaluation=False, **changes):
    """What rollout() or evaluate() makes of these scores, one list for each time that the sampler and the grader are asked."""
    calls, seeds = iter(calls), []
    generate = lambda prompts, given, n: [seeds.append(s) or [Sample(np.array([5, 1]), np.zeros(2), False)] * n[0] for s in given]  # noqa: E731
    grade = lambda texts, rows: setattr(grade, "seconds", [0.0] * len(texts)) or [v if isinstance(v, tuple) else (v, "") for v in next(calls)]  # noqa: E731
    cfg = config(Path(), prompts_per_step=2, group_size=2, **changes)
    problems, tools = [Problem({}, [3, i, 4]) for i in range(20)], (SimpleNamespace(generate=generate), grade, toy.make_tokenizer())
    if evaluation:
        return lite_ppo.evaluate(*tools, {"a": problems[:2], "b": problems[:1]}, cfg)
    responses, cursor = lite_ppo.rollout(*tools, problems, cursor, cfg, Clock())
    assert len(set(seeds)) == len(seeds)  # never the same draw twice
    return [r.score for r in responses], cursor


def test_dynamic_sampling_accuracy_and_pass_at_k():
    dynamic = dict(dynamic_sampling=True, dynamic_rounds=3)
    assert play([0, 0, 1, 0], cursor=6) == ([0, 0, 1, 0], 8)  # off
    assert play([0, 0, 1, 0], [1, 1, 0, 1], **dynamic) == ([1, 0, 0, 1], 4)  # replaced
    assert play([0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], **dynamic) == ([0, 0, 1, 1], 6)  # nothing informative: filled up
    assert play([0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], **dynamic) == ([1, 0, 0, 0], 6)  # half of it
    found = play([1, 0, 0, 0, 1, 1, 0.5, 1], [0, 0, 0, 0], evaluation=True, eval_samples=4, eval_pass_k=2)
    for name, value in {"a/accuracy": 4 / 8, "a/pass_at_k": (3 / 6 + 1) / 2, "a/length_mean": 2, "a/truncated": 0, "b/accuracy": 0, "b/pass_at_k": 0}.items():
        assert found[f"eval/{name}"] == pytest.approx(value)


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_each_epoch_visits_each_problem_once(size, seed):
    epochs = [[lite_ppo.nth_problem(i, seed, size) for i in range(start, start + size)] for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and (size < 8 or epochs[0] != epochs[1] != epochs[2])


# ---- samplers --------------------------------------------------------------------------------------------------------

QUESTIONS = [[3, 7, 4], [3, 8, 16, 9, 4], [3, 10, 16, 11, 16, 12, 4], [3], [3, 13, 16, 14, 4]]


@pytest.fixture(scope="session")
def engine(root):
    """A sampler that holds the weights of a policy, that policy, and a function that asks the sampler: [(question, sample)]."""
    start_ranks()
    cfg, engines = config(root, max_prompt_tokens=20, max_new_tokens=20), {"vllm": samplers.VllmSampler, "transformers": samplers.TransformersSampler}
    sampler = engines[ENGINE](cfg, cfg.model, samplers.load_tokenizer(cfg.model, 40)[1], CPU, torch.float32)
    policy = build_policy(cfg, cfg.model, CPU)
    sampler.load_weights(full_weights(policy, torch.float32))

    def ask(n, tokens, *rest, which=range(5), seed=0):
        groups = sampler.generate([QUESTIONS[i] for i in which], [100 * i + seed for i in which], Sampling(n, tokens, *rest))
        return [(QUESTIONS[i], sample) for i, group in zip(which, groups, strict=True) for sample in group]

    yield sampler, policy, ask
    sampler.close()


def test_sampler_draws_by_seed_or_greedily(engine, root):
    _, _, ask = engine
    (together, backwards), alone = (ask(4, 12, 1.0, which=which) for which in (range(5), range(4, -1, -1))), [ask(4, 12, 1.0, which=[i]) for i in range(5)]
    one_by_one = [pair for i in range(5) for k in range(4) for pair in ask(1, 12, 1.0, which=[i], seed=k)]
    for other in (sum(alone, []), one_by_one, sorted(backwards, key=lambda pair: QUESTIONS.index(pair[0]))):
        for (_, a), (_, b) in zip(together, other, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and a.truncated == b.truncated and np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
    assert len({tuple(sample.token_ids) for _, sample in together}) > 10  # of 20
    greedy = ask(3, 12, 0.0)
    assert len(greedy) == 15 and all(greedy[i][1].token_ids.tolist() == greedy[i // 3 * 3][1].token_ids.tolist() for i in range(15))
    for question, sample in greedy[::3]:
        given = dict(do_sample=False, max_new_tokens=12, eos_token_id=EOS, attention_mask=torch.ones(1, len(question)))
        assert sample.token_ids.tolist() == load_model(root / "tied").generate(torch.tensor([question]), **given)[0, len(question) :].tolist()


def test_sampler_ends_a_response_at_an_end_of_sequence_token_or_truncates_it(engine):
    for limit in (2, 12):
        samples = [sample for _, sample in engine[2](40, limit, 1.0)]
        for *inside, last in (sample.token_ids.tolist() for sample in samples):
            assert not set(inside) & set(EOS) and len(inside) < limit and (last in EOS or len(inside) + 1 == limit)
        assert all(s.truncated == (s.token_ids[-1] not in EOS) and len(s.logprobs) == len(s.token_ids) for s in samples)
        ends = {(len(s.token_ids), int(s.token_ids[-1])) for s in samples if not s.truncated}
        assert ends >= {(length, token) for length in (1, 2) for token in EOS}  # each of them, and at the last place, too


@torch.no_grad()
def test_sampler_draws_from_the_models_softmax(engine, root):
    model, (_, _, ask) = load_model(root / "tied"), engine
    for temperature in (0.7, 1.0):
        for question, sample in ask(2, 12, temperature):
            assert np.allclose(sample.logprobs, predictions(model, question, sample.token_ids, temperature)[0], rtol=0, atol=1e-4)
    truth = predictions(model, QUESTIONS[2], [0])[1][0].exp().numpy() * 1500
    counts = np.bincount([sample.token_ids[0] for _, sample in ask(1500, 1, 1.0, which=[2])], minlength=21)
    assert ((counts - truth) ** 2 / truth).sum() < 50  # chi-square with 20 degrees of freedom: above 50 in 2 of 10,000 cases
    for temperature, top_p, top_k in ((0.9, 1.0, 4), (0.9, 0.6, 0), (1.3, 0.8, 6)):
        probabilities, ids = predictions(model, QUESTIONS[2], [0], temperature)[1][0].exp().sort(descending=True)
        mass = probabilities[: top_k or None].cumsum(0)
        kept = 1 + int((mass[:-1] < top_p * mass[-1]).sum())  # the fewest whose mass reaches top_p
        truth = dict(zip(ids.tolist(), (probabilities / mass[kept - 1]).log().tolist()[:kept]))
        samples = [sample for _, sample in ask(200, 1, temperature, top_p, top_k, which=[2])]
        assert {int(s.token_ids[0]) for s in samples} == truth.keys() and 1 < kept < 21
        assert all(s.logprobs[0] == pytest.approx(truth[int(s.token_ids[0])], abs=1e-4) for s in samples)


@torch.no_grad()
def test_sampler_takes_the_trainers_weights(engine):
    sampler, policy, ask = engine

    def gap() -> float:
        """Largest difference between the log-probs of engine and trainer."""
        responses = [Response(Problem({}, question), *sample, "", 0.0, "") for question, sample in ask(4, 12, 1.0)]
        pack = make_pack(responses, range(len(responses)), CPU)
        return (policy.response_logprobs(pack, 1.0)[0] - pack.rollout_logprobs).abs().max().item()

    assert gap() < 1e-4
    [p.add_(p.sin() * 0.3) for p in policy.parameters()]  # an optimizer step
    assert gap() > 0.01
    sampler.load_weights(full_weights(policy, torch.float32))
    assert gap() < 1e-4


def test_choice_of_the_sampler(root, tmp_path, monkeypatch):
    code = f"import sys; sys.modules['vllm'] = None; import lite_ppo; sys.argv[1:] = {command_line(root, **{'--sampler': 'vllm'})}; sys.exit(lite_ppo.main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "error: --sampler vllm: vLLM is not installed" in result.stderr
    unfit, broken = "current_platform = type('Unspecified', (), {'device_type': ''})", "raise OSError('libcudart.so.13: no such file')"
    for reason, text in {"GPU build, and this machine has no GPU": unfit, "OSError: libcudart": broken}.items():
        folder = tmp_path / str(len(reason)) / "vllm"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "platforms.py").write_text(text)
        [monkeypatch.delitem(sys.modules, module) for module in list(sys.modules) if module.split(".")[0] == "vllm"]
        monkeypatch.syspath_prepend(folder.parent)
        kind, why = samplers.choose_sampler("auto")
        assert kind == "transformers" and reason in why and samplers.choose_sampler("transformers")[0] == "transformers"
        with pytest.raises(data.UserError, match=f"--sampler vllm: .*{reason}.*--sampler transformers"):
            samplers.choose_sampler("vllm")
