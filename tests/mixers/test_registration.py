"""Mixers from outside Transformers: a user's own class, and mamba_ssm's, whose attributes have other names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, lively, tokens, train
from torch import nn
from transformers.models.mamba.modeling_mamba import MambaMixer

from hf_compressm import CompreSSMConfig, compress, find_mixers
from hf_compressm.mixers import ARCHITECTURES, Architecture, mamba1, register_mixer
from hf_compressm.mixers.architectures import unregister_mixer
from hf_compressm.mixers.mixer import check_mixer

NAMES = {"ssm_state_size": "states", "intermediate_size": "width", "time_step_rank": "rank"}


def scan(x, delta, A, B, C, D):
    """x, Δ (batch, length, channels), A (channels, N), B and C (batch, length, N or channels × N)."""
    state, outputs = x.new_zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        decay = (delta[:, t, :, None] * A).exp()
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1))
    return torch.stack(outputs, 1) + D * x


class OwnMamba(nn.Module):
    """Mamba-1 as somebody might write it: mamba_ssm's and Transformers' submodules, numbers under names of its own."""

    numbers = ("width", "states", "rank")

    def __init__(self, hidden: int = 8, width: int = 16, states: int = 8, rank: int = 1) -> None:
        super().__init__()
        for name, value in zip(self.numbers, (width, states, rank), strict=True):
            setattr(self, name, value)
        self.in_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.act(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        states, rank = (getattr(self, name) for name in self.numbers[1:])
        delta, B, C = self.x_proj(x).split([rank, states, states], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        y = scan(x, delta, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D)
        return self.out_proj(y * F.silu(z))


class LikeMambaSsm(OwnMamba):
    """With the attributes of mamba_ssm.modules.mamba_simple.Mamba, and its name."""

    numbers = ("d_inner", "d_state", "dt_rank")


class LikeMamba2Ssm(nn.Module):
    """With the attributes of mamba_ssm.modules.mamba2.Mamba2, and its name."""

    def __init__(self, rmsnorm: bool, D_has_hdim: bool = False, d_mlp: int = 0) -> None:
        super().__init__()
        self.d_ssm, self.nheads, self.headdim, self.ngroups, self.d_state = 32, 4, 8, 2, 8
        self.d_mlp, self.dt_limit, self.act = d_mlp, (0.0, float("inf")), nn.SiLU()
        channels = self.d_ssm + 2 * self.ngroups * self.d_state
        self.in_proj = nn.Linear(8, 2 * d_mlp + self.d_ssm + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
        self.dt_bias = nn.Parameter(torch.randn(self.nheads))
        self.A_log = nn.Parameter(torch.randn(self.nheads))
        self.D = nn.Parameter(torch.rand(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = nn.Module()
            self.norm.weight, self.norm.eps = nn.Parameter(1 + torch.rand(self.d_ssm)), 1e-5
            self.norm.group_size, self.norm.norm_before_gate = self.d_ssm // self.ngroups, False
        self.out_proj = nn.Linear(self.d_ssm + d_mlp, 8, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        shared = self.ngroups * self.d_state
        z, x, delta = self.in_proj(u).split([self.d_ssm, self.d_ssm + 2 * shared, self.nheads], dim=-1)
        x = self.act(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        x, B, C = x.split([self.d_ssm, shared, shared], dim=-1)
        B, C = (
            part.unflatten(-1, (self.ngroups, -1)).repeat_interleave(self.d_ssm // self.ngroups, dim=2)
            for part in (B, C)
        )
        A, delta = -self.A_log.exp(), F.softplus(delta + self.dt_bias).repeat_interleave(self.headdim, dim=-1)
        D = self.D if len(self.D) == self.d_ssm else self.D.repeat_interleave(self.headdim)
        y = scan(x, delta, A.repeat_interleave(self.headdim)[:, None].expand(-1, self.d_state), B, C, D) * F.silu(z)
        if hasattr(self, "norm"):
            groups = y.unflatten(-1, (-1, self.norm.group_size))
            y = self.norm.weight * (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
        return self.out_proj(y)


for cls, name in ((LikeMambaSsm, "mamba_simple.Mamba"), (LikeMamba2Ssm, "mamba2.Mamba2")):
    cls.__module__, cls.__qualname__ = f"mamba_ssm.modules.{name.split('.')[0]}", name.split(".")[1]


@pytest.fixture
def registered():
    register_mixer(OwnMamba, Architecture("own", mamba1, "states", names=NAMES))
    yield
    unregister_mixer(OwnMamba)
    assert not any("OwnMamba" in name for name in ARCHITECTURES)


def wild(module: nn.Module) -> nn.Module:
    return nn.Sequential(lively(module))


def cut(model: nn.Module, silent: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make states silent and cut them; the outputs before and after."""
    ((_, mixer),) = find_mixers(model).items()
    with torch.no_grad():
        for axis in mixer.axes:
            for number, role in enumerate(axis.roles):
                if role in ("B", "C"):
                    axis.tensor[torch.tensor(silent) + axis.block(number, 8).start] = 0
    inputs = torch.randn(16, 12, 8, generator=torch.Generator().manual_seed(0))
    before = model(inputs)
    report = compress(model, [inputs], CompreSSMConfig(state_size=3))
    assert report.layers[0].kept == [[0, 2, 5]] * mixer.groups
    return before, model(inputs)


