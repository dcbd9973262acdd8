"""Every architecture as a whole model: a cut of silent states, training, generation, checkpoints, and what is refused.

Jamba and Falcon-Mamba divide B and C by their root mean square, so a cut multiplies some of their parameters by
constants. The function stays the same, and gradients are divided by the constants; but Adam's step does not depend on
the size of a gradient, so from then on these models train a little differently.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import ClassVar

import accelerate
import numpy as np
import pytest
import torch
from conftest import WHOLE_MODELS, Relative, selection_plan, silence_states, stir, tokens, train
from torch import nn
from training import build_trainer, config, log_rows
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

from hf_compressm import (
    CompressionPlan,
    CompreSSMCallback,
    CompreSSMConfig,
    compress,
    compress_,
    find_mixers,
    measure,
    plan_compression,
)

# States that do nothing, in each group.
SILENT = [[1, 3, 4, 6], [0, 1, 2, 5], [4, 5, 6, 7], [0, 2, 3, 7]]
LEFT_PADDING = torch.ones(4, 12, dtype=torch.long)
LEFT_PADDING[0, :4] = 0
LEFT_PADDING[2, :1] = 0
RESCALED = ("falcon_mamba", "jamba")
# Falcon-H1's norm loses a dimension where the sequence is one step long, in older versions of Transformers.
NORM_TAKES_STEPS = FalconH1RMSNormGated(8)(torch.ones(2, 1, 8)).shape == (2, 1, 8)

GENERATION = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
}


def is_rescaled(architecture: Relative) -> bool:
    return architecture.config_class.model_type in RESCALED


def state_size_field(architecture: Relative) -> str:
    """Written down once more, apart from the package's table."""
    first = {"mamba": "state_size", "falcon_mamba": "state_size", "mamba2": "state_size"}
    return (first | {"nemotron_h": "ssm_state_size"}).get(architecture.config_class.model_type, "mamba_d_state")


def selection(size: int) -> CompreSSMConfig:
    """What leaves an ordinary model, whatever the layout."""
    return CompreSSMConfig(state_size=size, realization="stock")


def kept_states(model: nn.Module) -> list[list[int]]:
    """The states that `silent` leaves, of each group."""
    groups = next(iter(find_mixers(model).values())).groups
    return [sorted(set(range(8)) - set(silent)) for silent in SILENT[:groups]]


def silent(architecture: Relative, base: bool = False) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model half of whose states do nothing, in evaluation mode, and the others."""
    model = stir(architecture.build_base() if base else architecture.build()).eval()
    kept = kept_states(model)
    silence_states(model, SILENT[: len(kept)])
    return model, kept


@torch.no_grad()
def outputs(model: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A model's first output for the real tokens."""
    result = model.eval()(input_ids=tokens(), attention_mask=mask)[0]
    return result if mask is None or result.dim() < 3 else result[mask.bool()]


def numbers(module: nn.Module) -> dict[str, dict[str, float]]:
    """Every number that is an attribute of a module, by the module's name."""
    kinds = (int, float)
    return {
        name: {key: value for key, value in vars(part).items() if isinstance(value, kinds)}
        for name, part in module.named_modules()
    }


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_the_models_of_these_tests_depend_on_their_states(architecture):
    """They could otherwise be cut in any way."""
    model, kept = silent(architecture)
    before = outputs(model)
    compress_(model, selection_plan(model, SILENT[: len(kept)]))
    assert (outputs(model) - before).abs().max() > 1e-3


