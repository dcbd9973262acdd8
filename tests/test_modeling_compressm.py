"""The projected model classes: everything that the stock ones can do, with a state smaller than its features."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import (
    MAMBA2_FAMILY,
    VOCABULARY,
    Relative,
    projection_plan,
    selection_plan,
    silence_states,
    stir,
    tokens,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaModel,
    PreTrainedModel,
    Zamba2ForSequenceClassification,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, Mamba2PreTrainedModel

from hf_compressm import CompreSSMConfig, compress, compress_, find_mixers, projected_class
from hf_compressm.mixers.resize import resize_mixer, update_configs
from hf_compressm.modeling_compressm import (
    CONFIG_CLASSES,
    MODEL_CLASSES,
    CompressmMamba2Config,
    CompressmMamba2ForCausalLM,
    CompressmMamba2Model,
    project_mixer,
    stock_class,
    unproject_mixer,
)

SILENT = [[1, 3, 4, 6], [0, 1, 2, 5]]
MASK = torch.ones(4, 12, dtype=torch.long)
MASK[0, :4] = 0
MASK[2, :1] = 0
NAMES = ("B_projection", "C_projection")
GENERATION = {
    "cache": {"use_cache": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
}
# Falcon-H1's norm loses a dimension where the sequence is one step long, in older versions of Transformers.
NORM_TAKES_STEPS = FalconH1RMSNormGated(8)(torch.ones(2, 1, 8)).shape == (2, 1, 8)
# A single step of Zamba2 and Nemotron-H does not keep Δ above its limit, in Transformers itself; where a test compares
# such steps with a whole sequence, the limit must not matter.
NO_LIMIT = {"time_step_min": 1e-6}


@pytest.fixture(params=[name for name in MAMBA2_FAMILY if NORM_TAKES_STEPS or name != "falcon_h1 with a norm"])
def decoder(request) -> Relative:
    """Each architecture that can be run step by step."""
    return MAMBA2_FAMILY[request.param]


def projected(relative: Relative, sizes: int | list[int] = 4, **options) -> PreTrainedModel:
    """A model with random projections, in evaluation mode."""
    model = stir(relative.build(**options))
    compress_(model, projection_plan(model, sizes))
    return model.eval()


def different_sizes(relative: Relative) -> list[int]:
    """Another number of states in each layer."""
    return [4, 2, 3][: len(find_mixers(relative.build()))]


def logits(model: nn.Module, mask: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    """A model's logits for the real tokens, in evaluation mode."""
    inputs = inputs or {"input_ids": tokens()}
    with torch.no_grad():
        output = model.eval()(attention_mask=mask, **inputs)
    result = output[0]
    return result if mask is None else result[mask.bool()]


def generate(model: PreTrainedModel, padded: bool = False, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and the logits or scores that they were chosen by."""
    mask = MASK[:, :6] if padded else None
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    output = model.eval().generate(
        tokens(4, 6), attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
    )
    return output.sequences, torch.stack(output.logits)


def assert_close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def assert_same_parameters(one: nn.Module, two: nn.Module) -> None:
    """Bit by bit, buffers that are not saved included."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(one, kind)()), dict(getattr(two, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_the_models_of_these_tests_depend_on_their_states(relative):
    model = stir(relative.build())
    before = logits(model)
    compress_(model, projection_plan(model, 1))
    assert (logits(model) - before).abs().mean() > 0.03 * before.abs().mean()


class TestLossless:
    @pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "left padding"])
    def test_a_change_of_basis(self, relative, mask):
        model = stir(relative.build())
        before = logits(model, mask)
        compress_(model, projection_plan(model, 8))
        assert all(mixer.is_projected and mixer.state_size == 8 for mixer in find_mixers(model).values())
        assert_close(logits(model, mask), before)

    def cut(self, relative: Relative) -> tuple[PreTrainedModel, PreTrainedModel]:
        """A model in which four of eight states do anything, and another in each group; then the same projected."""
        uncut = stir(relative.build())
        silence_states(uncut, SILENT)
        model = copy.deepcopy(uncut)
        report = compress(model, [tokens(8, 24, seed=1)], CompreSSMConfig(state_size=4, realization="projected"))
        assert all(layer.relative_error < 1e-3 for layer in report.layers)
        assert all(mixer.state_size == 4 for mixer in find_mixers(model).values())
        return uncut, model

    @pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "left padding"])
    def test_logits(self, relative, mask):
        uncut, model = self.cut(relative)
        assert_close(logits(model, mask), logits(uncut, mask))

    @pytest.mark.parametrize("padded", [False, True], ids=["no mask", "left padding"])
    @pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
    def test_generation(self, decoder, options, padded):
        uncut, model = self.cut(decoder)
        (before, scores_before), (after, scores_after) = (generate(m, padded, **options) for m in (uncut, model))
        assert before.shape == (4, 12) and torch.equal(after, before)
        assert_close(scores_after, scores_before)

    def test_gradients(self, relative):
        uncut, model = self.cut(relative)
        # The silent features have none before, since nothing reads them.
        ours = gradients_of(model)
        for name, gradient in gradients_of(uncut).items():
            assert_close(ours[name][gradient != 0], gradient[gradient != 0], 1e-3)


