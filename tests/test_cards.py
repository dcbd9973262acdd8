"""Cards tell what is in the files beside them, and load as the Hub reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import TINY, lively, tokens
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from PIL import Image
from training import build_trainer, config, examples

from hf_compressm import CompreSSMCallback, CompreSSMConfig, Record, compress
from hf_compressm.cards import license_of, write_card
from hf_compressm.provenance import record_of


def saved(directory: Path, name: str = "mamba", **options) -> Path:
    """A model that was cut and saved."""
    model = lively(TINY[name].build())
    compress(model, [tokens()], CompreSSMConfig(**({"state_size": 4} | options)))
    model.save_pretrained(directory)
    return directory


def add(directory: Path, **fields) -> None:
    """Put more into a record that was saved."""
    record = Record.load(directory)
    for name, value in fields.items():
        setattr(record, name, value)
    record.save(directory)


def code_of(card: str) -> str:
    """The first Python block."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.parametrize("realization", ["stock", "projected"])
def test_what_a_card_says_is_so(tmp_path, realization):
    card_file = write_card(saved(tmp_path / "model", "mamba2", realization=realization))
    card = ModelCard.load(card_file)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"mamba", "state-space-model", "compressm"} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.eval_results is None
    assert "# model\n" in card.text and "| state size N | 8 | 4 |" in card.text
    (cut,) = Record.load(tmp_path / "model").cuts
    for layer in cut["layers"]:
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {layer['name']} |"))
        assert f"8 → 4 | {realization} |" in row and f"{layer['relative_error']:.4f}" in row
    assert f"{cut['parameters_before']:,} | {cut['parameters_after']:,} |" in card.text
    assert ("trust_remote_code=True" in card.text) == (realization == "projected")
    assert "**not measured** here" in card.text and "arxiv.org/abs/2510.02823" in card.text
    names: dict = {}
    exec(code_of(card.text), names)
    assert names["model"].config.state_size == 4
    again = json.loads(re.search(r"```json\n(.*?)\n```", card.text, re.DOTALL)[1])
    assert CompreSSMConfig.from_dict(again).to_dict() == cut["config"]
    with Image.open(tmp_path / "model" / "spectrum.png") as picture:
        assert picture.width > 500


def test_everything_that_is_known(tmp_path):
    directory = saved(tmp_path / "model")
    add(
        directory,
        run={
            "base_model": "someone/mamba-tiny",
            "dataset": "someone/texts",
            "license": "mit",
            "seed": 7,
            "command": "python train.py --steps 9",
            "description": "Reads digits.",
            "evaluated_on": "1,000 tokens",
            "limits": "It is a toy.",
            "tags": ["digits"],
        },
        machine="a machine, 2 cores",
        timeline=[
            {"step": 1, "state_size": 8, "step_seconds": 0.4},
            {"step": 2, "state_size": 8, "step_seconds": 0.2},
            {"step": 3, "state_size": 8, "step_seconds": 0.3},
            {"step": 4, "state_size": 4, "step_seconds": 0.05},
        ],
        evaluations={
            "uncut": {"loss": 2.5, "accuracy": 0.5},
            "cut": {"loss": 2.75, "accuracy": 0.25, "kl_divergence": 1e-5, "recall_accuracy": 0.125},
        },
    )
    card = ModelCard.load(write_card(directory, repo_id="me/small", tags=["mine"]))
    assert card.data.license == "mit" and card.data.datasets == ["someone/texts"]
    assert card.data.base_model == "someone/mamba-tiny" and card.data.base_model_relation == "finetune"
    assert {"digits", "mine"} <= set(card.data.tags)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": 2.75,
        "accuracy": 0.25,
        "kl_divergence": 1e-5,
        "recall_accuracy": 0.125,
    }
    assert results["loss"].dataset_type == results["loss"].dataset_name == "someone/texts"
    for line in (
        "# small",
        "[someone/mamba-tiny](https://huggingface.co/someone/mamba-tiny)",
        'AutoModelForCausalLM.from_pretrained("me/small")',
        "| ms per training step | 300 | 50 |",
        "Step times were measured on: a machine, 2 cores.",
        "| loss, nats | 2.5000 | 2.7500 |",
        "| KL from the uncut model, nats per token | – | 1.00e-05 |",
        "Measured on 1,000 tokens.",
        "python train.py --steps 9",
        "Seed 7.",
        "Reads digits.",
        "It is a toy.",
        "see the recall above",
    ):
        assert line in card.text, line