def test_a_class_of_ones_own(registered):
    model = wild(OwnMamba())
    before, after = cut(model, [1, 3, 4, 6, 7])
    assert model[0].states == 3 and model[0].A_log.shape == (16, 3) and model[0].x_proj.out_features == 7
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_its_numbers_are_those_of_a_mixer_of_transformers(registered):
    """The same weights in a MambaMixer: the same statistics, and so the same cut."""
    config = TINY["mamba"].config(hidden_size=8, state_size=8, num_hidden_layers=1)
    torch.manual_seed(0)
    theirs, own = lively(MambaMixer(config, layer_idx=0)), OwnMamba()
    own.load_state_dict(theirs.state_dict())
    inputs = torch.randn(16, 12, 8)
    reports = [compress(nn.Sequential(each), [inputs], CompreSSMConfig(state_size=3)) for each in (theirs, own)]
    assert reports[0].layers[0].kept == reports[1].layers[0].kept
    assert reports[0].layers[0].relative_error == pytest.approx(reports[1].layers[0].relative_error, rel=1e-5)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own.get_parameter(name), parameter)


def test_a_transformers_model_with_mixers_of_ones_own(registered):
    """Its config rules, under the field that was registered."""
    model = TINY["mamba"].build()
    model.config.states = 8
    for layer in model.backbone.layers:
        layer.mixer = OwnMambaIn(16)
    register_mixer(OwnMambaIn, Architecture("own", mamba1, "states", names=NAMES))
    try:
        compress(model, [tokens(8, 12)], CompreSSMConfig(state_size=3))
        assert model.config.states == 3 and model.config.state_size == 8
        losses, _ = train(model, torch.optim.AdamW(model.parameters()), range(2))
        assert all(loss > 0 for loss in losses)
    finally:
        unregister_mixer(OwnMambaIn)


class OwnMambaIn(OwnMamba):
    """Takes what a block of Transformers gives its mixer."""

    def forward(self, hidden_states: torch.Tensor, cache_params=None, attention_mask=None, **kwargs) -> torch.Tensor:
        return super().forward(hidden_states)


def test_subclasses_of_a_registered_class_are_found(registered):
    assert find_mixers(nn.Sequential(OwnMambaIn()))["0"].architecture.model_type == "own"


def test_mamba_of_mamba_ssm():
    model = wild(LikeMambaSsm())
    before, after = cut(model, [1, 3, 4, 6, 7])
    assert model[0].d_state == 3
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rmsnorm", "D_has_hdim"), [(True, False), (False, False), (False, True)])
def test_mamba2_of_mamba_ssm(rmsnorm, D_has_hdim):
    model = wild(LikeMamba2Ssm(rmsnorm, D_has_hdim))
    before, after = cut(model, [1, 3, 4, 6, 7])
    assert model[0].d_state == 3 and model[0].conv1d.groups == 32 + 2 * 2 * 3
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_mamba2_of_mamba_ssm_is_not_projected():
    with pytest.raises(ValueError, match="cannot be projected: there is no projected class for mixers from outside"):
        compress(
            wild(LikeMamba2Ssm(True)), [torch.randn(4, 12, 8)], CompreSSMConfig(state_size=3, realization="projected")
        )


def test_mamba2_of_mamba_ssm_with_an_mlp_is_refused():
    with pytest.raises(ValueError, match=r"weight of Linear has size 132 .*but state_size 8 makes it 100"):
        compress(wild(LikeMamba2Ssm(False, d_mlp=16)), [torch.randn(4, 12, 8)], CompreSSMConfig(state_size=3))


def test_registrations_that_cannot_work():
    with pytest.raises(TypeError, match="mixer_class must be a class of torch modules, got 'OwnMamba'"):
        register_mixer("OwnMamba", Architecture("own", mamba1))
    with pytest.raises(ValueError, match=r"OwnMamba: the layout .*math.* lacks NAME, CAN_REFIT, state_axes"):
        register_mixer(OwnMamba, Architecture("own", __import__("math")))


class TestParameters:
    """What a mixer must have, checked before anything is touched."""

    def mixer(self):
        return next(iter(find_mixers(TINY["mamba"].build()).values()))

    def test_whole_mixers_pass(self, architecture):
        for mixer in find_mixers(architecture.build()).values():
            check_mixer(mixer)

    def test_a_missing_one(self):
        mixer = self.mixer()
        del mixer.module.A_log
        with pytest.raises(ValueError, match=r"layer backbone\.layers\.0\.mixer: A_log of MambaMixer is missing"):
            check_mixer(mixer)

    def test_one_of_another_size(self):
        mixer = self.mixer()
        mixer.module.A_log = nn.Parameter(torch.zeros(32, 5))
        with pytest.raises(
            ValueError, match="A_log of MambaMixer has size 5 in dimension 1, but state_size 8 makes it 8"
        ):
            check_mixer(mixer)

    def test_one_that_is_not_in_memory(self):
        mixer = self.mixer()
        mixer.module.x_proj.to("meta")
        with pytest.raises(RuntimeError, match="weight of Linear is on the meta device"):
            check_mixer(mixer)


class OtherNames(OwnMamba):
    """Its own parameter has another name, too."""

    def __init__(self) -> None:
        super().__init__()
        self.log_A = self.A_log
        del self.A_log

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.__dict__["A_log"] = self.log_A
        try:
            return super().forward(hidden_states)
        finally:
            del self.__dict__["A_log"]


def test_parameters_may_have_other_names():
    register_mixer(OtherNames, Architecture("other", mamba1, "states", names=NAMES | {"A_log": "log_A"}))
    try:
        model = wild(OtherNames())
        before, after = cut(model, [1, 3, 4, 6, 7])
        assert model[0].log_A.shape == (16, 3)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    finally:
        unregister_mixer(OtherNames)


def test_a_mixer_under_other_names_can_be_copied(registered):
    ((_, mixer),) = find_mixers(nn.Sequential(OwnMamba())).items()
    assert copy.deepcopy(mixer.parts).ssm_state_size == 8