class TestSilentStates:
    """Invariant 1: a cut of states that do nothing changes nothing."""

    @pytest.mark.parametrize("mask", [None, LEFT_PADDING], ids=["no padding", "left padding"])
    def test_outputs(self, architecture, mask):
        model, kept = silent(architecture)
        before = outputs(model, mask)
        compress_(model, selection_plan(model, kept))
        assert getattr(model.config, state_size_field(architecture)) == 4
        assert_close(outputs(model, mask), before)

    def test_a_measured_plan_finds_them(self, architecture):
        model, kept = silent(architecture)
        before = outputs(model)
        plan = plan_compression(model, measure(model, [tokens(8, 24)]), selection(4))
        assert [layer.kept.tolist() for layer in plan.layers.values()] == [kept] * len(find_mixers(model))
        compress_(model, plan)
        assert_close(outputs(model), before)

    def test_gradients_and_moments(self, architecture):
        """A parameter that became c times as large has a gradient 1/c times as large: their products stay."""
        model, kept = silent(architecture)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optimizer, range(2))

        def read() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
            norms, products = {}, {}
            for name, parameter in model.named_parameters():
                if parameter in optimizer.state:
                    p, state = parameter.detach(), optimizer.state[parameter]
                    norms[name] = parameter.grad.norm()
                    for key, product in (
                        ("gradient", p * parameter.grad),
                        ("exp_avg", p * state["exp_avg"]),
                        ("exp_avg_sq", p**2 * state["exp_avg_sq"]),
                    ):
                        products[f"{name} {key}"] = torch.stack([product.sum(), product.norm()])
            optimizer.zero_grad()
            return norms, products

        norms, products = read()
        compress_(model, selection_plan(model, kept), optimizer)
        norms_after, products_after = read()
        assert products.keys() == products_after.keys()
        for name, product in products.items():
            torch.testing.assert_close(products_after[name], product, rtol=1e-3, atol=1e-6, msg=name)
        changed = [name for name in norms if not torch.isclose(norms_after[name], norms[name], rtol=1e-3, atol=1e-6)]
        assert bool(changed) == is_rescaled(architecture), changed

    def test_training_in_the_stock_trainer(self, architecture, tmp_path):
        cut, kept = silent(architecture)
        uncut = copy.deepcopy(cut)
        callback = CompreSSMCallback(config())
        rows = []
        for model, callbacks in ((cut, [callback]), (uncut, [])):
            trainer = build_trainer(model, tmp_path, callbacks, learning_rate=1e-3)
            trainer.train()
            rows.append(np.array(log_rows(trainer)))
        (entry,) = callback.history
        assert entry["status"] == "cut" and all(layer["kept"] == kept for layer in entry["layers"])
        ours, theirs = rows
        assert ours.shape == theirs.shape == (8, 4) and np.array_equal(ours[:3], theirs[:3])
        # Right after the cut nothing has changed yet; what was scaled takes other steps from then on.
        assert ours[3, 1] == pytest.approx(theirs[3, 1], rel=1e-6)
        assert np.allclose(ours[:, 1], theirs[:, 1], rtol=2e-2 if is_rescaled(architecture) else 1e-5)
        if not is_rescaled(architecture):
            assert np.allclose(ours[:, 2], theirs[:, 2], rtol=1e-3)

    @pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
    def test_generation(self, architecture, options):
        """Of a batch with padding on the left."""
        if architecture is WHOLE_MODELS["falcon_h1 with a norm"] and not NORM_TAKES_STEPS:
            pytest.skip("this version of Transformers cannot generate with it")
        model, kept = silent(architecture)

        def generate() -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(0)
            output = model.generate(
                tokens(4, 6),
                attention_mask=LEFT_PADDING[:, :6],
                max_new_tokens=6,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
                **({"do_sample": False} | options),
            )
            return output.sequences, torch.stack(output.logits)

        sequences, logits = generate()
        compress_(model, selection_plan(model, kept))
        sequences_after, logits_after = generate()
        assert torch.equal(sequences_after, sequences) and sequences.shape == (4, 12)
        assert_close(logits_after, logits)


