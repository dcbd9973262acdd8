"""The analysis: curves, a recommendation that a cut then keeps, the test of it, the table and the picture."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import TINY, lively, stir, tokens
from PIL import Image

from hf_compressm import CompreSSMConfig, compress_, find_mixers, measure, plan_compression
from hf_compressm.analysis import analyze, evaluate, plot_analysis, verify

IDS = tokens(16, 12)


@pytest.fixture(scope="module")
def models():
    return {name: lively(tiny.build()).eval() for name, tiny in TINY.items()}


@pytest.fixture(scope="module")
def analyses(models):
    return {
        name: analyze(model, IDS, tolerance=0.4, held_out=(tokens(4, 12, seed=1), tokens(4, 12, seed=1)))
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", list(TINY))
def test_the_recommended_cut_is_the_one_that_compress_makes(models, analyses, name):
    model, analysis = models[name], analyses[name]
    realization = "auto" if name == "mamba2" else "stock"
    config = CompreSSMConfig(tolerance=0.4, realization=realization)
    plan = plan_compression(model, measure(model, IDS.split(8)), config)
    sizes = {layer: item.state_size_after for layer, item in plan.layers.items()}
    assert analysis.is_worth_it and analysis.choice.state_sizes == sizes
    assert {layer.realization for layer in plan.layers.values()} == {analysis.recommended}
    for layer, item in plan.layers.items():
        assert analysis.choice.error(layer, sizes[layer]) == pytest.approx(
            item.expected_errors[analysis.recommended], rel=0.05
        )
    smaller = copy.deepcopy(model)
    report = compress_(smaller, plan)
    assert analysis.parameters == (report.parameters_before, report.parameters_after)
    assert analysis.state_bytes == (report.state_bytes_before, report.state_bytes_after)
    assert find_mixers(model)["backbone.layers.0.mixer"].state_size == 8


def test_curves(models, analyses):
    mamba, mamba2 = analyses["mamba"], analyses["mamba2"]
    assert list(mamba.choices) == ["stock"] and list(mamba2.choices) == ["stock", "projected"]
    assert list(mamba.criteria) == ["refit", "ghost", "hankel"] and list(mamba2.criteria) == ["ghost", "hankel"]
    assert not mamba.hankel_values and len(mamba2.hankel_values["backbone.layers.0.mixer"]) == 2
    for analysis in (mamba, mamba2):
        for choice in analysis.choices.values():
            for layer, curve in choice.curves.items():
                assert len(curve) == 9 and curve[0] == 1.0 and curve[8] == 0.0
                size = choice.state_sizes[layer]
                assert size == 8 or curve[size] <= 0.4
    # Of one config, layers that are selected keep as many.
    assert len(set(mamba.choice.state_sizes.values())) == 1
    worst = [max(curve[r] for curve in mamba.choice.curves.values()) for r in range(9)]
    assert mamba.criteria["refit"] == pytest.approx(worst, abs=1e-7)


def test_layers_that_are_selected_keep_as_many_as_the_one_that_needs_most(models, analyses):
    curves = analyses["mamba2"].choices["stock"].curves.values()
    low, high = sorted(curve[4] for curve in curves)
    assert low < high
    analysis = analyze(models["mamba2"], IDS, tolerance=(low + high) / 2, criteria=())
    sizes = set(analysis.choices["stock"].state_sizes.values())
    assert len(sizes) == 1 and sizes.pop() > 4


def test_what_is_told(analyses):
    for name, analysis in analyses.items():
        text = str(analysis)
        most, sizes = 8, sorted(set(analysis.choice.state_sizes.values()))
        assert f"of {most} states" in text and f"(realization '{analysis.recommended}')" in text
        assert "the tolerance is 40 %" in text and "192 tokens in sequences of 12" in text
        assert "Tried out on a copy of the model, by 44 predictions" in text
        assert f"{sizes[-1]:>13}" in text and text.count("← recommended") == 1
        assert max(map(len, text.splitlines())) <= 110, name
        assert json.loads(json.dumps(analysis.to_dict()))["recommended"] == analysis.recommended
    assert "would need" in str(analyses["mamba2"])


def test_nothing_is_recommended_for_a_tolerance_that_is_too_small(models):
    analysis = analyze(models["mamba"], IDS, tolerance=1e-6, held_out=(IDS, IDS), criteria=())
    assert not analysis.is_worth_it and analysis.verification is None
    text = str(analysis)
    assert "leave the state as it is, N = 8" in text and "half of them,\n  4, would change" in text
    assert "Not tried" not in text and "← recommended" not in text


def test_verification(models, analyses):
    model, analysis = models["mamba"], analyses["mamba"]
    ids = tokens(4, 12, seed=1)
    smaller = copy.deepcopy(model)
    compress_(smaller, analysis.plan)
    with torch.no_grad():
        before, after = (each(ids).logits[:, :-1].log_softmax(-1) for each in (model, smaller))
    told = analysis.verification
    targets = ids[:, 1:, None]
    assert told["uncut"]["loss"] == pytest.approx(-before.gather(-1, targets).mean().item(), rel=1e-5)
    assert told["cut"]["loss"] == pytest.approx(-after.gather(-1, targets).mean().item(), rel=1e-5)
    divergence = torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum") / targets.numel()
    assert told["cut"]["kl_divergence"] == pytest.approx(divergence.item(), rel=1e-4)
    assert told["cut"]["tokens"] == 44 and "kl_divergence" not in told["uncut"]
    # The model itself is untouched.
    assert {mixer.state_size for mixer in find_mixers(model).values()} == {8}


def test_only_the_labels_that_are_asked_for_count(models):
    model, ids = models["mamba"], tokens(5, 12, seed=2)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    result = evaluate({"model": model}, ids, labels, batch_size=2)["model"]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[:, -2], ids[:, -1])
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-5) and result["tokens"] == 5
    with pytest.raises(ValueError, match="nothing is asked: every label"):
        evaluate({"model": model}, ids, torch.full_like(ids, -100))


def test_a_copy_that_does_not_fit(models, monkeypatch):
    class Full:
        available = 10

    monkeypatch.setattr("hf_compressm.analysis.psutil.virtual_memory", Full)
    analysis = analyze(models["mamba"], IDS, tolerance=0.4, held_out=(IDS, IDS), criteria=())
    assert analysis.verification is None
    assert "Not tried out: a copy of the model takes 0.0 GiB" in str(analysis)


@pytest.mark.parametrize("name", ["jamba", "zamba", "bamba"])
def test_other_architectures(name):
    from conftest import WHOLE_MODELS

    model = stir(WHOLE_MODELS[name].build()).eval()
    analysis = analyze(model, IDS, tolerance=0.9, held_out=(IDS[:2], IDS[:2]), criteria=("ghost",))
    assert analysis.is_worth_it and analysis.verification["cut"]["tokens"] == 22
    assert verify(model, analysis.plan, IDS[:2], IDS[:2]).keys() == {"uncut", "cut"}


def test_the_picture(analyses, tmp_path):
    for name, analysis in analyses.items():
        plot_analysis(analysis, tmp_path / f"{name}.png", "a title")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(2**20)) > 50
    plot_analysis(analyses["mamba2"], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "tolerance: 40 %" in drawn and "recommended: keep" in drawn and "Hankel" in drawn
