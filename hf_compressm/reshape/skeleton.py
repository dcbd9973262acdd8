"""What a plan does to each parameter, by name: worked out on a model without values (torch's meta device)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion

from ..mixers import Mixer, StateAxis, find_mixers, mamba2
from ..mixers.adapters import MagnitudeAxis
from ..mixers.resize import resize_mixer, update_configs
from ..modeling_compressm import PROJECTIONS
from ..optimizer import (
    SLICED_STATE,
    WHOLE_STATE,
    add_parameters,
    dimension_in_state,
    replace_parameter,
    sliced_state,
    unwrap_optimizer,
)
from ..plan import CompressionPlan, LayerPlan
from ..surgery import Rounding, projected_further, smaller_values, validate


class SavedOptimizer:
    """Stands for the optimizer of a checkpoint, of which only its state is known.

    A real one would keep each parameter's tensors until Python collects its garbage.
    """

    def __init__(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        self.state = {parameter: state}


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter; `axis` is None for a projection that is projected further."""

    mixer: Mixer
    layer: LayerPlan
    matrix: str | None = None
    axis: StateAxis | None = None


class Skeleton:
    """A model before and after a cut, without values.

    Args:
        model: the model as it was saved, on the meta device.
        plan: the plan of the cut.

    Attributes:
        before, after: the model's parameters on the meta device, by name.
        model_after: the cut model on the meta device; its config is the new one.
        changes: what becomes of each parameter that changes or is added, by name.
        added: the names of new parameters → the name of the in_proj weight that lies beside them.

    Raises:
        ValueError: the plan does not fit the model.
    """

    def __init__(self, model: nn.Module, plan: CompressionPlan) -> None:
        self.plan, self._model = plan, model
        mixers = find_mixers(model)
        validate(plan, mixers)
        self.before = dict(model.named_parameters())
        self.model_after = copy.deepcopy(model)
        _cut(self.model_after, plan)
        self.after = dict(self.model_after.named_parameters())
        self._places = {name: number for number, name in enumerate(self.model_after.state_dict())}
        self.roundings = {name: Rounding() for name in plan.layers}
        self.changes: dict[str, Change] = {}
        self.added: dict[str, str] = {}
        names = {id(parameter): name for name, parameter in self.before.items()}
        for layer_name, layer in plan.changes.items():
            mixer = mixers[layer_name]
            if layer.realization == "stock":
                for axis in mixer.axes:
                    if isinstance(axis, MagnitudeAxis) and any(role in layer.mixtures for role in axis.roles):
                        raise ValueError(
                            f"layer {layer_name}: the refit of DoRA's magnitudes takes several tensors at once, which "
                            "here pass through one by one; cut the model itself (compress_)"
                        )
                    self.changes[names[id(axis.tensor)]] = Change(mixer, layer, axis=axis)
                continue
            for matrix in PROJECTIONS:
                name = f"{layer_name}.{matrix}" if layer_name else matrix
                if not mixer.is_projected:
                    self.added[name] = names[id(mixer.module.in_proj.weight)]
                self.changes[name] = Change(mixer, layer, matrix=matrix)

    @property
    def changed(self) -> list[str]:
        """The parameters of the old model whose values change."""
        return [name for name in self.changes if name not in self.added]

    @property
    def touched(self) -> list[str]:
        """The parameters of the old model that change, or that a new one comes to lie beside."""
        return list(dict.fromkeys([*self.changed, *self.added.values()]))

    def check_shape(self, name: str, shape: Iterable[int], where: str) -> None:
        """Raise a ValueError if a parameter of the checkpoint has not the shape that the config gives it."""
        if tuple(shape) != tuple(self.before[name].shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(shape)}, but with the checkpoint's config it has "
                f"{tuple(self.before[name].shape)}; is this the config of another model, or was the checkpoint cut?"
            )

    def place(self, item: tuple[str, Any]) -> int:
        """A key to sort a state dictionary's items by, in the model's order; what the model lacks comes last."""
        return self._places.get(item[0], len(self._places))

    def values(self, name: str, old: torch.Tensor) -> torch.Tensor:
        """The new values of a parameter.

        Args:
            name: of a changed or added parameter.
            old: its old values; of an added parameter any tensor that has the dtype of its in_proj.
        """
        change = self.changes[name]
        rounding = self.roundings[change.mixer.name]
        if change.axis is not None:
            return smaller_values(change.axis, change.layer, old, rounding)
        matrix = getattr(change.layer, change.matrix).double()
        if name not in self.added:
            matrix = projected_further(old, matrix, change.mixer.groups)
        rounding.add(matrix, matrix.to(old.dtype))
        return matrix.to(old.dtype)

    def state(self, name: str, state: dict[str, Any]) -> dict[str, Any] | None:
        """The new optimizer state of a changed parameter, or None if it starts anew.

        Raises:
            TypeError: an entry that is not known to be sliceable.
        """
        change = self.changes[name]
        if change.axis is None:
            return None
        old = self.before[name]
        axis, layer = change.axis, change.layer
        index = axis.index(layer.kept, layer.state_size_before)
        factors = axis.factors(layer.scales, layer.state_size_after)
        return sliced_state(SavedOptimizer(old, state), old, name, axis.dim, index, factors)

    def fresh_state(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """The state that an added parameter has before its first step, with the entries that another one has.

        Some engines load nothing if a parameter has none. Zeros with step 0 are where torch's own optimizers start.

        Raises:
            TypeError: an entry that is not elementwise.
        """
        shape, fresh = self.after[name].shape, {}
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or key in WHOLE_STATE:
                fresh[key] = torch.zeros_like(value, device="cpu") if isinstance(value, torch.Tensor) else value
            elif key in SLICED_STATE and value.shape == self.before[self.added.get(name, name)].shape:
                fresh[key] = torch.zeros(shape, dtype=value.dtype)
            else:
                raise TypeError(
                    f"the optimizer's state {key!r} of shape {tuple(value.shape)} cannot be started for {name}, which "
                    "the plan adds; project the model before it is sharded, or use AdamW"
                )
        return fresh

    def order_after(self, groups: list[list[str]], weight_decays: list[float]) -> list[list[str]]:
        """The parameters of each optimizer group after the cut, in the order that a cut in process gives them."""
        model = copy.deepcopy(self._model)
        parameters = dict(model.named_parameters())
        listed = {name for group in groups for name in group}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in listed)
        optimizer = AdamW(
            [
                {"params": [parameters[name] for name in group], "weight_decay": decay}
                for group, decay in zip(groups, weight_decays, strict=True)
            ]
        )
        _cut(model, self.plan, optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]

    def name_in_files(self, name: str) -> str:
        """The name that `save_pretrained` gives a parameter: Transformers renames those of some architectures."""
        if not isinstance(self._model, PreTrainedModel):
            return name
        (renamed,) = revert_weight_conversion(self._model, {name: torch.empty(0, device="meta")})
        return renamed

    def optimizer_groups(
        self, sizes: list[int], states: dict[int, dict[str, Any]], recorded: list[list[str]] | None, where: str
    ) -> list[list[str]]:
        """The names behind an optimizer's parameter numbers.

        Args:
            sizes: the number of parameters in each group.
            states: the state by the parameter's number, counted over all groups.
            recorded: the names, if the run that saved the checkpoint wrote them down.
            where: the file, for errors.

        Raises:
            ValueError: no order that is known fits the states' shapes.
        """
        candidates = ([recorded] if recorded else []) + self._usual_orders()
        for groups in candidates:
            if [len(group) for group in groups] != sizes:
                continue
            names = [name for group in groups for name in group]
            if all(name in self.before for name in names) and all(
                _fits(state, self.before[names[number]]) for number, state in states.items()
            ):
                return groups
        raise ValueError(
            f"{where}: the optimizer has groups of {sizes} parameters, and neither the Trainer's groups "
            f"({[len(group) for group in candidates[-3]]}: with weight decay, without) nor the model's own order "
            f"({len(self.before)}) fit their number and shapes; save the checkpoint with CompreSSMCallback, which "
            "writes the names into compressm.json, or write them there as optimizer_parameters, a list for each group"
        )

    def _usual_orders(self) -> list[list[list[str]]]:
        names = [name for name, parameter in self.before.items() if parameter.requires_grad]
        decayed = set(Trainer.get_decay_parameter_names(None, self._model))
        with_callback = {name for name in decayed if not name.endswith(PROJECTIONS)}
        halves = [
            [[name for name in names if name in half], [name for name in names if name not in half]]
            for half in (decayed, with_callback)
        ]
        return [*halves, [names]]


def _cut(model: nn.Module, plan: CompressionPlan, optimizer: Optimizer | None = None) -> None:
    """Bring a model without values, and the optimizer's order, into the form that the cut gives it."""
    mixers = find_mixers(model)
    for name, layer in plan.changes.items():
        mixer = mixers[name]
        projected = layer.realization == "projected" or mixer.is_projected
        features = mamba2.feature_size(mixer.module) if projected else None
        pairs = resize_mixer(mixer, layer.state_size_after, features)
        if optimizer is None:
            continue
        for old, new in pairs:
            if old is not None:
                replace_parameter(unwrap_optimizer(optimizer), old, new, None)
        add_parameters(optimizer, model, mixer.module, [new for old, new in pairs if old is None])
    update_configs(model)


def _fits(state: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Whether an optimizer state can be that of a parameter, as far as shapes tell."""
    return all(
        not isinstance(value, torch.Tensor)
        or (key in WHOLE_STATE and value.numel() == 1)
        or value.shape == parameter.shape
        or (key in SLICED_STATE and parameter.dim() > 1 and dimension_in_state(key, value, parameter, 0) is not None)
        # Unknown entries are refused where they would have to be sliced.
        or key not in SLICED_STATE
        for key, value in state.items()
    )