class TestUse:
    def test_cached_steps_equal_the_whole_sequence(self, decoder):
        """A prompt, two single tokens, a longer piece, and a single token."""
        model = projected(decoder, different_sizes(decoder), **NO_LIMIT)
        cache = DynamicCache(config=model.config)
        assert_close(stepwise(model, cache, [0, 5, 6, 7, 11, 12]), logits(model))
        for mixer in find_mixers(model).values():
            state = cache.layers[mixer.module.layer_idx].recurrent_states[0]
            assert state.shape == (4, 4, 8, mixer.state_size)

    def test_a_cache_that_keeps_the_past(self, decoder):
        """As assisted decoding wants it, to take tokens back."""
        model = projected(decoder, **NO_LIMIT)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        assert_close(stepwise(model, cache, [0, 5, 6, 7, 11, 12]), logits(model))
        for mixer in find_mixers(model).values():
            assert cache.layers[mixer.module.layer_idx].conv_states[0].shape == (4, 64, 12)

    @pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
    def test_every_way_of_generating_gives_the_logits_of_a_forward(self, decoder, options):
        model = projected(decoder, different_sizes(decoder), **NO_LIMIT)
        if "num_beams" in options:
            assert torch.equal(*(generate(model, num_beams=3, use_cache=use_cache)[0] for use_cache in (True, False)))
            return
        sequences, chosen_by = generate(model, **options)
        assert_close(chosen_by.transpose(0, 1), logits(model, input_ids=sequences)[:, 5:-1])

    def test_padding_changes_nothing(self, relative):
        model = projected(relative)
        alone = logits(model, input_ids=tokens()[:1, 4:])
        assert_close(logits(model, MASK)[:8], alone[0])

    def test_padding_changes_nothing_in_generation(self, decoder):
        model = projected(decoder, **NO_LIMIT)
        assert_close(generate(model, padded=True)[1][:, 2], generate_alone(model, tokens(4, 6)[2:3, 1:]))

    def test_inputs_embeds(self, relative):
        model = projected(relative)
        embeddings = model.get_input_embeddings()(tokens())
        assert_close(logits(model, inputs_embeds=embeddings), logits(model))

    def test_gradient_checkpointing(self, relative):
        model = projected(relative)
        expected, runs = gradients_of(model), []
        first_mixer(model).register_forward_pre_hook(lambda *_: runs.append(True))
        model.gradient_checkpointing_enable()
        gradients = gradients_of(model)
        # Once more in the backward pass.
        assert len(runs) == 2
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], 1e-6)
            if name.endswith(NAMES):
                assert gradient.abs().max() > 0

    def test_a_training_step_moves_both_projections_of_every_layer(self, relative):
        model = projected(relative).train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        after = dict(model.named_parameters())
        moved = [name for name in before if name.endswith(NAMES) and not torch.equal(before[name], after[name])]
        assert len(moved) == 2 * len(find_mixers(model))

    def test_gradients_of_the_projections_are_those_of_finite_differences(self):
        """In float64, with two groups."""
        mixer = first_mixer(projected(MAMBA2_FAMILY["mamba2"])).double()
        generator = torch.Generator().manual_seed(1)
        hidden_states = torch.randn(2, 10, 16, generator=generator, dtype=torch.float64)

        def output(B_projection: torch.Tensor, C_projection: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(
                mixer, {"B_projection": B_projection, "C_projection": C_projection}, (hidden_states,)
            ).sum()

        matrices = tuple(getattr(mixer, name).detach().requires_grad_() for name in NAMES)
        gradients = torch.autograd.grad(output(*matrices), matrices)
        direction = [torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype) for matrix in matrices]
        with torch.no_grad():
            step = 1e-3
            ahead, back = (
                output(*(matrix + sign * step * d for matrix, d in zip(matrices, direction, strict=True)))
                for sign in (1, -1)
            )
        expected = sum((gradient * d).sum() for gradient, d in zip(gradients, direction, strict=True))
        assert ((ahead - back) / (2 * step)).item() == pytest.approx(expected.item(), rel=1e-3)

    def test_compiled(self):
        """Into one graph, without a break, as the stock model."""
        model = projected(MAMBA2_FAMILY["mamba2"], num_hidden_layers=1)
        expected = logits(model)
        gradients = gradients_of(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(logits(compiled, input_ids=tokens(), use_cache=False), expected)
        for name, gradient in gradients_of(compiled).items():
            assert_close(gradient, gradients[name])

    def test_compiled_steps_with_a_cache(self):
        model = projected(MAMBA2_FAMILY["mamba2"], num_hidden_layers=1)
        expected = logits(model)
        compiled = torch.compile(model, backend="eager")
        assert_close(stepwise(compiled, DynamicCache(config=model.config), [0, 5, 6, 7]), expected[:, :7])

    def test_bfloat16(self, relative):
        model = projected(relative)
        exact = logits(model)
        model = model.to(torch.bfloat16)
        # Where experts are chosen, rounding may choose another one for a token.
        assert median_distance(logits(model), exact) < 0.05
        gradients = gradients_of(model)
        for mixer in find_mixers(model).values():
            assert all(gradients[f"{mixer.name}.{name}"].abs().sum() > 0 for name in NAMES)

    def test_bfloat16_step_by_step(self, decoder):
        model = projected(decoder).to(torch.bfloat16)
        sequences, chosen_by = generate(model)
        assert median_distance(chosen_by.transpose(0, 1), logits(model, input_ids=sequences)[:, 5:-1]) < 0.05

    def test_autocast(self, relative):
        model = projected(relative)
        exact = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logits(model)
        assert median_distance(rounded, exact) < 0.05


def median_distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Over the tokens, relative to the norm of the second's logits."""
    return float(((one - two).norm(dim=-1) / two.norm(dim=-1)).median())


def stepwise(model: nn.Module, cache: DynamicCache, cuts: list[int]) -> torch.Tensor:
    """Logits of the tokens fed piece by piece."""
    parts = []
    for first, last in itertools.pairwise(cuts):
        # Mamba-2 has no positions, and its own name for the cache.
        inputs = {"past_key_values": cache, "position_ids": torch.arange(first, last)[None]}
        if "cache_params" in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters:
            inputs = {"cache_params": cache}
        parts.append(logits(model, input_ids=tokens()[:, first:last], use_cache=True, **inputs))
    return torch.cat(parts, dim=1)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the training loss; a compiled model's names are those of the model in it."""
    model.zero_grad()
    model.train()(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    parameters = getattr(model, "_orig_mod", model).named_parameters()
    return {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}


def generate_alone(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """The logits of the six greedy tokens after one prompt."""
    for _ in range(6):
        prompt = torch.cat([prompt, logits(model, input_ids=prompt)[:, -1:].argmax(-1)], dim=1)
    return logits(model, input_ids=prompt)[0, -7:-1]


def first_mixer(model: nn.Module) -> nn.Module:
    return next(iter(find_mixers(model).values())).module


class TestSaving:
    @pytest.mark.parametrize("different", [False, True], ids=["one size", "sizes by layer"])
    def test_round_trip(self, relative, different, tmp_path):
        sizes = different_sizes(relative) if different else 4
        model = projected(relative, sizes)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(model) and type(model) in MODEL_CLASSES
        assert issubclass(type(model), relative.language_model)
        assert_same_parameters(loaded, model)
        assert_close(logits(loaded), logits(model), 1e-6)
        ranks = [mixer.state_size for mixer in find_mixers(loaded).values()]
        assert ranks == (sizes if different else [4] * len(ranks))

        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is type(model.config) and type(config) in CONFIG_CLASSES
        assert config.model_type == f"compressm_{relative.config_class.model_type}"
        assert config.feature_size == 8 and getattr(config, config.state_size_field) == min(ranks)
        assert config.state_ranks == (sizes if different and len(sizes) > 1 else None)

        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) in MODEL_CLASSES and issubclass(type(base), relative.base_model)
        assert_close(logits(base), logits(model.base_model), 1e-6)

    def test_a_base_model(self, relative, tmp_path):
        model = stir(relative.build_base())
        compress_(model, projection_plan(model, 4))
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is type(model) and issubclass(type(model), relative.base_model)
        assert_same_parameters(loaded, model)
        assert_close(logits(loaded), logits(model), 1e-6)

    def test_saved_again_after_loading(self, relative, tmp_path):
        model = projected(relative, different_sizes(relative))
        model.save_pretrained(tmp_path / "first")
        AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        for file in ("config.json", "modeling_compressm.py", "model.safetensors"):
            assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()

    def test_in_shards(self, relative, tmp_path):
        model = projected(relative)
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same_parameters(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_in_bfloat16(self, relative, tmp_path):
        """What is kept in float32 is what the stock class keeps so."""
        stock = stir(relative.build())
        model = copy.deepcopy(stock)
        compress_(model, projection_plan(model, 4))
        stock.save_pretrained(tmp_path / "stock")
        model.save_pretrained(tmp_path / "projected")
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
            for name in ("projected", "stock")
        )
        for kind in ("named_parameters", "named_buffers"):
            tensors = dict(getattr(ours, kind)())
            for name, tensor in getattr(theirs, kind)():
                assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
        for mixer in find_mixers(ours).values():
            for name in NAMES:
                exact = getattr(model.get_submodule(mixer.name), name)
                assert torch.equal(getattr(mixer.module, name), exact.to(torch.bfloat16))

    def test_a_model_that_was_loaded_before_it_was_cut(self, relative, tmp_path):
        """Transformers gives the weights of some architectures other names in files."""
        stir(relative.build()).save_pretrained(tmp_path / "stock")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
        compress_(model, projection_plan(model, 4))
        model.save_pretrained(tmp_path / "projected")
        assert saved_names(tmp_path / "projected") - saved_names(tmp_path / "stock") == {
            name for name in saved_names(tmp_path / "projected") if name.endswith(NAMES)
        }
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "projected", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same_parameters(loaded, model)
        loaded.save_pretrained(tmp_path / "again")
        assert saved_names(tmp_path / "again") == saved_names(tmp_path / "projected")

    def test_cut_again_after_loading(self, relative, tmp_path):
        model = projected(relative, 6)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        for one in (model, loaded):
            compress_(one, projection_plan(one, 2, seed=1))
        assert_same_parameters(loaded, model)
        loaded.save_pretrained(tmp_path / "again")
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model), 1e-6)

    def test_missing_matrices_start_orthonormal(self, relative, tmp_path):
        """A checkpoint of the stock model, with the fields of the projected config written into it by hand."""
        stock = stir(relative.build())
        stock.save_pretrained(tmp_path)
        field = next(iter(find_mixers(stock).values())).architecture.state_size_field
        edit_config(
            tmp_path, model_type=f"compressm_{stock.config.model_type}", feature_size=8, **{field: 4}, state_ranks=None
        )
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        mixers = find_mixers(model)
        assert set(info["missing_keys"]) == {f"{layer}.{name}" for layer in mixers for name in NAMES}
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        for mixer in mixers.values():
            assert_orthonormal(mixer.module)
        ours = dict(model.named_parameters())
        assert all(torch.equal(ours[name], parameter) for name, parameter in stock.named_parameters())
        for name, buffer in stock.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer)

    def test_a_sequence_classifier(self, tmp_path):
        torch.manual_seed(0)
        config = MAMBA2_FAMILY["zamba2"].config(num_labels=3)
        model = stir(Zamba2ForSequenceClassification(config))
        before = logits(model)
        compress_(model, projection_plan(model, 8))
        assert_close(logits(model), before)
        compress_(model, projection_plan(model, 4))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert_close(logits(loaded), logits(model), 1e-6)