class TestARealCut:
    """Of states that do something, decided by measurement."""

    def test_training_in_the_stock_trainer(self, architecture, tmp_path):
        model, callback = stir(architecture.build()), CompreSSMCallback(config(state_size=3))
        trainer = build_trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=6)
        trainer.train(), trainer.save_model(tmp_path / "end")
        rows = log_rows(trainer)
        assert len(rows) == 8 and np.isfinite(rows).all()
        # Invariant 8, with another way to find the mixers.
        mixers = [name for name, module in model.named_modules() if hasattr(module, "ssm_state_size")]
        (entry,) = callback.history
        assert [layer["name"] for layer in entry["layers"]] == mixers != []
        assert all((layer["status"], layer["state_size_after"]) == ("cut", 3) for layer in entry["layers"])
        # Invariant 5. The last checkpoint was written after the cut, two steps before the end.
        for directory in (tmp_path / "checkpoint-6", tmp_path / "end"):
            loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
            assert type(loaded) is architecture.language_model and not any(map(len, info.values())), info
            assert getattr(loaded.config, state_size_field(architecture)) == 3
            assert "auto_map" not in json.loads((directory / "config.json").read_text())
        assert_same(copies(loaded), copies(model))
        assert torch.equal(outputs(loaded, LEFT_PADDING), outputs(model, LEFT_PADDING))

    def test_only_the_mixers_are_touched(self, architecture):
        model = stir(architecture.build())
        layers = tuple(f"{layer}." for layer in find_mixers(model))
        before = {name: (tensor, tensor.detach().clone()) for name, tensor in tensors_of(model)}
        compress(model, [tokens(8, 24)], selection(3))
        after = dict(tensors_of(model))
        assert after.keys() == before.keys()
        others = [name for name in before if not name.startswith(layers)]
        assert len(others) > 3
        for name in others:
            assert after[name] is before[name][0] and torch.equal(after[name], before[name][1]), name
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings

    def test_it_has_the_numbers_of_a_model_that_was_born_small(self, architecture):
        model = architecture.build()
        compress_(model, selection_plan(model, [0, 2, 7]))
        small = architecture.build(**{state_size_field(architecture): 3})
        assert numbers(model) == numbers(small)
        shapes = [{name: tensor.shape for name, tensor in tensors_of(kind)} for kind in (model, small)]
        assert shapes[0] == shapes[1]
        assert model.config.to_dict() == small.config.to_dict()

    def test_the_saved_plan_gives_the_same_model(self, architecture, tmp_path):
        """Invariant 6."""
        model = stir(architecture.build())
        again = copy.deepcopy(model)
        plan = plan_compression(model, measure(model, [tokens(8, 24)]), selection(3))
        assert_same(copies(model), copies(again))
        plan.save(tmp_path / "plan.json")
        compress_(model, plan)
        compress_(again, CompressionPlan.load(tmp_path / "plan.json"))
        assert_same(copies(model), copies(again))

    def test_a_cut_that_fails_leaves_everything_as_it_was(self, architecture):
        """Invariant 6, with a plan that does not fit the last layer."""
        model = stir(architecture.build())
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, range(1))
        plan = selection_plan(model, [0, 2, 7])
        name, layer = list(plan.layers.items())[-1]
        plan.layers[name] = dataclasses.replace(layer, kept=layer.kept + 1)
        assert_untouched_by(lambda: compress_(model, plan, optimizer), model, optimizer, ValueError, name)

    def test_all_of_them_load_without_the_package(self, tmp_path):
        """Invariant 5, where nothing of this package can be imported."""
        for number, architecture in enumerate(WHOLE_MODELS.values()):
            model = stir(architecture.build())
            compress(model, [tokens(8, 24)], selection(3))
            model.save_pretrained(tmp_path / str(number))
            torch.save(outputs(model), tmp_path / str(number) / "outputs.pt")
        command = [sys.executable, "-c", LOAD, str(tmp_path), str(len(WHOLE_MODELS))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 and done.stdout.split() == ["loaded", str(len(WHOLE_MODELS))], done.stderr


LOAD = """
import sys
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(1, 16, (4, 12), generator=generator)
for number in range(int(sys.argv[2])):
    directory = f"{sys.argv[1]}/{number}"
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], torch.load(directory + "/outputs.pt")), model.config.model_type
print("loaded", number + 1)
"""


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def assert_untouched_by(
    action: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    error: type[Exception],
    message: str,
) -> None:
    """An action raises an error, and model and optimizer are afterwards what they were, to the last bit."""

    def everything() -> tuple:
        tensors = [(name, id(tensor), tensor.device) for name, tensor in tensors_of(model)]
        groups = [] if optimizer is None else [list(map(id, group["params"])) for group in optimizer.param_groups]
        configs = [part.config.to_dict() for part in model.modules() if isinstance(part, PreTrainedModel)]
        return tensors, groups, configs, numbers(model), [type(part) for part in model.modules()]

    def values() -> dict[str, torch.Tensor]:
        result = {name: tensor for name, tensor in copies(model).items() if not tensor.is_meta}
        for number, state in enumerate([] if optimizer is None else optimizer.state.values()):
            result |= {f"{number} {key}": value.clone() for key, value in state.items()}
        return result

    before, values_before = everything(), values()
    with pytest.raises(error, match=message):
        action()
    assert everything() == before
    assert_same(values(), values_before)


# Mamba models as parts of larger ones.


class ClassifierConfig(PreTrainedConfig):
    model_type = "classifier"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config: PreTrainedConfig | dict | None = None, **kwargs) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = MambaConfig(num_hidden_layers=1) if backbone_config is None else backbone_config
        super().__init__(**kwargs)


