"""The estimate's shapes against real models, optimizers, caches and cuts; its formulas against independent counts."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import MAMBA1_FAMILY, MAMBA2_FAMILY, TINY, projection_plan, selection_plan, tokens
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconMambaConfig, GPT2Config, Mamba2Config, MambaConfig, NemotronHConfig, PreTrainedConfig

from hf_compressm import CompreSSMConfig, Compressor, StateStatistics, compress_, find_mixers, measure
from hf_compressm.drive import kept_recurrences, selection
from hf_compressm.estimate import (
    BENCHMARKS,
    DTYPES,
    STRATEGIES,
    Estimate,
    fitted_times,
    kernel_size,
    token_system_bytes,
)
from hf_compressm.estimate import estimate as estimate_by_default
from hf_compressm.mixers import ARCHITECTURES
from hf_compressm.planning import plan_compression
from hf_compressm.projection import _token_sums
from hf_compressm.refit import mean_field_readout
from hf_compressm.replay import InputRecorder
from hf_compressm.surgery import optimizer_bytes
from hf_compressm.token_systems import systems_of


def estimate(config: PreTrainedConfig, **options: Any) -> Estimate:
    """Of a selection, unless told otherwise."""
    return estimate_by_default(config, **({"realization": "stock"} | options))


FAMILY = MAMBA1_FAMILY | MAMBA2_FAMILY
# Nemotron-H 8B's layers: 24 mixers, 4 attentions, 24 MLPs.
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}

# Sized like the published models; the parameters that are published for them, in billions.
PUBLISHED = {
    "mamba-2.8b": (MambaConfig(vocab_size=50280, hidden_size=2560, num_hidden_layers=64, state_size=16), 2.77),
    "mamba2-2.7b": (
        Mamba2Config(
            vocab_size=50288,
            hidden_size=2560,
            num_hidden_layers=64,
            state_size=128,
            num_heads=80,
            head_dim=64,
            n_groups=1,
            tie_word_embeddings=True,
        ),
        2.70,
    ),
    "falcon-mamba-7b": (
        FalconMambaConfig(
            vocab_size=65024,
            hidden_size=4096,
            intermediate_size=8192,
            num_hidden_layers=64,
            state_size=16,
            tie_word_embeddings=False,
        ),
        7.27,
    ),
    "codestral-mamba-7b": (
        Mamba2Config(
            vocab_size=32768,
            hidden_size=4096,
            num_hidden_layers=64,
            state_size=128,
            num_heads=128,
            head_dim=64,
            n_groups=8,
            tie_word_embeddings=False,
        ),
        7.29,
    ),
    "nemotron-h-8b": (NemotronHConfig(layers_block_type=[KINDS[kind] for kind in NEMOTRON]), 8.1),
}


def parameters_of_states(name: str, config) -> int:
    """What one state has in all layers, counted by hand from the config."""
    if isinstance(config, (MambaConfig, FalconMambaConfig)):
        # A column of A_log, and x_proj's rows of B and C.
        return config.num_hidden_layers * 3 * config.intermediate_size
    layers = NEMOTRON.count("M") if name == "nemotron-h-8b" else config.num_hidden_layers
    # Rows of B and C of each group: of in_proj, and of the convolution with its bias.
    return layers * 2 * config.n_groups * (config.hidden_size + config.conv_kernel + 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, billions = PUBLISHED[name]
    before = config.to_dict()
    result = estimate(config, state_size=8, world_size=8, strategy="fsdp2")
    states = 128 if "2" in name.partition("-")[0] or name[:1] in "cn" else 16
    assert result.before.parameters == pytest.approx(billions * 1e9, rel=0.02)
    assert result.before.state_parameters == states * parameters_of_states(name, config)
    assert result.before.parameters - result.after.parameters == (states - 8) * parameters_of_states(name, config)
    assert result.after.state_bytes * states == result.before.state_bytes * 8
    # Two FLOPs for each weight but the embeddings', about: the usual estimate of a forward pass.
    embeddings = config.vocab_size * config.hidden_size * (0 if config.tie_word_embeddings else 1)
    assert result.before.forward_flops == pytest.approx(2 * (result.before.parameters - embeddings), rel=0.15)
    assert config.to_dict() == before


def adamw_after_a_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


REALIZATIONS = [(name, "stock") for name in FAMILY] + [(name, "projected") for name in MAMBA2_FAMILY]


@pytest.mark.parametrize("name, realization", REALIZATIONS)
def test_parameters_and_optimizer_of_real_models(name, realization):
    model = FAMILY[name].build()
    result = estimate(model.config, state_size=3, realization=realization, dtype="float32")
    assert result.before.parameters == model.num_parameters()
    optimizer = adamw_after_a_step(model)
    assert result.before.optimizer_bytes == optimizer_bytes(optimizer)
    plan = selection_plan(model, [0, 2, 5]) if realization == "stock" else projection_plan(model, 3)
    report = compress_(model, plan, optimizer)
    assert result.after.parameters == model.num_parameters() == report.parameters_after
    adamw_after_a_step(model, optimizer)
    assert result.after.optimizer_bytes == optimizer_bytes(optimizer)
    assert result.after.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    again = estimate(model.config, state_size=2, realization=realization, dtype="float32")
    assert again.before == result.after


def test_state_parameters_are_those_that_shrink():
    config = TINY["mamba2"].config()
    sizes = [estimate(config, state_size=size).after for size in (3, 6)]
    assert len({size.parameters - size.state_parameters for size in sizes}) == 1
    assert 2 * sizes[0].state_parameters == sizes[1].state_parameters


def cache_bytes(model: torch.nn.Module, sequences: int) -> tuple[int, int]:
    """The recurrent and the convolution states that a generation leaves in the cache, per sequence."""
    output = model.eval().generate(
        tokens(sequences, 6),
        attention_mask=torch.ones(sequences, 6, dtype=torch.long),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = getattr(output, "cache_params", None) or output.past_key_values
    totals = []
    for kind in ("recurrent_states", "conv_states"):
        layers = [getattr(layer, kind, {}).values() for layer in cache.layers]
        totals.append(sum(state.nbytes for layer in layers for state in layer if state is not None) // sequences)
    return tuple(totals)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILY)
def test_state_bytes_of_real_caches(name, dtype):
    model = FAMILY[name].build().to(getattr(torch, dtype))
    result = estimate(model.config, state_size=3, dtype=dtype)
    assert (result.before.state_bytes, result.before.conv_state_bytes) == cache_bytes(model, 2)
    compress_(model, selection_plan(model, [0, 2, 5]))
    assert (result.after.state_bytes, result.after.conv_state_bytes) == cache_bytes(model, 2)


def test_state_bytes_of_a_projected_cache():
    model = TINY["mamba2"].build()
    result = estimate(model.config, state_size=3, dtype="float32", realization="projected")
    compress_(model, projection_plan(model, 3))
    assert (result.after.state_bytes, result.after.conv_state_bytes) == cache_bytes(model, 2)


def counted_flops(model: torch.nn.Module, batch: int, length: int) -> int:
    """What torch counts in a forward pass, rotary embeddings left out: they are made once for all layers."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(input_ids=tokens(batch, length), use_cache=False)
    by_module = counter.get_flop_counts()
    rotary = sum(sum(counts.values()) for name, counts in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


def flops_of_the_fallback(model: torch.nn.Module, length: int) -> float:
    """What torch counts of the scans of one sequence: transformers' own code, and only products of matrices."""
    total = 0.0
    for mixer in find_mixers(model).values():
        module, states = mixer.module, mixer.state_size
        inner = module.intermediate_size
        if not mixer.can_be_projected:
            total += 2 * length * inner * states
            continue
        chunk, chunks = module.chunk_size, length // module.chunk_size
        # Scores for each head, not for each group; states pass from every chunk to every other, and one more at first.
        total += length * (2 * chunk * module.num_heads * states + 2 * chunk * inner + 4 * inner * states)
        total += 2 * (chunks + 1) ** 2 * inner * states
    return total


@pytest.mark.parametrize("name, realization", REALIZATIONS)
def test_flops_that_torch_counts(name, realization):
    batch, length = 2, 16
    model = FAMILY[name].build(attn_implementation="eager", experts_implementation="eager")
    result = estimate(model.config, state_size=3, length=length, realization=realization)
    for size, plan in (
        (result.before, None),
        (result.after, selection_plan(model, [0, 2, 5]) if realization == "stock" else projection_plan(model, 3)),
    ):
        if plan is not None:
            compress_(model, plan)
        flops = {part: value.total for part, value in size.flops.items()}
        kernel = next(iter(find_mixers(model).values())).module.conv_kernel_size
        # Padded on both sides, and cut.
        expected = batch * (length + kernel - 1) * flops["convolution"]
        expected += batch * length * (flops["linear"] + flops["experts"] + flops["projections"] + flops["attention"])
        expected += batch * flops_of_the_fallback(model, length)
        assert counted_flops(model, batch, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_flops_of_states_are_those_that_shrink_with_them(name):
    result = estimate(FAMILY[name].config(), state_size=2)
    for part, before in result.before.flops.items():
        after = result.after.flops[part]
        assert after.fixed == before.fixed and after.state * 8 == pytest.approx(before.state * 2), part
    assert all(result.before.flops[part].state > 0 for part in ("linear", "scan"))


class Number:
    """A number that counts what is done with it."""

    operations = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _count(self, value: float) -> Number:
        Number.operations += 1
        return Number(value)

    def __add__(self, other: Number) -> Number:
        return self._count(self.value + other.value)

    def __mul__(self, other: Number) -> Number:
        return self._count(self.value * other.value)

    def exp(self) -> Number:
        return self._count(torch.tensor(self.value).exp().item())


def numbers(*shape: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)

    def wrap(values):
        return Number(values) if isinstance(values, float) else [wrap(value) for value in values]

    return wrap((0.1 + torch.rand(shape, generator=generator, dtype=torch.float64)).tolist())


def test_scan_of_mamba1_counted_by_running_it():
    length, inner, states = 5, 32, 8
    x, delta, B, C = (numbers(length, size, seed=seed) for seed, size in enumerate((inner, inner, states, states)))
    A, D = numbers(inner, states, seed=5), numbers(inner, seed=6)
    Number.operations = 0
    for d in range(inner):
        h = [Number(0.0)] * states
        for t in range(length):
            y, drive = Number(0.0), delta[t][d] * x[t][d]
            for n in range(states):
                h[n] = (delta[t][d] * A[d][n]).exp() * h[n] + drive * B[t][n]
                y = y + C[t][n] * h[n]
            y = y + D[d] * x[t][d]
    result = estimate(TINY["mamba"].config(), state_size=3, length=length)
    # Two layers of 32 channels and 8 states.
    assert result.before.flops["scan"].total * length == 2 * Number.operations


def dot(left: list[Number], right: list[Number]) -> Number:
    total = Number(0.0)
    for a, b in zip(left, right, strict=True):
        total = total + a * b
    return total


def test_scan_of_mamba2_counted_by_running_it():
    """The chunked form, with scores for each group; that it is the recurrence is checked as well."""
    length, chunk, groups, heads, dim, states = 16, 8, 2, 4, 8, 8
    x = numbers(heads, dim, length, seed=0)
    B, C = (numbers(groups, length, states, seed=seed) for seed in (1, 2))
    decay = [[0.3 + 0.1 * ((3 * h + t) % 5) for t in range(length)] for h in range(heads)]
    skip = numbers(heads, seed=3)

    def decayed(h: int, first: int, last: int) -> float:
        """The product of the decays of the steps after `first` up to `last`."""
        value = 1.0
        for t in range(first + 1, last + 1):
            value *= decay[h][t]
        return value

    Number.operations, y = 0, {}
    scores = {
        (g, t, s): dot(C[g][t], B[g][s])
        for g in range(groups)
        for start in range(0, length, chunk)
        for t in range(start, start + chunk)
        for s in range(start, start + chunk)
    }
    for h in range(heads):
        g = h // (heads // groups)
        for p in range(dim):
            carried = [Number(0.0)] * states
            for start in range(0, length, chunk):
                inside = range(start, start + chunk)
                for t in inside:
                    # Decays are elementwise factors, which are not counted; kernels sum over the whole chunk.
                    row = [Number(scores[g, t, s].value * decayed(h, s, t) if s <= t else 0.0) for s in inside]
                    within = dot(row, [x[h][p][s] for s in inside])
                    read = [Number(value.value * decayed(h, start - 1, t)) for value in C[g][t]]
                    # The two are summed up in one accumulator.
                    before = dot(read, carried)
                    y[h, p, t] = within.value + before.value + (skip[h] * x[h][p][t] + Number(0.0)).value
                last = start + chunk - 1
                made = [
                    dot([Number(B[g][s][n].value * decayed(h, s, last)) for s in inside], [x[h][p][s] for s in inside])
                    for n in range(states)
                ]
                step = Number(decayed(h, start - 1, last))
                carried = [step * old + new for old, new in zip(carried, made, strict=True)]
    result = estimate(TINY["mamba2"].config(), state_size=3, length=length)
    assert result.before.flops["scan"].total * length == 2 * Number.operations

    for h in range(heads):
        for p in range(dim):
            state = [0.0] * states
            for t in range(length):
                g = h // (heads // groups)
                state = [decay[h][t] * a + B[g][t][n].value * x[h][p][t].value for n, a in enumerate(state)]
                expected = sum(C[g][t][n].value * a for n, a in enumerate(state)) + skip[h].value * x[h][p][t].value
                assert y[h, p, t] == pytest.approx(expected)


def test_sixteen_bytes_per_parameter_on_one_rank():
    """ZeRO's account of Adam in mixed precision, which DDP and FSDP2 come to in another way."""
    result = estimate(TINY["mamba2"].config(), state_size=3)
    for strategy, held in result.before.bytes_per_rank.items():
        steps = 0 if strategy.startswith("zero") else 4 * len(list(TINY["mamba2"].build().parameters()))
        assert sum(held.values()) == 16 * result.before.parameters + steps


@pytest.mark.parametrize(
    "strategy, weights, gradients, optimizer",
    [
        ("ddp", 4, 4, 8),
        ("fsdp2", 4 / 4, 4 / 4, 8 / 4),
        ("zero1", 2, 2, 12 / 4),
        ("zero2", 2, 2 / 4, 12 / 4),
        ("zero3", 2 / 4, 2 / 4, 12 / 4),
    ],
)
def test_bytes_per_rank_by_strategy(strategy, weights, gradients, optimizer):
    config, _ = PUBLISHED["mamba-2.8b"]
    size = estimate(config, state_size=8, world_size=4).before
    held = size.bytes_per_rank[strategy]
    for name, expected in (("weights", weights), ("gradients", gradients), ("optimizer", optimizer)):
        assert held[name] == pytest.approx(expected * size.parameters, rel=1e-5)


def test_bytes_per_rank_of_real_shards():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = MAMBA2_FAMILY["bamba"].build()
    expected = estimate(model.config, state_size=3, world_size=3, strategy="fsdp2").before.bytes_per_rank["fsdp2"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        fully_shard(model)
        shards = [parameter.to_local() for parameter in model.parameters()]
    finally:
        dist.destroy_process_group()
    assert expected["weights"] == sum(shard.nbytes for shard in shards)
    assert expected["optimizer"] == 2 * expected["weights"] + 4 * len(shards)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1"])
def test_memory_of_real_statistics_and_recordings(name):
    sequences, length = 2, 16
    model = FAMILY[name].build()
    result = estimate(model.config, state_size=3, tokens=60, sequences=sequences, length=length, dtype="float32")
    recorder = InputRecorder(model, tokens=60)
    for seed in range(4):
        ids = tokens(sequences, length, seed)
        model.train()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    statistics = measure(model, recorder.batches)
    recorder.remove()
    # 60 tokens are asked for, two batches of 32 are kept.
    assert result.cut.tokens == 64 == next(iter(statistics.values())).tokens
    tensors = [[*layer.sums, layer.A, layer.B_norm, layer.C_norm] for layer in statistics.values()]
    assert result.cut.device["statistics"] == sum(tensor.nbytes for layer in tensors for tensor in layer)
    inputs = [hidden for layer in statistics.values() for hidden, _ in layer.inputs]
    assert result.cut.host["mixer inputs"] == sum(hidden.nbytes for hidden in inputs)
    assert result.cut.host["recorded batches"] == 2 * 3 * tokens(sequences, length).nbytes
    assert result.cut.layers_per_rank == len(statistics)


@pytest.mark.parametrize("strategy, autocast", [("ddp", True), ("zero1", False)])
def test_mixer_inputs_are_as_wide_as_training_makes_them(strategy, autocast):
    """Autocast leaves them float32, 16-bit weights do not."""
    model, ids, seen = TINY["mamba2"].build(), tokens(2, 16), []
    if not autocast:
        model.bfloat16()
    for mixer in find_mixers(model).values():
        mixer.module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids)
    cut = estimate(model.config, state_size=3, tokens=32, sequences=2, length=16, strategy=strategy).cut
    assert cut.host["mixer inputs"] == sum(hidden.nbytes for hidden in seen) > 0


@pytest.mark.parametrize("name, projected", [("mamba", False), ("mamba2", True)])
def test_memory_of_real_fits(name, projected):
    model = TINY[name].build()
    statistics = measure(model, [tokens(2, 16)])
    layer_name, layer = next(iter(statistics.items()))
    mixer = find_mixers(model)[layer_name]
    if projected:
        basis = torch.eye(8).expand(2, -1, -1)
        system = _token_sums(mixer, layer, basis, basis)
    else:
        kept = torch.tensor([0, 2, 5])
        start = mean_field_readout(layer.state_gram[0], kept)
        recurrences = kept_recurrences(mixer, layer, kept[None])
        (system,) = systems_of(recurrences, selection(kept[None], 8), start[None])
    expected = sum(tensor.nbytes for tensor in vars(system).values() if tensor is not None)
    assert token_system_bytes(8, 3, mixer.groups, 32, projected) == expected


def test_coordinates_that_a_projection_is_fitted_in():
    """Four for each state kept, but at least 32 and at most all."""
    for kept, coordinates in ((4, 32), (16, 64), (100, 128)):
        expected = 4 * 10 * 2 * (coordinates**2 + 2 * coordinates + 1)
        assert token_system_bytes(128, kept, groups=2, tokens=10, projected=True) == expected


class LiveTensors(TorchDispatchMode):
    """Within this mode, the bytes of the tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and item.untyped_storage()._cdata not in self.sizes:
                storage = item.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(
    "name, size, kept, realization",
    [
        ("mamba", 64, 4, "stock"),
        ("mamba", 32, 24, "stock"),
        ("mamba2", 64, 4, "stock"),
        ("mamba2", 32, 8, "projected"),
    ],
)
def test_peak_of_tensors_alive_in_a_cut(name, size, kept, realization):
    """Within a quarter: working memory is an account of the largest tensors, not of all."""
    options = {"num_heads": 8, "head_dim": 16, "n_groups": 2} if name == "mamba2" else {}
    config = TINY[name].config(hidden_size=64, state_size=size, num_hidden_layers=1, **options)
    model = TINY[name].language_model(config)
    ((layer, mixer),) = find_mixers(model).items()
    with LiveTensors() as live:
        statistics = StateStatistics.empty(mixer)
        for _ in range(4):
            statistics.update(mixer, torch.randn(32, 32, 64), None)
        plan_compression(model, {layer: statistics}, CompreSSMConfig(state_size=kept, realization=realization))
    options = {"tokens": 4096, "sequences": 32, "length": 32, "dtype": "float32", "device": "cpu"}
    cut = estimate(config, state_size=kept, realization=realization, **options).cut
    assert live.peak == pytest.approx(cut.device_peak + cut.host["mixer inputs"], rel=0.25)


@pytest.mark.parametrize("name, realization", [("mamba", "stock"), ("mamba2", "stock"), ("mamba2", "projected")])
def test_communication_of_a_real_cut(name, realization):
    """What one process has of everything is what several have to tell each other."""
    model = FAMILY[name].build()
    batches = [tokens(2, 16, seed) for seed in range(4)]
    options = {"state_size": 3, "tokens": 128, "sequences": 2, "length": 16, "world_size": 2, "dtype": "float32"}
    results = {
        strategy: estimate(model.config, realization=realization, strategy=strategy, **options).cut
        for strategy in STRATEGIES
    }
    statistics = measure(model, batches)
    plan = plan_compression(model, statistics, CompreSSMConfig(state_size=3, realization=realization))
    old = {id(parameter): parameter for parameter in model.parameters()}
    compress_(model, plan)
    new = [parameter for parameter in model.parameters() if id(parameter) not in old]
    replaced = [parameter for key, parameter in old.items() if key not in {id(item) for item in model.parameters()}]
    fits = name == "mamba" or realization == "projected"
    inputs = sum(hidden.nbytes for layer in statistics.values() for hidden, _ in layer.inputs) if fits else 0
    whole = sum(parameter.nbytes for parameter in old.values())
    expected = {
        "sums, all-reduced": sum(tensor.nbytes for layer in statistics.values() for tensor in layer.sums),
        "mixer inputs, gathered by the layers' owners": inputs,
        "matrices of the plan, all-gathered": sum(tensor.nbytes for tensor in plan.tensors().values()),
    }
    touched = sum(parameter.nbytes for parameter in replaced)
    for strategy, (broadcast, collected, moved) in {
        "ddp": (sum(parameter.nbytes for parameter in new), 0, 0),
        # Weights and two moments.
        "fsdp2": (0, 3 * touched, 0),
        # In float32 the two moments only.
        "zero1": (sum(parameter.nbytes for parameter in new), 2 * touched, 2 * (whole - touched)),
        "zero3": (0, 0, 0),
    }.items():
        carried = results[strategy].communication
        assert list(carried.values()) == [*expected.values(), broadcast, collected, moved], strategy
        assert {key: carried[key] for key in expected} == expected
    for cut in results.values():
        assert cut.tokens == 128 and cut.layers_per_rank == 1
        # Of the layers that this rank owns, one of two, the inputs of both ranks.
        assert cut.host["inputs of own layers from all ranks"] == inputs // 2
    assert not any(estimate(model.config, state_size=2).cut.communication.values())


def test_parameters_that_a_sharded_forward_pass_gathers():
    config = MAMBA2_FAMILY["zamba2"].config()
    model = MAMBA2_FAMILY["zamba2"].build()
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.model.layers]
    unsharded = {id(parameter) for block in model.model.layers for parameter in block.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in unsharded)
    device = estimate(config, state_size=3, world_size=2, strategy="zero3").cut.device
    assert device["gathered parameters"] == 2 * (max(blocks) + outside)
    # The first rank owns the first and the third of three mixers.
    mixers = list(find_mixers(model).values())[::2]
    copies = sum(parameter.numel() for mixer in mixers for parameter in mixer.module.parameters())
    assert device["whole copies of own mixers"] == 2 * copies
    for strategy, world_size in (("ddp", 2), ("zero2", 2), ("zero3", 1)):
        device = estimate(config, state_size=3, world_size=world_size, strategy=strategy).cut.device
        assert device["gathered parameters"] == device["whole copies of own mixers"] == 0


@pytest.mark.parametrize("state_size", [1, 4, 0.25])
def test_default_tokens_are_those_that_a_cut_waits_for(state_size):
    config = TINY["mamba"].config(state_size=128)
    compressor = Compressor(
        CompreSSMConfig(state_size=state_size), TINY["mamba"].build(state_size=128), total_steps=99
    )
    result = estimate(config, state_size=state_size, length=1)
    assert result.settings["tokens"] == result.cut.tokens == compressor.wanted_tokens
    compressor.remove()


def test_kernel_sizes():
    assert [kernel_size(size) for size in (1, 15, 16, 17, 32, 33, 96, 128)] == [16, 16, 16, 32, 32, 64, 128, 128]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda item: item.source[:24])
def test_the_line_runs_through_the_measured_times(benchmark):
    time, worst = fitted_times(benchmark)
    deviations = [abs(time(point) / measured - 1) for point, measured in benchmark.times.items()]
    assert max(deviations) == pytest.approx(worst) and worst < 0.08
    # A step costs something without states, and each state costs something.
    assert 0 < time((0, 0) if benchmark.device == "cpu" else (16, 16)) < time((64, 64)) < time((128, 128))


def test_table_of_times_is_what_the_speed_benchmark_wrote():
    results = json.loads((Path(__file__).parents[1] / "recipes/bench/results/speed-cpu.json").read_text())
    times = {item.layout: item.times for item in BENCHMARKS if "speed-cpu" in item.source}
    for row in results["steps"]:
        layout = {"mamba": "Mamba-1", "mamba2": "Mamba-2"}[row["architecture"]]
        point = (row["state_size"], row["state_size"])
        # Another run on another machine may differ, but not tell another story.
        assert times[layout][point] / times[layout][128, 128] == pytest.approx(
            row["step_ms"]["median"] / results["steps"][0 if layout == "Mamba-1" else 6]["step_ms"]["median"], rel=0.3
        )


def step_time(config, size, **options):
    return estimate(config, state_size=size, **options).step_times


def test_step_time_of_the_measured_model():
    """A model as wide as the measured one: the ratio of its own measured times, in both readings."""
    config = Mamba2Config(hidden_size=768, num_heads=24, head_dim=64, n_groups=1, state_size=128, num_hidden_layers=2)
    (step,) = step_time(config, 16)
    assert step.ratio == pytest.approx(65 / 195, rel=0.1)
    assert step.ratio_by_width == pytest.approx(step.ratio) and step.mixer_share == 1 and not step.extrapolated
    # Kernels pad: fewer than 16 states save nothing more, and 96 nothing at all.
    (small,), (pad,) = step_time(config, 8), step_time(config, 96)
    assert small.ratio == step.ratio and not small.extrapolated
    assert pad.ratio == 1


def test_step_time_of_wider_and_mixed_models():
    (wide,) = step_time(PUBLISHED["codestral-mamba-7b"][0], 16)
    (mixed,) = step_time(PUBLISHED["nemotron-h-8b"][0], 16)
    assert wide.ratio < wide.ratio_by_width < 1
    assert mixed.mixer_share < 0.5 < wide.mixer_share == 1
    assert mixed.ratio == pytest.approx(1 - mixed.mixer_share * (1 - wide.ratio))


def test_step_time_on_a_cpu():
    config = TINY["mamba"].config(hidden_size=64, state_size=128)
    (step,) = step_time(config, 16, device="cpu")
    assert step.ratio == pytest.approx(145.3 / 950.3, rel=0.15) and not step.extrapolated
    # On a CPU nothing is padded; fewer than 8 states were not measured.
    (fewer,) = step_time(config, 4, device="cpu")
    assert fewer.ratio < step.ratio and fewer.extrapolated
    assert step_time(TINY["mamba"].config(state_size=256), 16, device="cpu")[0].extrapolated


def test_step_time_of_projected_models():
    config = TINY["mamba2"].config(hidden_size=64, num_heads=2, head_dim=64, n_groups=1, state_size=128)
    (projected,) = step_time(config, 12, device="cpu", realization="projected")
    stock, other = step_time(config, 12, device="cpu")
    assert "layers of hidden size 64" in stock.source and "layer of hidden size 128" in other.source
    assert projected.ratio == pytest.approx(51.3 / 68.5, rel=0.05) and stock.ratio < projected.ratio < 1
    # Nobody measured them with the CUDA kernels; and Mamba-1 with them, at several sizes, neither.
    for result in (
        estimate(config, state_size=12, realization="projected"),
        estimate(TINY["mamba"].config(), state_size=3),
    ):
        assert result.step_times == ()
        assert any("no step time" in assumption for assumption in result.assumptions)


def test_a_projected_config_is_cut_further():
    model = TINY["mamba2"].build()
    compress_(model, projection_plan(model, 6))
    result = estimate(model.config, state_size=3, dtype="float32")
    compress_(model, projection_plan(model, 3))
    assert result.before.state_size == 6 and result.after.parameters == model.num_parameters()


def test_what_is_shown_and_saved():
    result = estimate(MAMBA2_FAMILY["granitemoehybrid"].config(), state_size=3, world_size=2, strategy="zero2")
    text = str(result)
    for part in ("before", "2 × zero2", "experts", "attention", "sums, all-reduced", "expected step time", "zero3"):
        assert part in text
    assert all(assumption in text for assumption in result.assumptions) and len(result.assumptions) > 8
    values = json.loads(json.dumps(result.to_dict()))
    assert values["before"]["training_flops"] == 3 * values["before"]["forward_flops"] == result.before.training_flops
    assert values["cut"]["device_peak"] == result.cut.device_peak > values["cut"]["device"]["statistics"]
    assert values["cut"]["host_peak"] == sum(values["cut"]["host"].values())
    assert values["settings"]["tokens"] == 4096


def test_peak_of_the_device_counts_what_is_there_at_once():
    device = (result := estimate(TINY["mamba"].config(), state_size=3, world_size=2, strategy="fsdp2")).cut.device
    turns = ("measuring a batch", "fitting a layer", "replacing parameters")
    assert all(device[name] > 0 for name in turns)
    rest = sum(value for name, value in device.items() if name not in turns)
    assert result.cut.device_peak == rest + max(device[name] for name in turns)


@pytest.mark.parametrize(
    "config, options, error, message",
    [
        (TINY["mamba"].config(), {"state_size": 8}, ValueError, "state_size is 8, .* a mixer of the model has 8"),
        (TINY["mamba"].config(), {"state_size": 9}, ValueError, "9 states, but"),
        (TINY["mamba"].config(), {"state_size": 0}, ValueError, r"at least 1 .* got 0"),
        (TINY["mamba"].config(), {"state_size": 1.5}, ValueError, "between 0 and 1, got 1.5"),
        (TINY["mamba"].config(), {"state_size": True}, TypeError, "got True"),
        (TINY["mamba"].config(), {"state_size": "4"}, TypeError, "got '4'"),
        (TINY["mamba"].config(), {"strategy": "zero4"}, ValueError, "ddp, fsdp2, zero1, zero2, zero3, got 'zero4'"),
        (TINY["mamba"].config(), {"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        (TINY["mamba"].config(), {"world_size": 2.0}, TypeError, "world_size must be a whole number, got 2.0"),
        (TINY["mamba"].config(), {"tokens": 0}, ValueError, "tokens must be at least 1"),
        (TINY["mamba"].config(), {"dtype": "int8"}, ValueError, "bfloat16, float16, float32, got 'int8'"),
        (TINY["mamba"].config(), {"optimizer": "adam"}, ValueError, "adamw, lion, sgd, got 'adam'"),
        (TINY["mamba"].config(), {"realization": "both"}, ValueError, "stock, projected, auto, got 'both'"),
        (TINY["mamba"].config(), {"realization": "projected"}, ValueError, "MambaMixer cannot be projected"),
        (TINY["mamba"].config(), {"device": "tpu"}, ValueError, "cuda, cpu, got 'tpu'"),
        (GPT2Config(), {}, ValueError, "GPT2Config .*has no mixer.* supported model types: bamba, falcon_h1"),
        ({"hidden_size": 8}, {}, TypeError, "must be a Transformers config, got dict"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_input(config, options, error, message):
    with pytest.raises(error, match=message):
        estimate(config, **{"state_size": 3} | options)


def test_unknown_architecture(monkeypatch):
    config = FalconMambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8, state_size=8)
    others = {name: row for name, row in ARCHITECTURES.items() if name != "FalconMambaMixer"}
    monkeypatch.setattr("hf_compressm.mixers.architectures.ARCHITECTURES", others)
    with pytest.raises(TypeError, match=r"FalconMambaConfig .*FalconMambaMixer.* supported model types"):
        estimate(config, state_size=3)


def test_dtypes_of_torch_are_understood():
    config = TINY["mamba"].config()
    for dtype in DTYPES:
        assert estimate(config, state_size=3, dtype=getattr(torch, dtype)) == estimate(
            config, state_size=3, dtype=dtype
        )


@pytest.mark.parametrize(
    ("name", "strategy", "realization"),
    [
        ("mamba", "ddp", "stock"),
        ("mamba2", "ddp", "projected"),
        ("mamba2", "fsdp2", "projected"),
        ("mamba2", "zero2", "stock"),
    ],
)
def test_by_default_what_can_be_projected_is(name, strategy, realization):
    """DeepSpeed's ZeRO cannot start the parameters that a projection adds."""
    options = {"state_size": 3, "world_size": 2, "strategy": strategy}
    expected = estimate(TINY[name].config(), realization=realization, **options)
    assert estimate_by_default(TINY[name].config(), **options) == expected
    assert estimate(TINY[name].config(), realization="auto", **options) == expected
