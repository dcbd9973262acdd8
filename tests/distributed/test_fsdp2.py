"""Cuts of parameters that torch's `fully_shard` shards, in two and in four real processes."""

from __future__ import annotations

import json
from pathlib import Path

import fsdp2_worker
import pytest
import torch
from fsdp2_worker import LOOPS, TRAINERS
from launch import torchrun
from torch.distributed.fsdp import FSDPModule
from transformers import Mamba2ForCausalLM

from hf_compressm.distributed import fsdp2
from hf_compressm.modeling_compressm import CompressmMamba2ForCausalLM, projected_class, stock_class

pytestmark = pytest.mark.distributed
CASES = [pytest.param(world, name, id=f"{world}-{name}") for world, loops in LOOPS.items() for name in loops]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[int, list[dict]]:
    """What the processes of each start wrote into their files."""
    results = {}
    for world in LOOPS:
        output = tmp_path_factory.mktemp(f"fsdp2-{world}")
        torchrun(Path(fsdp2_worker.__file__), str(output), processes=world)
        results[world] = [json.loads((output / f"{rank}.json").read_text()) for rank in range(world)]
    return results


@pytest.mark.parametrize(("world", "name"), CASES)
def test_processes_equal_one_with_all_their_batches(launched, world, name):
    result = launched[world][0][name]
    assert result["clipped"]
    for what in ("losses", "norms", "weights"):
        assert result[what] < 5e-6, what
    assert result["moments"] < 1e-6
    assert len({own[name]["digest"] for own in launched[world]}) == 1


@pytest.mark.parametrize(("world", "name"), CASES)
def test_parameters_stay_sharded_as_fully_shard_would(launched, world, name):
    for result in (own[name] for own in launched[world]):
        assert result["all_sharded"] and result["same_groups"]
        assert not result["keeps_more_in_memory"]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_report_counts_whole_parameters(launched, world, name):
    result = launched[world][0][name]
    assert len(result["reports"]) == len(LOOPS[world][name].cuts)
    assert result["reports"] == result["plain_reports"]


def test_projected_models_are_saved_under_their_own_name(launched):
    result = launched[2][0]["mamba2, projected twice"]
    assert result["config"] == "CompressmMamba2Config"
    assert result["classes"][0] == "FSDPCompressmMamba2ForCausalLM"
    assert result["classes"].count("FSDPCompressmMamba2Mixer") == 2