def gains(*values: tuple[float, float]) -> dict[str, float]:
    """Recall over 64 and 128 tokens: gain and error of each."""
    names = ("gain", "gain_error", "accuracy")
    pairs = zip((64, 128), values, strict=True)
    return {
        f"recall_{name}_after_{d}": value
        for d, pair in pairs
        for name, value in zip(names, (*pair, 0.25), strict=True)
    }


READINGS = {
    "it is lost, then half won back": (
        [((1.0, 0.1), (0.5, 0.1)), ((0.9, 0.1), (0.0, 0.1)), ((0.5, 0.1), (0.6, 0.1))],
        "Recall stands out of the noise uncut over 64 and 128 tokens; cut over 64 tokens; healed over 64 and 128 "
        'tokens. From "uncut" to "cut" it fell over 128 tokens. From "uncut" to "healed" it fell over 64 tokens.',
    ),
    "it is learnt later": (
        [((0.1, 0.2), (0.0, 0.2)), ((0.1, 0.2), (0.0, 0.2)), ((1.0, 0.2), (0.1, 0.2))],
        "Recall stands out of the noise uncut over none; cut over none; healed over 64 tokens. "
        'From "uncut" to "cut" it changed no more than the noise over any distance. From "uncut" to "healed" it rose '
        "over 64 tokens.",
    ),
    "it is sure, and next to nothing": (
        [((0.009, 0.001), (0.0, 0.0)), ((0.002, 0.001), (0.0, 0.0)), ((0.009, 0.001), (0.0, 0.0))],
        "No value stands out of the noise: the model recalls nothing over these distances",
    ),
}


@pytest.mark.parametrize(("values", "reading"), READINGS.values(), ids=READINGS.keys())
def test_recall_over_distances(tmp_path, values, reading):
    directory = saved(tmp_path / "model")
    stages = ("uncut", "cut", "healed")
    add(
        directory,
        evaluations={stage: {"loss": 2.5} | gains(*pair) for stage, pair in zip(stages, values, strict=True)},
        run={"recall": "A passage is read again.", "recall_length": 128},
    )
    card = ModelCard.load(write_card(directory))
    assert (
        "## Recall beyond the training length\n\nA passage is read again.\n\n| distance | uncut | cut | healed |"
        in card.text
    )
    cells = " | ".join(f"{gain:.3f} ± {error:.3f} (25.0%)" for _, (gain, error) in values)
    assert f"| 128 tokens (1 ×) | {cells} |" in card.text and "| 64 tokens (½ ×) |" in card.text
    assert reading in card.text and "not measured" not in card.text and "recall_gain" not in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]


def test_recall_as_accuracy(tmp_path):
    directory = saved(tmp_path / "model")
    answers = {"recall_chance": 0.1, "recall_accuracy_after_32": 0.3, "recall_accuracy_error_after_32": 0.15}
    add(directory, evaluations={"before": answers, "after": answers | {"recall_accuracy_after_32": 0.2}})
    card = write_card(directory).read_text()
    assert "| 32 tokens | 30.0% ± 15.0 | 20.0% ± 15.0 |" in card and "before over 32 tokens; after over none." in card
    assert "## What that cost" not in card


def test_several_cuts_of_many_layers(tmp_path):
    model = lively(TINY["mamba"].build(num_hidden_layers=9))
    for size in (6, 3):
        compress(model, [tokens()], CompreSSMConfig(state_size=size))
    model.save_pretrained(tmp_path)
    card = write_card(tmp_path).read_text()
    assert "| state size N | 8 | 3 |" in card and card.count("8 → 6") == card.count("6 → 3") == 9
    assert card.count("<details>") == card.count("</details>") == 2


def test_layers_of_their_own_sizes(tmp_path):
    card = write_card(saved(tmp_path / "model", "mamba2", state_size=[3, 5], realization="projected")).read_text()
    assert "| state size N | 8 | 3–5 |" in card


