"""The table of architectures, and the search for mixers."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, projection_plan, stir
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm import compress_, find_mixers
from hf_compressm.mixers import ARCHITECTURES


def test_table_names_the_config_fields(tiny):
    model = tiny.build()
    for mixer in find_mixers(model).values():
        assert mixer.architecture is ARCHITECTURES[type(mixer.module).__name__]
        assert mixer.architecture.model_type == model.config.model_type
        assert getattr(model.config, mixer.architecture.state_size_field) == mixer.state_size == 8


def test_finds_all_layers_of_both_classes_of_model(tiny):
    assert list(find_mixers(tiny.build_base())) == ["layers.0.mixer", "layers.1.mixer"]
    assert list(find_mixers(tiny.build())) == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]


def test_finds_models_inside_other_modules(tiny):
    both = nn.ModuleDict({"first": tiny.build(), "second": nn.Sequential(nn.Linear(2, 2), tiny.build_base())})
    mixers = find_mixers(both)
    assert list(mixers) == [
        "first.backbone.layers.0.mixer",
        "first.backbone.layers.1.mixer",
        "second.1.layers.0.mixer",
        "second.1.layers.1.mixer",
    ]
    for name, mixer in mixers.items():
        assert mixer.name == name and mixer.module is both.get_submodule(name)
        owner = both["first"] if name.startswith("first") else both["second"][1]
        assert mixer.config is owner.config


def test_the_innermost_config_rules(tiny):
    """A composite model may have a state_size of its own, as that of a part that is no mixer."""

    class Composite(PreTrainedModel):
        config_class = tiny.config_class

        def __init__(self, config):
            super().__init__(config)
            self.body = tiny.build_base()

    model = Composite(tiny.config(state_size=99))
    assert all(mixer.config is model.body.config for mixer in find_mixers(model).values())


def test_finds_mixers_of_different_architectures_side_by_side():
    both = nn.ModuleList([tiny.build_base(num_hidden_layers=1) for tiny in TINY.values()])
    kinds = {name: mixer.architecture.model_type for name, mixer in find_mixers(both).items()}
    assert kinds == {"0.layers.0.mixer": "mamba", "1.layers.0.mixer": "mamba2"}


def test_finds_bare_mixers(tiny):
    config = tiny.config()
    mixer_class = {"mamba": MambaMixer, "mamba2": Mamba2Mixer}[config.model_type]
    module = mixer_class(config, layer_idx=0)
    (mixer,) = find_mixers(module).values()
    assert mixer.name == "" and mixer.module is module
    # Mamba-1 mixers carry their config; Mamba-2 mixers do not, and stand alone.
    assert mixer.config is (config if config.model_type == "mamba" else None)


def test_finds_subclasses(tiny):
    model = tiny.build()
    module = model.backbone.layers[1].mixer
    module.__class__ = type("MyMixer", (type(module),), {})
    assert find_mixers(model)["backbone.layers.1.mixer"].module is module


def test_groups(tiny):
    expected = {"mamba": 1, "mamba2": 2}[tiny.config_class.model_type]
    assert [mixer.groups for mixer in find_mixers(tiny.build()).values()] == [expected] * 2


class UnknownMixer(nn.Module):
    """Carries a state, under a name that the table does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm_state_size = 4


def test_unknown_mixers_are_named_with_the_supported_ones():
    with pytest.raises(TypeError, match=r"layer 0: UnknownMixer carries a state.*register_mixer.*MambaMixer, Falcon"):
        find_mixers(nn.Sequential(UnknownMixer()))


def test_an_unknown_mixer_beside_known_ones_is_not_skipped(tiny):
    with pytest.raises(TypeError, match="UnknownMixer"):
        find_mixers(nn.ModuleList([tiny.build(), UnknownMixer()]))


def test_a_homemade_mixer_is_recognized_by_its_parameter():
    module = nn.Module()
    module.A_log = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"\(the model itself\): Module carries a state"):
        find_mixers(module)


