"""The command line: presets, and mistakes of the user, each reported in one message."""

import dataclasses
import json
import os
import random
import shutil
import socket
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import lite_ppo
from lite_ppo import PRESETS, Config
from support import checkpoints, cli, launch, models, samplers, transformers_sampler
from support.errors import UserError
from tests.world import command_line, config, one_rank

# ---- presets -------------------------------------------------------------------------------------

PUBLISHED = dict(
    advantage_mean="group",
    advantage_std="batch",
    loss_level="token",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=0,
    kl_coef=0,
    tis_cap=0,
    overlong_filter=False,
    overlong_buffer=0,
    dynamic_sampling=False,
    temperature=1,
    top_p=1,
    top_k=0,
    prompts_per_step=128,
    group_size=8,
    lr=1e-6,
)
DIFFERENCES = {  # preset: the settings that it states
    "lite_ppo": {},
    "paper": dict(temperature=0.99, top_p=0.99, top_k=100),
    "reinforce": dict(advantage_mean="none", advantage_std="none", loss_level="sequence"),
    "grpo": dict(advantage_std="group", loss_level="sequence", kl_coef=0.04, minibatches=1),
    "dr_grpo": dict(advantage_std="none", loss_level="constant"),
    "dapo": dict(
        advantage_std="group",
        clip_high=0.28,
        dynamic_sampling=True,
        overlong_buffer=0.2,
        reward_low=-1,
        minibatches=16,
    ),
    "rloo": dict(
        advantage_mean="leave_one_out", advantage_std="none", loss_level="sum", minibatches=1
    ),
}


def parse(*arguments: str) -> Config:
    return cli.parse_config(Config, PRESETS, list(arguments))


def needed_flags(root: Path) -> list[str]:
    return ["--train-data", f"{root}/train.jsonl", "--model", f"{root}/tied"]


def test_defaults_are_the_published_settings(root):
    assert vars(parse(*needed_flags(root))).items() >= PUBLISHED.items()


def test_presets_are_all_listed_here():
    assert DIFFERENCES.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_changes_the_published_settings_only(preset, root):
    defaults = vars(parse(*needed_flags(root)))
    found = vars(parse(*needed_flags(root), "--preset", preset))
    assert found == defaults | DIFFERENCES[preset] | {"preset": preset}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_wins_over_the_toy(preset):
    """The toy takes two optimizer steps per rollout; a preset that states a number keeps it."""
    found = vars(parse("--preset", preset))
    settings = cli.TOY_DEFAULTS | DIFFERENCES[preset]
    assert found.items() >= settings.items()
    assert found["prompts_per_step"] * found["group_size"] >= found["minibatches"]


@pytest.mark.parametrize(
    "flags,clip_high",
    [
        ([], 0.5),
        (["--preset", "dapo"], 0.28),
        (["--clip-high", "0.3", "--preset=dapo"], 0.3),
    ],
)
def test_flag_wins_over_preset_and_preset_over_toy(flags, clip_high, monkeypatch):
    monkeypatch.setitem(cli.TOY_DEFAULTS, "clip_high", 0.5)
    assert parse("--model", "toy:large", *flags).clip_high == clip_high


def test_toy_settings_replace_the_defaults():
    cfg = parse("--preset", "dapo", "--no-dynamic-sampling", "--steps", "3")
    assert cfg.dynamic_sampling is False
    assert cfg.overlong_buffer == 0.2
    assert cfg.steps == 3
    assert cfg.lr == cli.TOY_DEFAULTS["lr"]


# ---- one message for each mistake ----------------------------------------------------------------