def test_adapters(tmp_path):
    model = get_peft_model(lively(TINY["mamba"].build()), LoraConfig(r=2, target_modules=["in_proj"]))
    compress(model, [tokens()], CompreSSMConfig(state_size=4))
    model.save_pretrained(tmp_path)
    add(tmp_path, run={"base_model": "someone/mamba-tiny"})
    card = ModelCard.load(write_card(tmp_path, repo_id="me/adapter"))
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert 'load_compressed_peft(base, "me/adapter")' in card.text and "LORA" in card.text


def test_peft_names_a_folder_as_the_base(tmp_path):
    base = lively(TINY["mamba"].build())
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj"]))
    compress(model, [tokens()], CompreSSMConfig(state_size=4))
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(write_card(tmp_path / "adapter"))
    assert card.data.base_model is None and str(tmp_path) not in str(card.data.tags)


def test_an_earlier_card_keeps_its_license(tmp_path):
    directory = saved(tmp_path / "model")
    data = ModelCardData(license="gpl-3.0", language="de", tags=["old"], library_name="other")
    ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\nold text").save(directory / "README.md")
    assert license_of(directory) == "gpl-3.0"
    card = ModelCard.load(write_card(directory))
    assert (card.data.license, card.data.language, card.data.library_name) == ("gpl-3.0", "de", "transformers")
    assert "old" in card.data.tags and "old text" not in card.text
    assert write_card(directory).read_text() == str(card)


def test_the_trainers_card_is_taken_in(tmp_path):
    data = examples()
    options = {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": data[:4]}
    trainer = build_trainer(lively(TINY["mamba"].build()), tmp_path, [CompreSSMCallback(config())], **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit", language="en", dataset="texts", tags="extra")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.language in ("en", ["en"])
    assert {"compressm", "extra"} <= set(card.data.tags)
    assert "Cut after training step 3 of 8" in card.text
    assert "## Training procedure" in card.text and "learning_rate: 0.005" in card.text
    assert "More information needed" not in card.text
    # Again, as each push does: nothing piles up.
    trainer.create_model_card(license="mit", language="en", dataset="texts", tags="extra")
    assert (tmp_path / "README.md").read_text().count("## Training procedure") == 1


def test_without_a_cut_the_trainers_card_stays(tmp_path):
    callback = CompreSSMCallback(config(schedule=[100]))
    trainer = build_trainer(lively(TINY["mamba"].build()), tmp_path, [callback], max_steps=101)
    trainer.create_model_card(model_name="plain")
    assert "# plain" in (tmp_path / "README.md").read_text()
    assert "compressm" not in (tmp_path / "README.md").read_text()


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no compressm.json: it holds no model that hf_compressm cut"):
        write_card(tmp_path)
    Record([{"status": "skipped", "step": 3, "reason": "few"}]).save(tmp_path)
    with pytest.raises(ValueError, match="tells of no cut that the model still has"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_no_license_is_known(tmp_path):
    assert license_of(tmp_path) is None
    # Offline, and no such repository.
    assert license_of("nobody/nothing") is None


def test_a_base_model_in_a_folder_is_no_link(tmp_path):
    directory = saved(tmp_path / "model")
    add(directory, run={"base_model": "./runs/base"})
    card = ModelCard.load(write_card(directory))
    assert card.data.base_model is None and "from `./runs/base`" in card.text


def test_numbers_that_are_none(tmp_path):
    directory = saved(tmp_path / "model")
    add(directory, evaluations={"cut": {"loss": float("inf"), "accuracy": 0.5}})
    card = ModelCard.load(write_card(directory))
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"]


def test_the_record_is_the_models_own(tmp_path):
    model = lively(TINY["mamba"].build())
    compress(model, [tokens()], CompreSSMConfig(state_size=4))
    record_of(model).run["description"] = "From the record of the model in memory."
    model.save_pretrained(tmp_path)
    assert "From the record of the model in memory." in write_card(tmp_path).read_text()


def test_step_times_of_one_size_alone_are_left_out(tmp_path):
    directory = saved(tmp_path / "model")
    add(directory, machine="a machine", timeline=[{"step": 1, "state_size": 8, "step_seconds": 0.4}])
    card = write_card(directory).read_text()
    assert "ms per training step" not in card and "Made on: a machine." in card