def test_a_model_without_mixers_is_an_error():
    with pytest.raises(ValueError, match=r"Sequential has no mixer.*supported mixers: MambaMixer, FalconMambaMixer"):
        find_mixers(nn.Sequential(nn.Linear(2, 2)))


def test_decay_rates_and_parameter_norms_of_mamba1():
    module = next(iter(find_mixers(TINY["mamba"].build()).values())).module
    layout = ARCHITECTURES["MambaMixer"].layout
    torch.testing.assert_close(layout.decay_rates(module), -module.A_log.exp()[None])
    B, C = layout.parameter_norms(module)
    for norms, first in ((B, module.time_step_rank), (C, module.time_step_rank + 8)):
        for state in range(8):
            assert norms[0, state].item() == pytest.approx(module.x_proj.weight[first + state].norm().item())


def test_decay_rates_and_parameter_norms_of_mamba2():
    module = next(iter(find_mixers(TINY["mamba2"].build()).values())).module
    layout = ARCHITECTURES["Mamba2Mixer"].layout
    rates = layout.decay_rates(module)
    assert rates.shape == (2, 16, 1)
    for channel in range(32):
        head = channel // 8
        assert rates[channel // 16, channel % 16, 0].item() == pytest.approx(-module.A_log[head].exp().item())
    B, C = layout.parameter_norms(module)
    for norms, first in ((B, 2 * 32), (C, 2 * 32 + 2 * 8)):
        for group in range(2):
            for state in range(8):
                row = module.in_proj.weight[first + group * 8 + state]
                assert norms[group, state].item() == pytest.approx(row.norm().item())


class TestMamba2Family:
    """Stock, and projected to three states."""

    @pytest.fixture(params=["stock", "projected"])
    def model(self, request, relative):
        model = stir(relative.build())
        if request.param == "projected":
            compress_(model, projection_plan(model, 3))
        return model

    def test_all_mixers_are_found_in_both_classes_of_model(self, relative, model):
        mixers = find_mixers(model)
        blocks = relative.config().layer_types
        assert len(mixers) == sum(block in ("mamba", "mamba2", "linear_attention", "hybrid") for block in blocks) > 0
        base = f"{model.base_model_prefix}."
        assert [f"{base}{name}" for name in find_mixers(model.base_model)] == list(mixers)

    def test_the_table_names_the_config_fields(self, relative, model):
        for mixer in find_mixers(model).values():
            assert mixer.config is model.config and mixer.can_be_projected and mixer.groups == 2
            assert mixer.architecture.model_type == relative.config_class.model_type
            assert getattr(model.config, mixer.architecture.state_size_field) == mixer.state_size
            assert mixer.state_size == (3 if mixer.is_projected else 8)

    def test_axes_have_the_length_they_say(self, model):
        for mixer in find_mixers(model).values():
            axes = mixer.layout.state_axes(mixer.module)
            assert axes and all(axis.tensor.shape[axis.dim] == axis.length(mixer.state_size) for axis in axes)
            assert not mixer.layout.CAN_REFIT

    def test_decay_rates(self, model):
        for mixer in find_mixers(model).values():
            rates = mixer.layout.decay_rates(mixer.module)
            assert rates.shape == (2, 16, 1)
            for channel, rate in enumerate(rates.flatten().tolist()):
                assert rate == pytest.approx(-mixer.module.A_log[channel // 8].exp().item())

    def test_parameter_norms_are_those_of_the_rows_that_make_a_state(self, model):
        for mixer in find_mixers(model).values():
            weight = mixer.module.in_proj.weight.detach()
            for kind, norms in enumerate(mixer.layout.parameter_norms(mixer.module)):
                assert norms.shape == (2, mixer.state_size)
                for group in range(2):
                    first = 2 * 32 + (2 * kind + group) * 8
                    rows = weight[first : first + 8]
                    if mixer.is_projected:
                        matrix = (mixer.module.B_projection, mixer.module.C_projection)[kind].detach()
                        rows = matrix[:, 3 * group : 3 * group + 3].T @ rows
                    torch.testing.assert_close(norms[group], rows.norm(dim=1))