class Classifier(PreTrainedModel):
    """A head of one's own on a Mamba model."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.head = nn.Linear(config.backbone_config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.backbone(input_ids, attention_mask=attention_mask)[0].mean(1))
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def classified(count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Sequences labelled by their first token."""
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens(count)]


def test_a_head_of_ones_own(architecture, tmp_path):
    model = stir(Classifier(ClassifierConfig(architecture.config()))).eval()
    kept = kept_states(model)
    silence_states(model, SILENT[: len(kept)])
    before = outputs(model)
    report = compress_(model, selection_plan(model, kept))
    assert [layer.name for layer in report.layers] == list(find_mixers(model))
    assert_close(outputs(model), before)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    if architecture.config_class.model_type == "falcon_h1":
        # Transformers leaves `mup_vector` as it came out of the memory, where Falcon-H1 is a part of another model.
        for name, mixer in find_mixers(loaded).items():
            mixer.module.mup_vector.copy_(model.get_submodule(name).mup_vector)
    assert getattr(loaded.config.backbone_config, state_size_field(architecture)) == 4
    assert_same(copies(loaded), copies(model))
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba2"])
def test_a_head_of_ones_own_in_the_stock_trainer(name, tmp_path):
    model = stir(Classifier(ClassifierConfig(WHOLE_MODELS[name].config())))
    callback = CompreSSMCallback(config(state_size=3))
    trainer = build_trainer(model, tmp_path, [callback], data=classified())
    trainer.train(), trainer.save_model(tmp_path)
    assert callback.history[0]["status"] == "cut" and len(log_rows(trainer)) == 8
    assert torch.equal(outputs(Classifier.from_pretrained(tmp_path)), outputs(model))


CLASSIFIERS = [
    name
    for name, kind in WHOLE_MODELS.items()
    if kind.config_class in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and " with " not in name
]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_transformers_own_head_for_classification(name, tmp_path):
    model = stir(AutoModelForSequenceClassification.from_config(WHOLE_MODELS[name].config(num_labels=3))).eval()
    kept = kept_states(model)
    silence_states(model, SILENT[: len(kept)])
    before = outputs(model)
    assert before.shape == (4, 3)
    compress_(model, selection_plan(model, kept))
    assert_close(outputs(model), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))


def test_transformers_has_such_heads_for_some():
    assert {"jamba", "zamba", "zamba2"} <= set(CLASSIFIERS)