MISTAKES = {  # a flag and its value, and further flags: words that the message must contain
    # the flag or its value alone
    "--groups 3": "--groups",
    "--preset ppo2": "--preset ppo2 dr_grpo",
    "--steps many": "--steps many",
    "--group-size 1": "--group-size 1 2 responses",
    "--clip-low -0.1": "--clip-low -0.1 at least 0",
    "--top-p 1.5": "--top-p 1.5 at most 1",
    "--temperature 0": "--temperature 0.0 positive",
    # two flags that contradict each other
    "--reward-low 2": "--reward-low 2.0 below 1 correct",
    "--group-size 1 --preset reinforce --dynamic-sampling": "--group-size 1: --dynamic-sampling "
    "at least 2 raise",
    "--minibatches 9999": "--minibatches 9999 responses per step",
    # data
    "--train-data ": "--train-data missing JSONL",
    "--train-data ROOT/none.jsonl": "ROOT/none.jsonl No such file",
    "--train-data toy:extreme": "--train-data extreme easy, medium, hard",
    "--train-data ROOT/syntax.jsonl": "ROOT/syntax.jsonl:3 JSON object",
    "--train-data ROOT/list.jsonl": "ROOT/list.jsonl:1 problem",
    "--train-data ROOT/empty.jsonl": "ROOT/empty.jsonl no problems",
    "--train-data ROOT/long.jsonl": "ROOT/long.jsonl --max-prompt-tokens 16",
    "--eval-data ROOT/unanswered.jsonl": "ROOT/unanswered.jsonl:2 answer None",
    "--eval-data ROOT/mixed.jsonl": "ROOT/mixed.jsonl --max-prompt-tokens 16 1",
    "--problem-column q": "--problem-column q: no such column; has ['problem', 'answer']",
    "--answer-column a.b": "--train-data: ROOT/train.jsonl:1: --answer-column a.b: no such column",
    "--chat-template-kwargs {enable_thinking:false}": "--chat-template-kwargs "
    "{enable_thinking:false}: not JSON give an object",
    "--chat-template-kwargs [1]": "--chat-template-kwargs [1]: not a JSON object",
    '--chat-template-kwargs {"tokenize":true}': "--chat-template-kwargs sets tokenize itself",
    "--eval-data ROOT/no=3/t.jsonl": "--eval-data: ROOT/no=3/t.jsonl No such file",
    # models
    "--model ROOT/none": "--model ROOT/none: no such folder; OWNER/NAME",
    "--model ROOT/tied/config.json": "config.json: no such folder; OWNER/NAME",
    "--model ": "--model : no such folder",
    "--model nobody/nothing": "--model nobody/nothing",
    "--model toy:huge": "--model toy:huge small, large",
    "--model ROOT/hollow": "--model ROOT/hollow",
    "--model ROOT/weightless": "ROOT/weightless safetensors",
    "--model ROOT/silent": "--model ROOT/silent chat_template.jinja",
    "--model ROOT/cut": "--model ROOT/cut model.safetensors not a complete safetensors file",
    "--model ROOT/stub": "--model ROOT/stub not a complete safetensors file",
    "--model ROOT/lost": "--model ROOT/lost: 1 of its 24 tensors "
    "model.layers.1.mlp.up_proj.weight missing instead of",
    "--model ROOT/wide": "--model ROOT/wide (96, 64) instead of (128, 64)",
    "--model ROOT/quantized": "--model ROOT/quantized quantization_config unquantized",
    "--model ROOT/garbled": "--model ROOT/garbled: does not load",
    "--model ROOT/crowd": "--model ROOT/crowd: its tokenizer has the token '<new>' with id 21, "
    "the embedding has 21 rows",
    "--model ROOT/ended": "--model ROOT/ended: its end-of-sequence id 40 21 rows 0 to 20;",
    "--model ROOT/dumb": "--model ROOT/dumb tokenizer.json missing?",
    "--model ROOT/unspoken": "--model ROOT/unspoken: does not load",
    "--model ROOT/gpt": "--model ROOT/gpt GPT2LMHeadModel not supported no list of layers",
    "--model ROOT/capped": "--model ROOT/capped Gemma2ForCausalLM not supported soft-capping nats",
    "--model ROOT/experts": "--model ROOT/experts MixtralForCausalLM mixture of experts Qwen3",
    "--model ROOT/renamed": "--model ROOT/renamed Qwen3ForCausalLM decoder.model. save_pretrained",
    "--model ROOT/foreign": "--model ROOT/foreign: its class is not part of transformers Qwen3",
    "--model ROOT/biased": "--model ROOT/biased 1 tensors Qwen3ForCausalLM lm_head.bias",
    "--model ROOT/loose": "--model ROOT/loose another lm_head.weight "
    "than model.embed_tokens.weight tie_word_embeddings false",
    "--model ROOT/normed": "--model ROOT/normed 4 tensors LlamaForCausalLM "
    "model.layers.0.self_attn.k_norm.weight model_type",
    "--max-new-tokens 60": "--model ROOT/tied 64 --max-new-tokens 76",
    # rewards and the output directory
    "--reward accuracy": "--reward accuracy FILE.py:FUNCTION",
    "--reward ROOT/none.py:f": "--reward ROOT/none.py:f FILE.py:FUNCTION",
    "--reward ROOT/rewards.py:odd": "--reward ROOT/rewards.py:odd 'odd'",
    "--reward ROOT/syntax.py:f": "--reward ROOT/syntax.py:f SyntaxError",
    "--output-dir ROOT/tied": "--output-dir ROOT/tied config.json another folder",
    "--output-dir ROOT/train.jsonl": "--output-dir ROOT/train.jsonl",
}