def saved_names(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / "model.safetensors"))


def edit_config(directory: Path, **values) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_orthonormal(mixer: nn.Module) -> None:
    """W = V, with orthonormal columns in each group; a group's start is not another's."""
    assert torch.equal(mixer.B_projection, mixer.C_projection)
    matrices = mixer.B_projection.detach().unflatten(1, (mixer.n_groups, -1)).transpose(0, 1)
    gram = matrices.mT @ matrices
    torch.testing.assert_close(gram, torch.eye(mixer.ssm_state_size).expand_as(gram), rtol=0, atol=1e-5)
    assert not torch.allclose(matrices[0], matrices[1])


# Blocks the package, then loads each directory with and without remote code, and saves what it loaded once more.
WITHOUT_PACKAGE = """
import json, sys
from pathlib import Path
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
result = {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    tokens = torch.load(sys.argv[1])
    with torch.no_grad():
        logits = model(tokens).logits
    base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    torch.save({"logits": logits, "hidden": base(tokens)[0].detach()}, directory + "/outputs.pt")
    model.save_pretrained(directory + "/again")
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        error = None
    except Exception as e:
        error = str(e)
    result[directory] = {"class": type(model).__module__ + "." + type(model).__name__, "error": error}
try:
    import hf_compressm
except ImportError:
    result["blocked"] = True
Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps(result))
"""