class Towers(nn.Module):
    """Two models side by side, of different architectures and state sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = stir(WHOLE_MODELS["jamba"].build_base())
        self.second = stir(WHOLE_MODELS["bamba"].build_base(mamba_d_state=6))
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        both = [tower(input_ids, attention_mask=attention_mask)[0].mean(1) for tower in (self.first, self.second)]
        logits = self.head(torch.cat(both, dim=-1))
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class TestTwoTowers:
    def test_each_keeps_its_own_number_of_states(self):
        torch.manual_seed(0)
        model = Towers().eval()
        silence_states(model.first, [1, 3, 4, 6])
        silence_states(model.second, [[1, 3, 5], [0, 1, 2]])
        before = outputs(model)
        plan = CompressionPlan(
            {
                f"{name}.{layer}": layer_plan
                for name, kept in (("first", [0, 2, 5, 7]), ("second", [[0, 2, 4], [3, 4, 5]]))
                for layer, layer_plan in selection_plan(getattr(model, name), kept).layers.items()
            },
            1,
            selection(4),
        )
        compress_(model, plan)
        assert (model.first.config.mamba_d_state, model.second.config.mamba_d_state) == (4, 3)
        assert_close(outputs(model), before)

    @pytest.mark.parametrize(("target", "sizes"), [(3, (3, 3)), (0.5, (4, 3))], ids=["number", "share"])
    def test_in_the_stock_trainer(self, tmp_path, target, sizes):
        torch.manual_seed(0)
        model, callback = Towers(), CompreSSMCallback(config(state_size=target))
        trainer = build_trainer(model, tmp_path, [callback], data=classified(), save_strategy="no")
        trainer.train()
        assert np.isfinite(log_rows(trainer)).all() and len(callback.history[0]["layers"]) == 3
        assert (model.first.config.mamba_d_state, model.second.config.mamba_d_state) == sizes
        for tower in (model.first, model.second):
            tower.save_pretrained(tmp_path)
            assert_same(copies(AutoModel.from_pretrained(tmp_path)), copies(tower))


# What is not an ordinary model.

# Architectures whose layers need not be Mamba's.
WITHOUT_MIXERS = {
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "bamba": {"attn_layer_indices": [0, 1]},
    "granitemoehybrid": {"layer_types": ["attention", "attention"]},
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
}


@pytest.mark.parametrize("name", WITHOUT_MIXERS)
def test_a_hybrid_without_a_mamba_layer(name):
    model = WHOLE_MODELS[name].build(**WITHOUT_MIXERS[name])
    for action in (find_mixers, lambda model: compress(model, [tokens()], selection(4))):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no mixer whose state could be reduced"):
            action(model)


def test_an_architecture_that_the_table_does_not_know(architecture):
    model = architecture.build()
    plan = selection_plan(model, [0, 2, 7])
    name = list(find_mixers(model))[-1]
    old = model.get_submodule(name)
    mixer = type("NewMixer", (nn.Module,), {})()
    mixer.ssm_state_size, mixer.A_log = old.ssm_state_size, old.A_log
    model.set_submodule(name, mixer)
    for action in (lambda: compress_(model, plan), lambda: compress(model, [tokens()], selection(4))):
        assert_untouched_by(
            action, model, None, TypeError, rf"layer {name}: NewMixer carries a state.*upported mixers"
        )


class TestDifferentSizesUnderOneConfig:
    """A stock config holds one N, and here one layer has fewer states than it says."""

    def model(self, architecture: Relative) -> PreTrainedModel:
        model = stir(architecture.build())
        name = next(iter(find_mixers(model)))
        compress_(model.get_submodule(name), selection_plan(model.get_submodule(name), [0, 1, 2, 4, 5, 7]))
        assert len({mixer.state_size for mixer in find_mixers(model).values()}) == min(2, len(find_mixers(model)))
        return model

    def test_a_cut_to_one_size(self, architecture):
        model = self.model(architecture)
        report = compress(model, [tokens(8, 24)], selection(3))
        assert {layer.state_size_after for layer in report.layers} == {3}
        assert getattr(model.config, state_size_field(architecture)) == 3
        outputs(model)

    @pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba", "mamba2", "zamba2", "falcon_h1"])
    def test_a_cut_that_would_leave_two_sizes(self, name):
        model = self.model(WHOLE_MODELS[name])

        def cut() -> None:
            compress(model, [tokens(8, 24)], selection(7))

        assert_untouched_by(cut, model, None, ValueError, "must keep one state_size, but the plan has .*: 6.*: 7")


def test_frozen_parameters_stay_frozen(architecture):
    model = architecture.build()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    train(model, optimizer, range(1))
    compress_(model, selection_plan(model, [0, 2, 7]), optimizer)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    values = copies(model)
    train(model, optimizer, range(1, 3))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, values[name])


USED_TWICE = [
    *((name, "mixer") for name in ("mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "zamba2", "falcon_h1")),
    *((name, "layer") for name in ("mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1")),
]


@pytest.mark.parametrize(("kind", "what"), USED_TWICE)
def test_a_mixer_that_is_used_twice_is_cut_once(kind, what):
    architecture = WHOLE_MODELS[kind]
    model = stir(architecture.build()).eval()
    names = list(find_mixers(model))
    first, last = (name if what == "mixer" else name.rpartition(".")[0] for name in (names[0], names[-1]))
    model.set_submodule(last, model.get_submodule(first))
    assert len(find_mixers(model)) == len(names) - 1
    kept = kept_states(model)
    silence_states(model, SILENT[: len(kept)])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens(), use_cache=False)[0]

    before = logits()
    compress_(model, selection_plan(model, kept))
    assert_close(logits(), before)
    assert model.get_submodule(last) is model.get_submodule(first)
    assert getattr(model.config, state_size_field(architecture)) == 4


class TestMissingParameters:
    @pytest.mark.parametrize("how", ["deleted", "None"])
    @pytest.mark.parametrize("action", ["compress_", "measure"])
    def test_of_a_mixer(self, architecture, how, action):
        model = architecture.build()
        plan = selection_plan(model, [0, 2, 7])
        name, mixer = list(find_mixers(model).items())[-1]
        if how == "deleted":
            del mixer.module.A_log
        else:
            mixer.module.A_log = None
        actions = {"compress_": lambda: compress_(model, plan), "measure": lambda: measure(model, [tokens()])}
        assert_untouched_by(actions[action], model, None, ValueError, rf"layer {name}: .*A_log")


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("meta")


def offloaded_to_the_cpu(model: PreTrainedModel) -> PreTrainedModel:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched_to_the_disk(model: PreTrainedModel, directory: str) -> PreTrainedModel:
    name = list(find_mixers(model))[-1]
    device_map = {"": "cpu", name: "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=directory, force_hooks=True)


class TestParametersThatAreElsewhere:
    @pytest.mark.parametrize("where", ["meta", "cpu_offload", "disk"])
    def test_a_clear_error(self, architecture, where, tmp_path):
        model = architecture.build().eval()
        plan = selection_plan(model, [0, 2, 7])
        move = {
            "meta": on_meta,
            "cpu_offload": offloaded_to_the_cpu,
            "disk": lambda model: dispatched_to_the_disk(model, tmp_path),
        }
        model = move[where](model)
        name = next(name for name, mixer in find_mixers(model).items() if mixer.module.A_log.is_meta)
        for action in (lambda: compress_(model, plan), lambda: measure(model, [tokens()])):
            assert_untouched_by(action, model, None, RuntimeError, rf"layer {name}: .*meta device.*offload")

    def test_a_device_map_that_keeps_all_of_them_in_place(self, architecture):
        model, _ = silent(architecture)
        model = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        before = outputs(model)
        compress(model, [tokens(8, 24)], selection(4))
        assert_close(outputs(model), before)


def test_parameters_that_were_made_in_inference_mode(architecture):
    with torch.inference_mode():
        model, kept = silent(architecture)
    before = outputs(model)
    report = compress(model, [tokens(8, 24)], selection(4))
    assert [layer.kept for layer in report.layers] == [kept] * len(find_mixers(model))
    assert_close(outputs(model), before)
