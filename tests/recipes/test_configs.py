"""The accelerate configs, each started with the recipes as far as a machine without a GPU allows.

What it does not show: NCCL, CUDA, 16-bit training on GPUs. FSDP2 and DeepSpeed run with gloo (on_cpu.py); gpu.yaml and
ddp.yaml are started with the processes put on the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from test_accelerate_loop import EACH_OF_TWO, RECIPES, SMALL, logged, run_here, small_text, start

CONFIGS = RECIPES / "configs"
ON_CPU = str(Path(__file__).with_name("on_cpu.py"))
LOOP, PRETRAIN, UNTIL_DONE = (str(RECIPES / f"{name}.py") for name in ("accelerate_loop", "pretrain_lm", "until_done"))
KINDS = {
    **{"cpu": ("NO", 1), "cpus": ("MULTI_GPU", 2), "gpu": ("NO", 1), "ddp": ("MULTI_GPU", 2), "fsdp2": ("FSDP", 2)},
    **{f"zero{stage}": ("DEEPSPEED", 2) for stage in (1, 2, 3)},
}
SMALL_TRAINER = (
    *("--hidden_size", "16", "--layers", "2", "--state_size", "16", "--target_state_size", "4", "--cut_at", "4"),
    *("--block_size", "64", "--max_steps", "8", "--per_device_train_batch_size", "4", "--held_out", "0.25"),
    *("--save_steps", "6", "--report_to", "none", "--disable_tqdm", "True", "--sample_by", "line"),
    *("--cut_options", '{"calibration_tokens": 256}'),
)
# Without a GPU the Trainer must be told of the backend, or not to set up what on_cpu.py did.
TRAINER_ON_CPU = {
    "cpu": ("--use_cpu",),
    "gpu": ("--use_cpu",),
    "ddp": ("--use_cpu", "--ddp_backend", "gloo"),
    "fsdp2": ("--use_cpu", "--ddp_backend", "gloo"),
    **{f"zero{stage}": ("--accelerator_config", '{"use_configured_state": true}') for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[str, str]:
    return small_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    """The loop on one process, with the rows of both."""
    return run_here(tmp_path_factory.mktemp("alone"), *text)


def command(config: str, script: str, *options: str) -> list[str]:
    """`accelerate launch` of a recipe, by way of on_cpu.py where the engine needs it."""
    way = [ON_CPU] if KINDS[config][0] in ("FSDP", "DEEPSPEED") else []
    return ["accelerate", "launch", "--config_file", str(CONFIGS / f"{config}.yaml"), *way, script, *options]


def environment(config: str) -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu"} | ({"ACCELERATE_USE_CPU": "true"} if config in ("cpus", "ddp", "gpu") else {})


def test_every_config_is_listed():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_config_is_read_and_tells_its_commands(name):
    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))
    kind, processes = KINDS[name]
    assert config.distributed_type == DistributedType(kind) and config.num_processes == processes
    # "no" without quotes would be read as a boolean.
    assert getattr(config, "mixed_precision", None) in (None, "no")
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_reshard_after_forward"] is True
    comment = re.sub(r"\\\n# +", "", file.read_text(encoding="utf-8"))
    commands = [line for line in comment.splitlines() if "accelerate launch" in line]
    for script in ("recipes/pretrain_lm.py", "recipes/accelerate_loop.py"):
        assert any(f"launch --config_file recipes/configs/{name}.yaml" in line and script in line for line in commands)
    assert sum("until_done.py" in line for line in commands) == (2 if name == "zero3" else 0)


# Started and compared: fsdp2 and zero2 always, the others in `make test-distributed`; cpus in test_accelerate_loop.py.
@pytest.mark.distributed
@pytest.mark.parametrize(
    "config", ["fsdp2", "zero2", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero1", "ddp"))]
)
def test_the_loop_is_like_one_process(config, text, alone, tmp_path):
    options = (*SMALL, *text, *EACH_OF_TWO, "--save_every", "9", "--output_dir", str(tmp_path))
    options += ("--cpu",) if config == "ddp" else ()
    result = start(*command(config, LOOP, *options), **environment(config))
    assert result.stdout.count("CompreSSM, step 4") == 1 and result.stdout.count("checkpoints are in") == 1
    assert logged(tmp_path) == pytest.approx(logged(alone), abs=1e-4)
    assert logged(tmp_path, "lr") == pytest.approx(logged(alone, "lr"))
    parts = {"fsdp2": "pytorch_model_fsdp_0/__1_0.distcp", "ddp": "model.safetensors"}
    part = parts.get(config, "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert (tmp_path / "step_20" / part).is_file()


@pytest.mark.long
@pytest.mark.distributed
def test_the_loop_goes_on_from_a_cut_checkpoint(text, tmp_path):
    options = (*SMALL[:-2], *text, *EACH_OF_TWO, "--save_every", "9", "--output_dir", str(tmp_path))
    launch = command("zero3", LOOP, *options)
    result = start(sys.executable, UNTIL_DONE, str(tmp_path), "--", *launch, **environment("zero3"))
    assert result.stdout.count("was cut, state size 16 -> 4. This run ends here.") == 1
    runs = [line for line in result.stdout.splitlines() if line.startswith("until_done: ")]
    assert len(runs) == 2 and all(line.startswith("until_done: accelerate launch") for line in runs)
    assert runs[1].endswith(f"--resume {tmp_path / 'cut-step_4'}")
    sizes = {file.parent.name: json.loads(file.read_text())["state_size"] for file in tmp_path.glob("*/config.json")}
    assert sizes == {"step_4": 16, "cut-step_4": 4, "step_9": 4, "step_18": 4, "step_20": 4}


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("config", TRAINER_ON_CPU)
def test_the_trainer_ends_with_the_smaller_model(config, text, tmp_path):
    options = (*SMALL_TRAINER, "--train_files", text[1], "--output_dir", str(tmp_path), *TRAINER_ON_CPU[config])
    runs = command(config, PRETRAIN, *options)
    if config == "zero3":
        runs = [sys.executable, UNTIL_DONE, str(tmp_path), "--", *runs]
    result = start(*runs, **environment(config), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    one_end, other_end = ("CompreSSM: the checkpoint", "CompreSSM, step 4")
    assert result.stdout.count(one_end) == (config == "zero3") and result.stdout.count(other_end) == (
        config != "zero3"
    )
    assert result.stdout.count("state size N") == 1 and "after 8 steps" in result.stdout
    assert json.loads((tmp_path / "config.json").read_text())["state_size"] == 4
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert (tmp_path / "cut-checkpoint-4").is_dir() == (config == "zero3")
    processes = 1 if config in ("cpu", "gpu") else 2
    assert len(list((tmp_path / "checkpoint-8").glob("rng_state*.pth"))) == processes
    assert "mamba with 10,880 parameters" in result.stderr