def do_nothing(*args) -> None:
    pass


def call_main(monkeypatch, arguments: list[str]) -> int:
    """The exit code of lite_ppo.py with these arguments; the ranks are connected already."""
    monkeypatch.setattr(launch, "connect", do_nothing)
    monkeypatch.setattr(dist, "destroy_process_group", do_nothing)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py", *arguments])
    try:
        return lite_ppo.main()
    except SystemExit as end:  # tyro's
        return end.code


def printed_error(capfd) -> str:
    """Everything on stderr, without tyro's frames and line breaks."""
    return " ".join(capfd.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_message(mistake, root, monkeypatch, capfd):
    flag, value, *others = mistake.replace("ROOT", str(root)).split(" ")
    flags = {"--output-dir": f"{root}/mistakes", flag: value}
    code = call_main(monkeypatch, command_line(root, **flags) + others)
    error = printed_error(capfd)
    assert code == 2, error
    assert "Traceback" not in error
    assert error.count("error: ") <= 1
    for word in MISTAKES[mistake].replace("ROOT", str(root)).split():
        assert word in error, word


def test_port_in_use_is_one_message(monkeypatch, capfd):
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        check_port(other_run.getsockname()[1], "EADDRINUSE", monkeypatch, capfd)


@pytest.mark.parametrize("port,named", [("http", "invalid literal"), (99999, "65535")])
def test_port_that_does_not_exist_is_one_message(port, named, monkeypatch, capfd):
    check_port(port, named, monkeypatch, capfd)


def check_port(port, named: str, monkeypatch, capfd) -> None:
    """Rank 0 opens the port itself, so it need not wait before it reports."""
    monkeypatch.setattr(dist, "destroy_process_group", do_nothing)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py"])
    for name, text in one_rank.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert lite_ppo.main() == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: ")
    assert error.count("\n") == 1
    assert named in error
    assert error.rstrip().endswith(
        "is another run using the port? torchrun --master-port sets another"
    )


def true() -> bool:
    return True


def one() -> int:
    return 1


@pytest.fixture
def two_ranks_on_one_gpu(monkeypatch) -> None:
    """What a rank of them sees."""
    monkeypatch.setattr(dist, "destroy_process_group", do_nothing)
    monkeypatch.setattr(torch.cuda, "is_available", true)
    monkeypatch.setattr(torch.cuda, "device_count", one)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_more_ranks_than_gpus_is_one_message(two_ranks_on_one_gpu, capfd):
    """Before the ranks look for each other, and before one touches a GPU that is not there."""
    assert lite_ppo.main() == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --nproc-per-node 2: torch finds 1 GPU(s) on this machine")
    assert error.count("\n") == 1
    assert "give torchrun --nproc-per-node 1" in error


def test_rank_that_prints_no_message_waits_for_the_one_that_does(
    two_ranks_on_one_gpu, monkeypatch, capfd
):
    """Else the launcher could end the other rank before it has printed the message."""
    waits = []
    monkeypatch.setattr(launch.time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lite_ppo.main() == 2
    assert waits == [launch.SECONDS_TO_WAIT]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("message,wait", [("Connection reset by peer", True), ("x", False)])
def test_rank_whose_peer_has_died_waits_for_the_launcher_to_see_it(message, wait, monkeypatch):
    """Else the launcher could name this rank as the first that failed."""

    def lose_the_other_rank(cfg):
        raise RuntimeError(message)

    waits = []
    monkeypatch.setattr(launch.time, "sleep", waits.append)
    monkeypatch.setattr(launch, "connect", do_nothing)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(sys, "argv", ["lite_ppo.py"])
    assert launch.main(Config, PRESETS, lose_the_other_rank) == 1
    assert waits == [launch.SECONDS_TO_WAIT] * wait


# ---- room on the disk ----------------------------------------------------------------------------

PARAMETERS = 10**9
FINAL = 2 * PARAMETERS  # bytes of the final model, in bfloat16
CHECKPOINT = 12 * PARAMETERS  # bytes: weights and two moments of each, in float32


def write_large_model(folder: Path) -> None:
    """A model of PARAMETERS weights in a sparse file, which takes no room."""
    tensor = {"dtype": "BF16", "shape": [10, PARAMETERS // 10], "data_offsets": [0, FINAL]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + FINAL)
    (folder / "config.json").write_text('{"model_type": "qwen3", "dtype": "bfloat16"}')


class Disk:
    """Takes the place of shutil.disk_usage, for one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.free = 0

    def usage(self, path: Path) -> SimpleNamespace:
        assert path == self.folder
        return SimpleNamespace(free=self.free)


@pytest.mark.parametrize("left_behind", [0, 700])  # bytes of a killed run, deleted at the start
@pytest.mark.parametrize(
    "flags,count,need",  # room in GiB for the final model and `count` checkpoints
    [
        (dict(save_every=0), 0, "1.86"),
        (dict(save_every=1), 3, "35.39"),
        (dict(save_every=4), 3, "35.39"),
        (dict(save_every=5), 2, "24.21"),
        (dict(save_every=20), 1, "13.04"),
    ],
)
def test_too_little_room_on_the_disk_is_one_message(
    flags, count, need, left_behind, tmp_path, monkeypatch
):
    write_large_model(tmp_path)
    folder = tmp_path / "run"
    (folder / "partial-7").mkdir(parents=True)
    (folder / "partial-7/half").write_bytes(bytes(left_behind))
    (folder / "partial-7/link").symlink_to(folder / "gone")  # counts nothing
    disk = Disk(folder)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", disk.usage)
    cfg = Config(**dict(steps=10) | flags)

    disk.free = FINAL + count * CHECKPOINT - left_behind
    checkpoints.check_space(folder, str(tmp_path), cfg)  # just enough
    disk.free -= 1
    with pytest.raises(UserError) as error:
        checkpoints.check_space(folder, str(tmp_path), cfg)
    message = str(error.value)
    assert f"--output-dir {folder}: {need} GiB free, and this run needs {need}: " in message
    assert f": 1.86 for the final model and 11.18 for each of {count} checkpoints. " in message
    assert "Make room" in message


def test_room_on_the_disk_is_checked_before_models_load(root, monkeypatch):
    disk = Disk(root / "crowded")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", disk.usage)
    for module in (models, transformers_sampler):
        monkeypatch.setattr(module, "build_model", fail_because_a_model_is_built)
    message = (
        "--output-dir .*/crowded: 0.00 GiB free, and this run needs 0.00: 0.00 for the final model"
    )
    with pytest.raises(UserError, match=message):
        lite_ppo.train(config(root, output_dir=str(root / "crowded")))


def fail_because_a_model_is_built(*args) -> None:
    pytest.fail("a model is built")


# ---- fuzzed configurations -----------------------------------------------------------------------

NUMBERS = """-1 0 1 2 3 0.5 1.5 1e-3 -0.1 nan inf -inf 1e30 many 0x10 1,5 True""".split()
NUMBERS += ["", "9" * 40]
TEXTS = ["", "x", "auto", "a/b/c", "toy:huge", "easy ", "-", "\u2028", "a" * 300]
FILES = ["dev.jsonl", "none.jsonl", "tied", "syntax.py:f"]  # in a copy of the root
CONFIGURATIONS = 300


def copied_files(root: Path, folder: Path) -> list[str]:
    """Paths of FILES in the folder. They are copies, because --output-dir may name them."""
    shutil.copytree(root / "tied", folder / "tied")
    for name in ("dev.jsonl", "syntax.py"):
        shutil.copy(root / name, folder)
    return [f"{folder}/{name}" for name in FILES]


def flag_of(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def values_for(field: dataclasses.Field, texts: list[str]) -> list[str]:
    if typing.get_origin(field.type) is typing.Literal:
        legal = [choice for choice in typing.get_args(field.type) if choice != "vllm"]
        return [*legal, *legal, "nonsense"]
    if field.type in (int, float):
        return NUMBERS
    return texts


def fuzz(rng: random.Random, field: dataclasses.Field, texts: list[str]) -> list[str]:
    """A flag, mostly with a value."""
    flag = flag_of(field)
    if field.type is bool:
        switch = rng.choice([flag, flag.replace("--", "--no-", 1)])
        return [switch, *rng.choice([[], [], ["maybe"]])]
    if rng.random() < 0.03:
        return [flag]
    return [flag, rng.choice(values_for(field, texts))]


def avoid_vllm(monkeypatch) -> None:
    """Choose transformers where the flags say auto: vLLM changes the process that it runs in."""
    choose = samplers.choose_sampler

    def choose_without_vllm(wanted: str, classes: list[str]) -> tuple[str, str]:
        return choose("transformers" if wanted == "auto" else wanted, classes)

    monkeypatch.setattr(samplers, "choose_sampler", choose_without_vllm)


class SomeRuns:
    """Replaces train(): runs each fourth call, or all with FUZZ=all in the environment."""

    def __init__(self, train):
        self.train = train
        self.every = 1 if os.environ.get("FUZZ") == "all" else 4
        self.calls = 0
        self.finished = 0

    def __call__(self, cfg: Config) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.train(cfg)
            self.finished += 1


def test_fuzzed_configurations_run_or_name_a_flag(root, monkeypatch, capfd, tmp_path):
    avoid_vllm(monkeypatch)
    monkeypatch.chdir(tmp_path)
    train = SomeRuns(lite_ppo.train)
    monkeypatch.setattr(lite_ppo, "train", train)
    small = {"--steps": "1", "--prompts-per-step": "2", "--group-size": "2", "--eval-every": "0"}
    texts = TEXTS + copied_files(root, tmp_path)
    rng = random.Random(7)
    codes = []
    for number in range(CONFIGURATIONS):
        fields = rng.sample(dataclasses.fields(Config), rng.choice([1, 1, 2, 3]))
        fuzzed = [part for field in fields for part in fuzz(rng, field, texts)]
        line = command_line(root, **small, **{"--output-dir": f"{tmp_path}/{number}"})
        code = call_main(monkeypatch, line + fuzzed)
        error = printed_error(capfd)
        report = f"{fuzzed} {code} {error[-1500:]}"
        assert code in (0, 1, 2), report
        assert "Traceback" not in error, report
        named = [*map(flag_of, fields), "Unrecognized options: maybe"]
        assert code == 0 or any(name in error for name in named), report
        codes.append(code)
    assert codes.count(0) > 50
    assert codes.count(2) > 50
    assert train.finished > 10
