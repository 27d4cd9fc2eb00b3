"""What only a GPU can show. To run it, on a machine with one GPU: `pytest tests/test_gpu.py`.

The other tests hide the GPU, so everything here runs in processes of its own, which see one GPU.
First the script with vLLM, alone, because vLLM measures the free memory of the GPU when it starts;
then those that the selected tests need, side by side. A test fails for its own process only.
on_gpu.py has the measurements, this file the laws.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.on_gpu import ATTENTION_CASES
from tests.test_run import METRICS
from tests.world import ROOT, command_line, load_model, read

# ---- processes that see one GPU ------------------------------------------------------------------

GPU = os.environ["TEST_GPUS"].split(",")[0]
ENVIRONMENT = dict(CUDA_VISIBLE_DEVICES=GPU, OMP_NUM_THREADS="4")
SIDE_BY_SIDE = 5  # processes
PATIENCE = 300  # seconds that a process may take


def run(*arguments: str) -> CompletedProcess:
    """Python with these arguments; one that takes too long is ended, and that fails its tests."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
    )
    late = ""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        late = f"\nno end within {PATIENCE} s"
        process.terminate()  # a launcher passes the signal on to its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        out, err = process.communicate()
    return CompletedProcess(arguments, process.returncode, out, err + late)


def launch(ranks: int, script: str, *flags: str) -> CompletedProcess:
    """As torchrun starts it."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return run(*launcher, str(ROOT / script), *flags)


def missing_gpu() -> str:
    """Why these tests do not run here, or ""."""
    if not torch.version.cuda:
        return "needs a GPU: the installed torch is a build for CPUs"
    seen = run("-c", "import torch; print(torch.cuda.is_available())")
    if seen.stdout.split() != ["True"]:
        return "needs a GPU: torch.cuda.is_available() is false"
    return ""


MISSING = missing_gpu()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def check_end(done: CompletedProcess) -> None:
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-6000:]}"


def measure(name: str, root: Path) -> dict:
    """What a measurement of on_gpu.py prints."""
    done = run("-m", "tests.on_gpu", name)
    check_end(done)
    return json.loads(done.stdout.splitlines()[-1])


# ---- runs of the script --------------------------------------------------------------------------

STEPS = 3
# The rate is so large that old weights would show: on a CPU, their mean log-prob gap is 0.09.
VLLM = f"""--sampler vllm --steps {STEPS} --lr 1e-3 --warmup-steps 0 --eval-every 0 --eval-size 32
    --eval-samples 2 --gpu-memory-utilization 0.3 --reward-workers 4""".split()


def too_large_micro_batch(root: Path) -> CompletedProcess:
    flags = """--sampler transformers --compile off --steps 1 --minibatches 1 --eval-size 4
        --eval-samples 1 --micro-batch-tokens 65536 --reward-workers 2""".split()
    return run("-m", "tests.on_gpu", "out_of_memory", *flags, "--output-dir", str(root / "gpu-oom"))


def two_ranks(root: Path) -> CompletedProcess:
    return launch(2, "lite_ppo.py", *command_line(root, **{"--output-dir": f"{root}/gpu-two"}))


RESUMED_STEPS = 4


def killed_and_resumed(root: Path) -> dict[str, CompletedProcess]:
    """A whole run; the same with SIGKILL when the third update begins; and its second start."""
    flags = {"--steps": str(RESUMED_STEPS), "--save-every": "1", "--warmup-steps": "0"}
    flags |= {"--lr": "1e-3", "--eval-every": "0", "--compile": "off"}
    whole = command_line(root, **flags, **{"--output-dir": f"{root}/gpu-whole"})
    killed = command_line(root, **flags, **{"--output-dir": f"{root}/gpu-killed"})
    doomed = ("--doomed", "update", "3", "0", "0")  # phase, how often it begins, delay, rank
    return {
        "whole": launch(1, "lite_ppo.py", *whole),
        "killed": launch(1, "benchmarks/kill_resume.py", *doomed, *killed),
        "resumed": launch(1, "lite_ppo.py", *killed),
    }


# ---- what the tests need -------------------------------------------------------------------------

JOBS: dict[str, Callable] = {
    # those that take longest come first
    "compiled": functools.partial(measure, "compiled"),
    "killed and resumed": killed_and_resumed,
    "memory plan, compiled": functools.partial(measure, "memory_plan_compiled"),
    "memory plan": functools.partial(measure, "memory_plan_eager"),
    "attention": functools.partial(measure, "attention"),
    "attention without vLLM": functools.partial(measure, "attention_without_vllm"),
    "offloaded": functools.partial(measure, "offloaded"),
    "log-probs": functools.partial(measure, "logprobs"),
    "out of memory": too_large_micro_batch,
    "two ranks": two_ranks,
    "process group": functools.partial(measure, "process_group"),
}


@pytest.fixture(scope="module")
def toy_run(root) -> CompletedProcess:
    """The script on the toy, with vLLM."""
    return launch(1, "lite_ppo.py", *VLLM, "--output-dir", str(root / "gpu-toy"))


@pytest.fixture(scope="module")
def jobs(request, root) -> Iterator[dict[str, Future]]:
    """The results of JOBS, as far as the selected tests need them."""
    items = [item for item in request.session.items if item.path == request.path]
    if any("toy_run" in item.fixturenames for item in items):
        request.getfixturevalue("toy_run")  # it needs the GPU for itself
    wanted = {item.callspec.params.get("job") for item in items if hasattr(item, "callspec")}
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    yield {name: pool.submit(job, root) for name, job in JOBS.items() if name in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def result(job, jobs):
    """What the job has returned. `job` is a parameter of the test, see needs()."""
    return jobs[job].result()


def needs(*names: str) -> pytest.MarkDecorator:
    """The test runs once with the result of each of these JOBS."""
    return pytest.mark.parametrize("job", names)


def check_errors(errors: dict[str, float], tolerance: float) -> None:
    too_large = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not too_large, f"more than {tolerance}: {too_large}"  # also NaN


# ---- the script with vLLM ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_rows(toy_run, root) -> list[dict]:
    """The rows of metrics.jsonl."""
    check_end(toy_run)
    return read(root / "gpu-toy/metrics.jsonl")


def test_run_with_vllm_ends_with_a_model(toy_run, root):
    check_end(toy_run)
    assert load_model(root / "gpu-toy/final").num_parameters() == 446_144


def test_run_with_vllm_uses_the_gpu_in_bfloat16(toy_run):
    assert re.search(r"machine +1 process, GPU, bfloat16", toy_run.stdout), toy_run.stdout
    assert re.search(r"sampler +vllm", toy_run.stdout), toy_run.stdout


def test_run_with_vllm_logs_every_metric_of_every_step(toy_rows):
    assert [row["step"] for row in toy_rows] == list(range(STEPS + 1))
    for row in toy_rows:
        assert all(math.isfinite(value) for value in row.values())
    for row in toy_rows[1:]:
        assert row.keys() >= set(METRICS)
        assert row["policy/grad_norm"] > 0
        assert row["policy/skipped"] == 0


def test_run_with_vllm_evaluates_before_and_after(toy_rows):
    """Random weights would solve no problem; the base model solves about a third of them."""
    accuracy = {row["step"]: row.get("eval/toy/accuracy") for row in toy_rows}
    assert accuracy[1] is accuracy[2] is None
    assert 0.1 < accuracy[0] <= 1
    assert 0 <= accuracy[STEPS] <= 1


def test_vllm_samples_from_the_weights_of_the_trainer(toy_rows):
    """After each sleep and wake. The bound is the default of --max-logprob-gap in bfloat16."""
    gaps = [row["rollout/logprob_gap_mean"] for row in toy_rows[1:]]
    assert all(0 < gap < 0.03 for gap in gaps), gaps  # 0: not computed by two programs


# ---- attention -----------------------------------------------------------------------------------


@needs("attention", "attention without vLLM")
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_packed_attention_equals_the_formula(case, result):
    """In bfloat16, beside float64, sequence by sequence: the output and all gradients.

    A number of bfloat16 is rounded by 0.2 % (root mean square). The gradients are sums of products
    of such numbers; a CPU has errors of up to 0.9 %. A window that is one token too long changes
    the output by 7 % or more, and a wrong head or a foreign sequence by about 100 %.
    """
    check_errors(result[case], 0.02)


# ---- log-probs -----------------------------------------------------------------------------------


@needs("log-probs")
@pytest.mark.parametrize("compiled", ["", " compiled"])
@pytest.mark.parametrize("dtype,gradients", [("float32", 1e-5), ("bfloat16", 0.01)])
def test_linear_logprobs_equal_the_plain_formula(dtype, gradients, compiled, result):
    """In float64, with the same inputs, for 151,936 tokens and 1,777 rows in chunks of 100.

    Logits have float32 in both dtypes: so have values, in nats. Gradients are relative errors of
    whole tensors. In bfloat16 they are rounded twice, by 0.2 % each time. The tensor cores' TF32
    would have errors of 0.1 % in float32.
    """
    errors = result[dtype + compiled]
    values = {name: errors.pop(name) for name in ("log-probs", "entropy") if name in errors}
    assert values.keys() == {"log-probs", "entropy"}
    check_errors(values, 1e-4)
    check_errors(errors, gradients)


@needs("log-probs")
def test_linear_logprobs_need_an_eighth_of_the_memory_of_the_plain_formula(result):
    """Forward and backward in bfloat16: 100 of 1,777 rows of logits at a time."""
    peak, plain = result["peak"], result["plain peak"]
    assert 0 < peak < plain / 8, f"{peak / 2**20:.0f} MiB, plain {plain / 2**20:.0f} MiB"


# ---- compiled blocks -----------------------------------------------------------------------------


@needs("compiled")
@pytest.mark.parametrize("split", ["one micro-batch", "several"])
def test_compiled_model_computes_what_the_eager_model_computes(split, result):
    """Both round to bfloat16, at other places: compiled code keeps float32 within a fused kernel.

    On a CPU the log-probs differ by 0.7 % of their standard deviation (root mean square), the
    gradients by 1 % of their norm, and the norms by 0.006 %.
    """
    errors = dict(result[split])
    check_errors({"gradient norm": errors.pop("norm")}, 0.005)
    check_errors(errors, 0.03)


@needs("compiled")
@pytest.mark.parametrize("mode", ["eager split", "compiled split"])
def test_gradient_does_not_depend_on_micro_batch_tokens(mode, result):
    """The float32 law of test_update.py has 1e-5, but the kernels for packed rows need bfloat16.

    The gradient of a weight is rounded to it in each micro-batch, by 0.2 %, before it is added up
    in float32. A CPU has 0.25 %. A lost micro-batch would change it by 10 % or more.
    """
    assert result["micro-batches"] > 4
    check_errors({mode: result[mode]}, 0.01)


# ---- parameters in host memory -------------------------------------------------------------------


@needs("offloaded")
def test_update_with_cpu_offload_equals_the_update_without_it(result):
    """The GPU computes the same gradient, and the CPU takes the step of AdamW.

    Its first step is lr times the sign of the gradient. The sign of numbers near 0 may differ: a
    parameter in a thousand changes the step by 6 %.
    """
    assert result["moved"] > 0
    check_errors({"gradient": result["gradient"]}, 1e-3)
    check_errors({"step": result["difference"]}, 0.06)


@needs("offloaded")
def test_cpu_offload_frees_at_least_the_memory_of_the_moments_of_adamw(result):
    """8 bytes for each of the 54 million parameters; weights and gradients are 8 more."""
    freed = result["peak"] - result["offloaded peak"]
    moments = 8 * result["parameters"]
    peak = f"of a peak of {result['peak'] / 2**20:.0f} MiB"
    assert freed > moments, f"{freed / 2**20:.0f}, not {moments / 2**20:.0f} MiB {peak}"


# ---- memory: its plan, and its end ---------------------------------------------------------------


def describe(row: dict) -> str:
    return f"planned {row['planned'] / 2**20:.0f} MiB, measured {row['measured'] / 2**20:.0f} MiB"


@needs("memory plan")
def test_planned_peak_of_the_update_is_within_15_percent_of_the_measured_one(result):
    row = result["update"]
    assert 1 / 1.15 <= row["ratio"] <= 1.15, f"{describe(row)} ({result['moment']})"


@needs("memory plan, compiled")
def test_compiled_update_needs_no_more_than_planned(result):
    """The plan is for blocks that are not compiled. Fused kernels keep fewer tensors."""
    row = result["update"]
    assert row["ratio"] >= 1 / 1.15, f"{describe(row)} ({result['moment']})"


@needs("out of memory")
def test_out_of_memory_names_the_phase_and_the_flag(result):
    assert result.returncode == 1, result.stderr[-6000:]
    errors = [line for line in result.stderr.splitlines() if "error: rank 0" in line]
    assert len(errors) == 1, result.stderr[-6000:]
    assert "step 1, update: out of memory; a lower --micro-batch-tokens" in errors[0]
    assert "CUDA out of memory" in errors[0]  # torch's own words follow


# ---- resume after SIGKILL ------------------------------------------------------------------------


# The sampler is that of transformers: its batches are the same in both runs, and each response has
# a random stream of its own. vLLM's batches depend on the time that requests take. The sequences
# are shorter than a tile of the attention kernels, so no sum depends on which block ends first.


@needs("killed and resumed")
def test_killed_run_resumes_from_a_checkpoint(result, root):
    check_end(result["whole"])
    assert result["killed"].returncode != 0
    assert "SIGKILL" in result["killed"].stderr, result["killed"].stderr[-6000:]
    check_end(result["resumed"])
    printed = result["resumed"].stdout
    assert re.search("resumed from .*/gpu-killed/checkpoint-[12], [12] of 4", printed), printed
    rows = read(root / "gpu-killed/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(RESUMED_STEPS + 1))


def samples(root: Path, result: dict, key: str) -> tuple[list, list]:
    """A value of each sample of the resumed steps: in the whole run and in the killed one."""
    check_end(result["whole"])
    check_end(result["resumed"])
    values = []
    for folder in ("gpu-whole", "gpu-killed"):
        rows = [row for row in read(root / folder / "samples.jsonl") if row["step"] >= 3]
        assert len(rows) == 2 * 64
        values.append([row[key] for row in rows])
    return values[0], values[1]


@needs("killed and resumed")
def test_resumed_steps_have_the_prompts_of_the_whole_run(result, root):
    whole, killed = samples(root, result, "prompt")
    assert killed == whole
    assert len(set(whole)) > 4


@needs("killed and resumed")
def test_resumed_steps_have_the_responses_of_the_whole_run(result, root):
    """At least 90 % of the 128: a gradient that differs in its last bits may change a few tokens.

    Measured on a CPU in bfloat16: 128 are equal, and 127 after a relative noise of 1e-6 in the
    resumed weights. 76 are equal without the moments of AdamW, 5 with the initial weights.
    """
    whole, killed = samples(root, result, "response")
    equal = sum(a == b for a, b in zip(whole, killed))
    assert equal >= 0.9 * len(whole), f"{equal} of {len(whole)} responses are equal"


@needs("killed and resumed")
def test_resumed_run_ends_with_the_weights_of_the_whole_run(result, root):
    """Their distance is at most a fifth of the distance that training has moved them.

    Measured as above: 0, with the noise 0.03, without the moments 0.54, with initial weights 0.75.
    """
    check_end(result["whole"])
    check_end(result["resumed"])
    start = weights(root / "tied")
    whole = weights(root / "gpu-whole/final")
    killed = weights(root / "gpu-killed/final")
    moved = (whole - start).norm().item()
    distance = (killed - whole).norm().item()
    assert moved > 0
    assert distance <= 0.2 * moved, f"{distance:.3g} of {moved:.3g}"


def weights(folder: Path) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([x.detach().double().flatten() for x in load_model(folder).parameters()])


# ---- ranks ---------------------------------------------------------------------------------------


@needs("process group")
def test_tensors_of_the_gpu_travel_by_nccl(result):
    """On the process group of the script, with one rank."""
    assert result == {"backend": "nccl", "device": "cuda", "sum": [0, 1, 2]}


@needs("two ranks")
def test_two_ranks_on_one_gpu_are_one_message(result, root):
    """nccl refuses to share a GPU, so the script refuses before it loads anything."""
    assert result.returncode == 1  # torchrun's, whatever its ranks return
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-6000:]
    assert "--nproc-per-node 2: torch finds 1 GPU(s) on this machine" in errors[0]
    assert "give torchrun --nproc-per-node 1" in errors[0]
    assert not (root / "gpu-two").exists()  # the output folder