def test_loading_without_the_package(tmp_path):
    """One process for all architectures: what takes long is the start."""
    models, directories = {}, {}
    for number, (name, relative) in enumerate(MAMBA2_FAMILY.items()):
        models[name], directories[name] = projected(relative, different_sizes(relative)), tmp_path / f"model{number}"
        models[name].save_pretrained(directories[name])
        assert "hf_compressm" not in (directories[name] / "config.json").read_text()
    torch.save(tokens(), tmp_path / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "tokens.pt"), *map(str, directories.values())],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        # Without a terminal nobody answers whether the code is to be trusted.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tokens.json").read_text())
    assert result["blocked"]
    for name, model in models.items():
        directory = directories[name]
        outcome = result[str(directory)]
        assert outcome["class"].startswith("transformers_modules.")
        assert outcome["class"].endswith(f".modeling_compressm.{type(model).__name__}")
        assert "trust_remote_code=True" in outcome["error"]
        outputs = torch.load(directory / "outputs.pt")
        assert_close(outputs["logits"], logits(model), 1e-6)
        assert_close(outputs["hidden"], logits(model.base_model), 1e-6)
        again = AutoModelForCausalLM.from_pretrained(directory / "again")
        assert type(again) is type(model)
        assert_same_parameters(again, model)
        assert (directory / "again" / "modeling_compressm.py").is_file()


