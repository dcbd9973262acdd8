"""What a cut did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

# The table shows the layers with the largest errors.
SHOWN_LAYERS = 8
# Above what float32 does, below what 16-bit types do.
NOTABLE_ROUNDING = 1e-5


@dataclass
class LayerReport:
    """One mixer.

    Attributes:
        status: `cut` or `unchanged`.
        rounding_error: how far the new numbers (of C's rows, of projections) are from what was calculated, since the
            model's dtype holds no more digits: relative, in the Frobenius norm.
        others: as in `LayerPlan`.
    """

    name: str
    mixer_class: str
    status: str
    state_size_before: int
    state_size_after: int
    criterion: str
    refit: str
    relative_error: float
    kept: list[list[int]] | None
    error_curve: list[float]
    realization: str = "stock"
    expected_errors: dict[str, float] = field(default_factory=dict)
    hankel_values: list[list[float]] | None = None
    rounding_error: float = 0.0


@dataclass
class CompressionReport:
    """One cut of a model.

    Attributes:
        layers: every mixer of the model, in its order.
        tokens: the calibration tokens the cut was decided on.
        parameters_before, parameters_after: numbers of parameters of the whole model.
        optimizer_bytes_before, optimizer_bytes_after: size of the optimizer's state; 0 without an optimizer.
        state_bytes_before, state_bytes_after: size of the recurrent state of one sequence, as caches hold it.
        config: what the cut was planned with, as a dictionary.
        step: the training step after which the cut was made; None outside training.
        seconds: how long each part took: measure, plan, apply, and check (loss and KL).
        loss_before, loss_after: the model's own loss right before and after, on the last recorded batch; None if it
            gives none.
        kl_divergence: mean KL(before ‖ after) per token of the logits on that batch, in nats; None if there are none.
    """

    layers: list[LayerReport]
    tokens: int
    parameters_before: int
    parameters_after: int
    optimizer_bytes_before: int = 0
    optimizer_bytes_after: int = 0
    state_bytes_before: int = 0
    state_bytes_after: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None
    kl_divergence: float | None = None

    @property
    def state_size_before(self) -> int:
        return max(layer.state_size_before for layer in self.layers)

    @property
    def state_size_after(self) -> int:
        """The largest of any layer; of projected ones, which share their states out, the average, rounded up."""
        sizes = [layer.state_size_after for layer in self.layers]
        if any(layer.realization == "projected" for layer in self.layers):
            return math.ceil(sum(sizes) / len(sizes))
        return max(sizes)

    @property
    def relative_error(self) -> float:
        """The largest relative error of any layer."""
        return max(layer.relative_error for layer in self.layers)

    @property
    def changed(self) -> bool:
        return any(layer.status == "cut" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The numbers that a training log wants, flat."""
        values = {
            "state_size": self.state_size_after,
            "relative_error": self.relative_error,
            "cut_seconds": sum(self.seconds.values()),
            "loss_before_cut": self.loss_before,
            "loss_after_cut": self.loss_after,
            "kl_divergence": self.kl_divergence,
        }
        return {f"compressm/{name}": value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: layer.relative_error, reverse=True)[:SHOWN_LAYERS]
        shown = [layer for layer in self.layers if layer in worst]
        width = max(len(layer.name) for layer in shown)
        lines = [f"{'layer':{width}}  {'N':>9}  {'relative error':>14}  criterion, refit"]
        for layer in shown:
            sizes = f"{layer.state_size_before} → {layer.state_size_after}"
            how = f"{layer.criterion}, {layer.refit}" if layer.status == "cut" else "unchanged"
            lines.append(f"{layer.name:{width}}  {sizes:>9}  {layer.relative_error:14.4f}  {how}")
        if len(shown) < len(self.layers):
            lines.append(f"and {len(self.layers) - len(shown)} more layers with smaller errors")
        total = f"{self.parameters_before:,} → {self.parameters_after:,} parameters, decided on {self.tokens:,} tokens"
        if self.seconds:
            total += f", {sum(self.seconds.values()):.2f} s"
        if self.loss_after is not None:
            total += f"; loss {self.loss_before:.4f} → {self.loss_after:.4f}"
        if self.kl_divergence is not None:
            total += f", KL {self.kl_divergence:.2e}"
        return "\n".join([*lines, *self._costs(), *self._rounding(), total])

    def _rounding(self) -> list[str]:
        """What the model's dtype takes from the new numbers, where it is of few digits."""
        largest = max(layer.rounding_error for layer in self.layers)
        if largest < NOTABLE_ROUNDING:
            return []
        return [f"in the model's dtype, the new numbers are rounded by up to {largest:.1e} of their size"]

    def _costs(self) -> list[str]:
        """What the other realization would have cost, where there is a choice."""
        both = [layer.expected_errors for layer in self.layers if len(layer.expected_errors) > 1]
        if not both:
            return []
        stock, projected = (max(errors[name] for errors in both) for name in ("stock", "projected"))
        guess = "" if any(layer.realization == "projected" for layer in self.layers) else " (in the mean field)"
        return [
            f"largest expected relative error at this size: {stock:.4f} by selection (realization stock), "
            f"{projected:.4f} projected{guess}"
        ]