def test_mixed_precision_is_kept(launched):
    for own in launched[2]:
        cut, whole = own["mixed precision"]["cut"], own["mixed precision"]["whole"]
        assert set(cut["forward"]) == {"torch.bfloat16"}
        assert cut["kept"] == "torch.float32" and cut["moments"] == ["torch.float32"]
        torch.testing.assert_close(cut["losses"], whole["losses"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["taken back", "taken back, projected", "taken back, scaled", "taken back, DoRA"])
def test_a_cut_that_is_taken_back_leaves_no_trace(launched, name):
    result = launched[2][0][name]
    assert result["as_before"]
    assert result["losses"] < 5e-6 and result["weights"] < 5e-6 and result["moments"] < 1e-6
    assert result["digest"] == launched[2][1][name]["digest"]


FAILURES = {
    "unknown state": ("TypeError", "optimizer AdamW cannot be carried through a cut: its state 'strange'"),
    "waiting gradients": ("RuntimeError", "fully_shard holds gradients that are not reduced yet"),
    "hooks": ("RuntimeError", "layer backbone.layers.1.mixer: A_log has gradient hooks"),
    "uneven columns": (
        "RuntimeError",
        "along dimension 1, which fully_shard divides only evenly, but its new length 3",
    ),
    "another model": ("ValueError", "layer backbone.layers.0.mixer: kept indices [[0, 9]] reach outside 0..7"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_cut_that_fails_leaves_everything_as_it_was(launched, name):
    kind, message = FAILURES[name]
    for own in launched[2]:
        assert own["failures"][name].startswith(f"{kind}: process 0 of 2, checking the cut: ")
        assert message in own["failures"][name]
        assert "something was changed" not in own["failures"][name]


REFUSALS = {
    "tensor_parallel": "tensor parallelism (DTensor parameters without fully_shard) is not supported",
    "both": "in_proj.weight cannot be cut: it combines fully_shard with tensor, expert or context parallelism",
    "extended": "in_proj.weight cannot be cut: it is gathered by an extension of its own (fsdp_pre_all_gather of Ext",
    "replicated": "cannot be cut: it is replicated by torch's replicate(), not sharded; use DistributedDataParallel",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_layouts_that_are_refused_by_name(launched, name):
    for own in launched[2]:
        assert REFUSALS[name] in own["refusals"][name]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_resumes_before_and_after_the_cut(launched, name):
    first, second = (own[name] for own in launched[2])
    assert first == second
    whole = first["whole"]
    cut = whole["sizes"][-1]
    assert whole["sizes"] == [[8, 8]] * 2 + [cut] * 7
    assert sum(cut) == 4 + 4 and whole["state_size"] == min(cut)
    assert name != "full, selected" or cut == [4, 4]
    for checkpoint, steps in (("checkpoint-2", 6), ("checkpoint-6", 2)):
        resumed = first[checkpoint]
        assert resumed["sizes"] == [cut] * (steps + 1)
        for what in ("kind", "weights", "moments", "losses"):
            assert resumed[what] == whole[what], what


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_brings_the_best_model_back_from_before_the_cut(launched, name):
    best, cut = (launched[2][0][name][run] for run in ("best", "whole"))
    assert best["sizes"] == [[8, 8]] * 2 + [cut["sizes"][-1]] * 6 + [[8, 8]]
    assert "Compressm" not in best["kind"]


@pytest.mark.parametrize("run", ["whole", "checkpoint-6"])
def test_what_a_trainer_saves_loads_without_sharding(launched, run):
    selected, projected = (launched[2][0][name][run] for name in ("full, selected", "full, projected"))
    assert selected["loaded"] == projected["loaded"] == 0
    assert selected["saved_as"] == [["MambaForCausalLM"], None]
    architectures, auto_map = projected["saved_as"]
    assert architectures == ["CompressmMamba2ForCausalLM"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_compressm.CompressmMamba2ForCausalLM"


def test_adapters_are_cut_under_the_trainer_and_put_back(launched):
    for own in launched[2]:
        assert own["adapters"]["sizes"] == [8, 8] + [4] * 6
        assert own["adapters"]["difference"] < 1e-5


def test_classes_of_sharded_modules_become_projected_ones_and_go_back():
    sharded = type("FSDPMamba2ForCausalLM", (FSDPModule, Mamba2ForCausalLM), {"__deepcopy__": None})
    projected = projected_class(sharded)
    assert projected.__name__ == "FSDPCompressmMamba2ForCausalLM"
    assert projected.__bases__ == (FSDPModule, CompressmMamba2ForCausalLM)
    assert stock_class(projected) is sharded
    assert projected_class(projected) is projected and stock_class(sharded) is sharded
    # Saving would copy the file that the class was made in, which is torch's.
    assert type("FSDPx", (FSDPModule, CompressmMamba2ForCausalLM), {})._auto_class is None
    assert CompressmMamba2ForCausalLM._auto_class == "AutoModelForCausalLM"


def test_the_processes_of_a_mesh(launched):
    for own in launched[4]:
        sizes = own["process groups"]
        assert (sizes["both"], sizes["one"]) == (4, 2)
        assert "parts of the model are sharded over different processes" in sizes["different"]


def test_without_sharding_tensors_are_themselves(tiny):
    model = tiny.build()
    parameter = next(model.parameters())
    assert not fsdp2.is_sharded(model) and fsdp2.process_group(model) is None
    assert fsdp2.full_tensor(parameter) is parameter
    values = torch.zeros(3)
    assert fsdp2.shard_like(parameter, values) is values
    fsdp2.reshard(model)
    fsdp2.refuse_unsupported(model)
    fsdp2.refuse_gradients(model)