def test_the_saved_file_is_this_packages(tmp_path):
    import hf_compressm.modeling_compressm

    projected(MAMBA2_FAMILY["mamba2"]).save_pretrained(tmp_path)
    saved = (tmp_path / "modeling_compressm.py").read_text()
    assert saved == Path(hf_compressm.modeling_compressm.__file__).read_text()


class TestBadInput:
    def test_the_plain_stock_class_cannot_load_it(self, relative, tmp_path):
        projected(relative).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            relative.language_model.from_pretrained(tmp_path)

    def test_the_plain_stock_class_cannot_load_it_where_a_layer_has_all_states(self, tmp_path):
        projected(MAMBA2_FAMILY["mamba2"], [8, 4]).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            Mamba2ForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            ({"state_size": 3}, "B_projection"),
            ({"state_size": 5}, "B_projection"),
            ({"state_ranks": [4, 3], "state_size": 3}, r"layers\.1\.mixer\.B_projection"),
            ({"feature_size": 9}, "in_proj"),
        ],
    )
    def test_a_config_that_does_not_match_the_weights(self, edit, message, tmp_path, caplog):
        """The error speaks of a report, and that names the parameters."""
        projected(MAMBA2_FAMILY["mamba2"]).save_pretrained(tmp_path)
        edit_config(tmp_path, **edit)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert re.search(rf"{message}.*MISMATCH", caplog.text)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"feature_size": None}, r"CompressmMamba2Config\.feature_size is not set.*feed the 4 states"),
            ({"state_size": 9}, r"state_size is 9; with feature_size 8 it must be one of 1\.\.8"),
            ({"state_size": 0}, r"state_size is 0; with feature_size 8 it must be one of 1\.\.8"),
            ({"state_ranks": [4]}, r"state_ranks has 1 numbers, \[4\], but the model has 2 mixers"),
            ({"state_ranks": [4, 4, 4]}, r"state_ranks has 3 numbers, \[4, 4, 4\], but the model has 2 mixers"),
            ({"state_ranks": [3, 4]}, r"state_ranks is \[3, 4\]; .*smallest equal to state_size, which is 4"),
            ({"state_ranks": [5, 6]}, r"state_ranks is \[5, 6\]; .*smallest equal to state_size, which is 4"),
            ({"state_ranks": [4, 9]}, r"state_ranks is \[4, 9\]; each must be one of 1\.\.8"),
            ({"state_ranks": [4, 0]}, r"state_ranks is \[4, 0\]; each must be one of 1\.\.8"),
            ({"state_ranks": []}, r"state_ranks is \[\]"),
        ],
    )
    def test_configs(self, options, message):
        config = scratch_config(MAMBA2_FAMILY["mamba2"], **options)
        with pytest.raises(ValueError, match=message):
            CompressmMamba2ForCausalLM(config)

    def test_the_message_has_the_architectures_own_name_of_the_field(self, relative):
        config = scratch_config(relative)
        setattr(config, config.state_size_field, 9)
        with pytest.raises(ValueError, match=rf"{type(config).__name__}\.{config.state_size_field} is 9"):
            projected_class(relative.base_model)(config)

    def test_a_mixer_with_a_forward_of_its_own_is_refused_before_anything_is_touched(self):
        model = stir(MAMBA2_FAMILY["mamba2"].build())
        module = model.backbone.layers[1].mixer
        module.__class__ = OwnForward
        before, config = copy.deepcopy(model), model.config.to_dict()
        with pytest.raises(TypeError, match=r"OwnForward has no projected form.*Mamba2Mixer"):
            compress_(model, projection_plan(model, 4))
        assert type(module) is OwnForward and type(model) is Mamba2ForCausalLM
        assert type(model.config) is Mamba2Config and model.config.to_dict() == config
        assert_same_parameters(model, before)
        # States may be selected all the same.
        compress_(model, selection_plan(model, [0, 2]))
        assert module.ssm_state_size == 2

    @pytest.mark.parametrize("stock", [MambaModel, GPT2Model, GPT2Config, nn.Linear])
    def test_classes_without_a_projected_form(self, stock):
        with pytest.raises(TypeError, match=r"has no projected form.*Mamba2Mixer"):
            projected_class(stock)


