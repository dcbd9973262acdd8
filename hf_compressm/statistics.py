"""What a cut is decided by: N×N sums over the states that a mixer runs through on real inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .distributed.processes import ALONE, NonFiniteError, Processes
from .distributed.wrappers import is_sharded, runner, unwrap, whole_module
from .mixers import Mixer, check_mixer, find_mixers, stream_states
from .mixers.streamed_forward import streamed_forward
from .replay import evaluation_mode, replay

# Elements of the per-token Gram matrices that are alive at once: 4 MiB in float32; see mixers.scan.CHUNK_ELEMENTS.
GRAM_ELEMENTS = 2**20


__all__ = ["NonFiniteError", "StateStatistics", "measure"]

# Hidden states (batch, length, hidden), and their mask (batch, length) or None.
MixerInput = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class StateStatistics:
    """The sums of one layer, over the calibration tokens t and channels d; h, B, C, Δ, w as in `ScanInputs`.

    Of a wide layer, the channels are those of `ScanInputs.sampled`.

    Attributes:
        tokens: the number of real (not padding) tokens, shape ().
        state_gram: H̄ = Σ w h hᵀ, shape (groups, N, N).
        readout_gram: Ω = Σ_t C_t C_tᵀ, shape (groups, N, N).
        contribution_gram: K = Σ w (C∘h)(C∘h)ᵀ, shape (groups, N, N). Its total is the output's energy Σ w y².
        state_energy: Σ_t h_t², without weights, shape (groups, channels, N).
        delta_sum: Σ_t Δ_t, shape (groups, channels).
        B_sum, C_sum: Σ_t B_t and Σ_t C_t, shape (groups, N).
        A: the decay rates, shape (groups, channels, N or 1).
        B_norm, C_norm: norms of the parameter rows that make B_t and C_t, shape (groups, N).
        inputs: the mixer's inputs in this process, on the host: pairs of hidden states (batch, length, hidden) and
            their mask or None.
        mixer: where the model's parameters are sharded, the mixer with whole ones, on the process that owns the layer.
    """

    tokens: torch.Tensor
    state_gram: torch.Tensor
    readout_gram: torch.Tensor
    contribution_gram: torch.Tensor
    state_energy: torch.Tensor
    delta_sum: torch.Tensor
    B_sum: torch.Tensor
    C_sum: torch.Tensor
    A: torch.Tensor
    B_norm: torch.Tensor
    C_norm: torch.Tensor
    inputs: list[MixerInput] = field(default_factory=list)
    mixer: Mixer | None = None

    @property
    def state_size(self) -> int:
        return self.state_gram.shape[-1]

    @property
    def groups(self) -> int:
        return self.state_gram.shape[0]

    @property
    def sums(self) -> list[torch.Tensor]:
        """The tensors that add up over batches and processes."""
        return [
            self.tokens,
            self.state_gram,
            self.readout_gram,
            self.contribution_gram,
            self.state_energy,
            self.delta_sum,
            self.B_sum,
            self.C_sum,
        ]

    def is_finite(self) -> bool:
        return all(torch.isfinite(tensor).all() for tensor in (*self.sums, self.A, self.B_norm, self.C_norm))

    @classmethod
    @torch.no_grad()
    def empty(cls, mixer: Mixer) -> StateStatistics:
        """Sums over no token yet, for a mixer."""
        groups, size = mixer.groups, mixer.state_size
        decay = _sampled_decay_rates(mixer)
        B_norm, C_norm = mixer.parameter_norms()
        zeros = decay.new_zeros
        return cls(
            tokens=zeros(()),
            state_gram=zeros(groups, size, size),
            readout_gram=zeros(groups, size, size),
            contribution_gram=zeros(groups, size, size),
            state_energy=zeros(*decay.shape[:2], size),
            delta_sum=zeros(decay.shape[:2]),
            B_sum=zeros(groups, size),
            C_sum=zeros(groups, size),
            A=decay,
            B_norm=B_norm,
            C_norm=C_norm,
        )

    @torch.no_grad()
    def update(self, mixer: Mixer, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Add the tokens of one input of the mixer, shape (batch, length, hidden), and keep the input on the host."""
        device = self.state_gram.device
        with torch.autocast(device.type, enabled=False):
            inputs = mixer.scan_inputs(hidden_states.detach().to(device), attention_mask).sampled()
            mask = inputs.mask
            B, C = inputs.B * mask[..., None, None], inputs.C * mask[..., None, None]
            self.tokens += mask.sum()
            self.delta_sum += (inputs.delta * mask[..., None, None]).sum(dim=(0, 1))
            self.B_sum += B.sum(dim=(0, 1))
            self.C_sum += C.sum(dim=(0, 1))
            self.readout_gram += torch.einsum("blgm,blgn->gmn", C, C)
            for start, states in stream_states(inputs):
                self._add_states(states, C[:, start : start + states.shape[0]].transpose(0, 1), inputs, start)
        host_mask = None if attention_mask is None else attention_mask.detach().cpu()
        self.inputs.append((hidden_states.detach().cpu(), host_mask))

    def _add_states(self, states: torch.Tensor, C: torch.Tensor, inputs: Any, start: int) -> None:
        """Add states of shape (steps, batch, groups, channels, N), read out by C (steps, batch, groups, N)."""
        mask = inputs.mask[:, start : start + states.shape[0]].transpose(0, 1)
        self.state_energy += torch.tensordot(mask, states.square(), dims=2)
        y = (states @ C[..., None]).squeeze(-1)
        root = inputs.weight(y, start).sqrt()
        weighted = (states * root[..., None]).flatten(0, 1)
        C = C.flatten(0, 1)
        _, groups, _, size = weighted.shape
        for part, readout in zip(
            weighted.split(max(1, GRAM_ELEMENTS // (groups * size * size))),
            C.split(max(1, GRAM_ELEMENTS // (groups * size * size))),
            strict=True,
        ):
            gram = part.transpose(-1, -2) @ part
            self.state_gram += gram.sum(0)
            self.contribution_gram += gram.mul_(readout[..., :, None]).mul_(readout[..., None, :]).sum(0)


def _sampled_decay_rates(mixer: Mixer) -> torch.Tensor:
    """A of the channels that sums are made over, shape (groups, channels, N or 1)."""
    # Which those are depends on a norm behind the scan, too, so it is asked of the inputs that one token would have.
    # A quantized weight makes no tensor of another kind, and may have a shape of its own.
    in_proj = mixer.parts.in_proj
    token = torch.zeros(1, 1, in_proj.in_features, device=in_proj.weight.device)
    return mixer.scan_inputs(token, None).sampled().A


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    processes: Processes = ALONE,
    show_progress: bool = False,
) -> dict[str, StateStatistics]:
    """Run batches through a model and gather the statistics of each of its mixers.

    The model runs in eval mode and without gradients; its modes are put back. Labels are not needed.

    Args:
        model: the model, bare or as torch.compile, DDP, FSDP or DeepSpeed wrapped it.
        batches: dictionaries of keyword arguments, tuples of positional ones, or tensors of input ids.
        processes: those that train the model; the statistics are summed over them, and all of them must call this.
        show_progress: show a progress bar on the main process.

    Returns:
        Layer name → statistics, in the order of `find_mixers`.

    Raises:
        ValueError: no mixer, no batch, or nothing but padding.
        TypeError: an unsupported mixer.
        What one process raises, all of them raise.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1)
        >>> statistics = measure(MambaForCausalLM(config), [torch.zeros(2, 6, dtype=torch.long)])
        >>> statistics["backbone.layers.0.mixer"].tokens.item()
        12.0
    """
    bare, wrapper = unwrap(model)
    mixers, sharded = find_mixers(bare), is_sharded(bare, wrapper)
    if not sharded:
        for mixer in mixers.values():
            check_mixer(mixer)
    inputs: dict[str, list[MixerInput]] = {name: [] for name in mixers}
    if sharded:
        batches = _in_step(list(batches), processes)
    progress = tqdm(batches, desc="measuring states", disable=not (show_progress and processes.is_main))
    # In a sharded model, a process that fails leaves the others waiting in a forward pass, until torch's time-out.
    forward = contextlib.nullcontext() if sharded else streamed_forward(mixers)
    with processes.all_or_none("running the model"), evaluation_mode(bare), forward:
        for batch in progress:
            counts = not isinstance(batch, _Again)
            with _recording(mixers, inputs) if counts else contextlib.nullcontext():
                replay(bare, batch if counts else batch.batch, logits=False, through=runner(bare, wrapper))
    statistics = {}
    for number, (name, mixer) in enumerate(mixers.items()):
        whole = mixer.copied(lambda module: whole_module(module, bare, wrapper))
        with processes.all_or_none(f"measuring the states of layer {name}"):
            layer = StateStatistics.empty(whole)
            for hidden_states, mask in inputs.pop(name):
                layer.update(whole, hidden_states, mask)
        processes.sum(layer.sums)
        if layer.tokens == 0:
            raise ValueError(f"layer {name}: saw no real token; give at least one batch that is not all padding")
        if sharded and processes.owns(number):
            layer.mixer = whole
        statistics[name] = layer
    return statistics


@dataclass(frozen=True)
class _Again:
    """A batch that is only run to keep the other processes company."""

    batch: Any


def _in_step(batches: list[Any], processes: Processes) -> list[Any]:
    """As many batches on every process: a sharded model's forward passes are run by all of them together."""
    counts = [int(data) for data in processes.all_gather(str(len(batches)).encode())]
    if min(counts) == 0:
        raise ValueError(
            f"the processes have {counts} batches to measure on; a sharded model runs on all of them together, so "
            "each needs at least one"
        )
    return batches + [_Again(batches[-1])] * (max(counts) - len(batches))


@contextlib.contextmanager
def _recording(mixers: Mapping[str, Mixer], inputs: dict[str, list[MixerInput]]) -> Iterator[None]:
    """Within this context, every input of a mixer is kept, on the host."""

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            hidden_states = args[0] if args else kwargs["hidden_states"]
            inputs[name].append((hidden_states.detach().cpu(), None if mask is None else mask.detach().cpu()))

        return hook

    handles = [mixer.module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, mixer in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