class OwnForward(Mamba2Mixer):
    def forward(self, hidden_states, *args, **kwargs):
        return 2 * super().forward(hidden_states, *args, **kwargs)


def scratch_config(relative: Relative, **options):
    """A projected config of four states fed by eight features."""
    config_class = projected_class(relative.config_class)
    fields = {config_class.state_size_field: 4, "feature_size": 8}
    return config_class(**relative.config().to_dict() | {"model_type": config_class.model_type} | fields | options)


class TestFromScratch:
    @pytest.mark.parametrize("different", [False, True], ids=["one size", "sizes by layer"])
    def test_the_matrices_start_orthonormal(self, relative, different):
        ranks = different_sizes(relative) if different else None
        torch.manual_seed(0)
        field = projected_class(relative.config_class).state_size_field
        sizes = {"state_ranks": ranks, field: min(ranks)} if different else {}
        model = projected_class(relative.language_model)(scratch_config(relative, **sizes))
        mixers = find_mixers(model)
        assert [mixer.state_size for mixer in mixers.values()] == (ranks or [4] * len(mixers))
        for mixer in mixers.values():
            assert_orthonormal(mixer.module)
            assert mixer.module.feature_size == 8

    @pytest.mark.parametrize("rank", [1, 6, 8])
    def test_groups_that_have_more_states_together_than_features(self, rank):
        torch.manual_seed(0)
        model = CompressmMamba2Model(scratch_config(MAMBA2_FAMILY["mamba2"], state_size=rank))
        for mixer in find_mixers(model).values():
            assert mixer.module.B_projection.shape == (8, 2 * rank)
            assert_orthonormal(mixer.module)

    def test_everything_else_starts_as_in_the_stock_class(self, relative):
        torch.manual_seed(0)
        stock = relative.language_model(relative.config())
        torch.manual_seed(0)
        model = projected_class(relative.language_model)(scratch_config(relative))
        for kind in ("parameters", "buffers"):
            ours = dict(getattr(model, f"named_{kind}")())
            theirs = dict(getattr(stock, f"named_{kind}")())
            assert {name for name in ours if not name.endswith(NAMES)} == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def test_it_trains_saves_and_loads(self, relative, tmp_path):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(scratch_config(relative))
        assert type(model) is projected_class(relative.language_model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model.train()(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_parameters(loaded, model)
        assert_close(logits(loaded), logits(model), 1e-6)

    def test_the_config_is_left_as_it_was_given(self, relative):
        config = scratch_config(relative)
        before = config.to_dict()
        projected_class(relative.language_model)(config)
        after = config.to_dict()
        assert {key: value for key, value in after.items() if key != "auto_map"} == before
        assert set(after["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


class Classifier(Mamba2PreTrainedModel):
    """A user's own model around stock mixers."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return (self.head(self.backbone(input_ids, attention_mask=attention_mask)[0].mean(1)),)


class OwnConfig(Mamba2Config):
    model_type = "own"


class ClassifierOfOwnConfig(Classifier):
    config_class = OwnConfig


class TestOwnClasses:
    @pytest.mark.parametrize(("own", "config_class"), [(Classifier, Mamba2Config), (ClassifierOfOwnConfig, OwnConfig)])
    def test_a_users_own_model_is_cut_saved_and_loaded(self, own, config_class, tmp_path):
        torch.manual_seed(0)
        model = stir(own(config_class(**MAMBA2_FAMILY["mamba2"].config().to_dict())))
        before = logits(model)
        compress_(model, projection_plan(model, 8))
        assert type(model) is projected_class(own) and isinstance(model, own)
        assert type(model.backbone) is CompressmMamba2Model and type(model.config) is projected_class(config_class)
        assert_close(logits(model), before)
        compress_(model, projection_plan(model, [4, 2]))
        model.save_pretrained(tmp_path)
        loaded = projected_class(own).from_pretrained(tmp_path)
        assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
        assert_same_parameters(loaded, model)
        assert_close(logits(loaded), logits(model), 1e-6)
        assert [mixer.state_size for mixer in find_mixers(loaded).values()] == [4, 2]
        if own is Classifier:
            # Its backbone can be had by itself.
            assert (tmp_path / "modeling_compressm.py").is_file()
            assert_same_parameters(AutoModel.from_pretrained(tmp_path), model.backbone)

    def test_a_users_mixer_without_a_forward_of_its_own(self):
        class Mine(Mamba2Mixer):
            def extra(self) -> int:
                return 7

        model = stir(MAMBA2_FAMILY["mamba2"].build())
        before = logits(model)
        model.backbone.layers[0].mixer.__class__ = Mine
        compress_(model, projection_plan(model, 8))
        mixer = model.backbone.layers[0].mixer
        assert isinstance(mixer, Mine) and mixer.extra() == 7 and stock_class(type(mixer)) is Mine
        assert_close(logits(model), before)

    def test_a_bare_mixer(self):
        """It has no config that anything could be written to."""
        torch.manual_seed(0)
        mixer = stir(Mamba2Mixer(MAMBA2_FAMILY["mamba2"].config(), layer_idx=0)).eval()
        hidden_states = torch.randn(2, 10, 16)
        before = mixer(hidden_states)
        compress_(mixer, projection_plan(mixer, 8))
        assert_close(mixer(hidden_states), before)

    def test_projected_and_stock_class_undo_each_other(self, relative):
        for stock in (relative.language_model, relative.base_model, relative.config_class):
            other = projected_class(stock)
            assert other is not stock and issubclass(other, stock)
            assert stock_class(other) is stock
            assert projected_class(other) is other and stock_class(stock) is stock


class TestResizing:
    def test_there_and_back(self, relative):
        model = stir(relative.build())
        original = copy.deepcopy(model)
        fields = model.config.to_dict()
        compress_(model, projection_plan(model, different_sizes(relative)))
        assert type(model) is not type(original) and model.config.to_dict() != fields
        for mixer in find_mixers(model).values():
            before = mixer.module.B_projection
            pairs = resize_mixer(mixer, 8)
            assert pairs[0] == (before, None) and [new for _, new in pairs] == [None, None]
        update_configs(model)
        assert type(model) is type(original) and type(model.config) is type(original.config)
        assert type(model.base_model) is type(original.base_model)
        assert [type(m.module) for m in find_mixers(model).values()] == [
            type(m.module) for m in find_mixers(original).values()
        ]
        assert model.config.to_dict() == fields
        assert_same_parameters(model, original)
        assert_close(logits(model), logits(original), 1e-6)

    def test_back_to_another_size(self, relative):
        model = projected(relative)
        for mixer in find_mixers(model).values():
            resize_mixer(mixer, 3)
        update_configs(model)
        assert type(model) is relative.language_model
        fresh = relative.language_model(copy.deepcopy(model.config))
        fresh.load_state_dict(stir(fresh).state_dict())
        model.load_state_dict(fresh.state_dict())
        assert_close(logits(model), logits(fresh), 1e-6)

    def test_from_stock_to_the_sizes_of_another_model(self, relative):
        sizes = different_sizes(relative)
        source, model = projected(relative, sizes), relative.build(seed=1)
        for mixer, size in zip(find_mixers(model).values(), sizes, strict=True):
            pairs = resize_mixer(mixer, size, 8)
            assert [old for old, _ in pairs] == [None, None]
            assert all(not getattr(mixer.module, name).any() for name in NAMES)
        update_configs(model)
        model.load_state_dict(source.state_dict())
        assert type(model) is type(source) and model.config.to_dict() == source.config.to_dict()
        assert_close(logits(model), logits(source), 1e-6)

    def test_another_number_of_features_is_refused(self):
        mixer = next(iter(find_mixers(projected(MAMBA2_FAMILY["mamba2"])).values()))
        with pytest.raises(ValueError, match="its states are projections of 8 features; it cannot take on 9"):
            resize_mixer(mixer, 4, 9)

    def test_the_mixer_stays_the_same_object(self, relative):
        model = stir(relative.build())
        mixer = first_mixer(model)
        seen, weight = [], mixer.in_proj.weight
        mixer.register_forward_hook(lambda *_: seen.append(True))
        stock = type(mixer)
        project_mixer(mixer, 3)
        assert type(mixer) is projected_class(stock) and mixer.ssm_state_size == 3 and mixer.feature_size == 8
        unproject_mixer(mixer)
        assert type(mixer) is stock and mixer.ssm_state_size == 8 and mixer.in_proj.weight is weight
        logits(model)
        assert seen


@pytest.mark.parametrize("realization", ["stock", "projected"])
def test_everything_but_the_mixers_is_left_untouched(relative, realization):
    model = stir(relative.build())
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if not name.endswith("mup_vector")}
    classes = {name: type(module) for name, module in model.named_modules() if not isinstance(module, PreTrainedModel)}
    mixers = list(find_mixers(model))
    compress(model, [tokens(8, 24)], CompreSSMConfig(state_size=4, realization=realization))
    after = dict(model.named_parameters())
    others = [name for name in before if not name.startswith(tuple(f"{layer}." for layer in mixers))]
    assert others
    # The projection leaves the mixers' own parameters alone, too.
    for name in before if realization == "projected" else others:
        parameter, value = before[name]
        assert after[name] is parameter and torch.equal(parameter, value)
    for name, buffer in buffers.items():
        assert torch.equal(model.get_buffer(name), buffer)
    for name, module in model.named_modules():
        if name in classes and name not in mixers:
            assert type(module) is classes[name]
    assert set(after) - set(before) == {
        f"{layer}.{name}" for layer in mixers for name in NAMES if realization == "projected"
    }


def test_a_hybrids_config_follows_a_stock_cut(relative, tmp_path):
    model = stir(relative.build())
    compress(model, [tokens(8, 24)], CompreSSMConfig(state_size=3, realization="stock"))
    assert type(model) is relative.language_model
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [mixer.state_size for mixer in find_mixers(loaded).values()] == [3] * len(find_mixers(model))
    assert_same_parameters(loaded, model)
    assert_close(logits(loaded), logits(model), 1e-6)


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_a_stock_cut_of_silent_states_of_the_family_is_lossless(decoder, options):
    model = stir(decoder.build())
    silence_states(model, SILENT)
    before, scores_before = generate(model, padded=True, **options)
    kept = [sorted(set(range(8)) - set(silent)) for silent in SILENT]
    compress_(model, selection_plan(model, kept))
    after, scores_after = generate(model, padded=True, **options)
    assert torch.equal(after, before)
    assert_close(scores_after, scores_before)


def test_a_config_of_four_states_fed_by_more_features_is_a_model_of_its_own():
    """The example of the module's docstring."""
    options = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}
    model = CompressmMamba2ForCausalLM(CompressmMamba2Config(state_size=8, feature_size=64, n_groups=1, **options))
    mixer = first_mixer(model)
    assert mixer.B_projection.shape == mixer.C_projection.shape == (64, 8)
    assert mixer.in_proj.weight.shape[0] == 2 * 32 + 2 * 64 + 4
