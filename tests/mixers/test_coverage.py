"""No Mamba mixer of Transformers is missing from the table: the source of all its models is searched for more."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from conftest import WHOLE_MODELS

from hf_compressm import find_mixers
from hf_compressm.mixers import ARCHITECTURES

MODELS = Path(transformers.__file__).parent / "models"
# What the state size may be called, in a mixer and in a config.
STATE_SIZE = re.compile(r"d_state|state_size|state_dim|\w*(ssm|mamba)\w*state\w*")
# Found in every source that has such a name, and quickly: parsing them all takes long.
HINT = re.compile(r"\b(d_state|state_size|state_dim)\b|(ssm|mamba)\w*state")
# Classes that have such a field, and why their models have no state that could be cut.
OTHERS = {"DecisionTransformerConfig": "the size of what an agent observes in one step"}


@dataclass(frozen=True)
class Found:
    """A class whose source names a state size."""

    path: Path
    name: str
    fields: frozenset[str]
    model_type: str | None

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(sorted(self.fields))}) in {self.path.parent.name}/{self.path.name}"


@functools.cache
def classes_with_a_state_size(models: Path) -> tuple[Found, ...]:
    """Of all models in a folder, without importing them; modular_*.py only repeats what modeling_*.py has."""
    found = []
    for path in sorted([*models.glob("*/modeling_*.py"), *models.glob("*/configuration_*.py")]):
        source = path.read_text(encoding="utf-8")
        if HINT.search(source):
            classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
            for node in classes:
                fields = frozenset(name for name in fields_of(node) if STATE_SIZE.fullmatch(name))
                if fields:
                    found.append(Found(path, node.name, fields, model_type_of(node)))
    return tuple(found)


def fields_of(node: ast.ClassDef) -> Iterator[str]:
    """The names that a class sets on `self`, and those that its body declares."""
    for item in node.body:
        if isinstance(item, (ast.Assign, ast.AnnAssign)):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
    for item in ast.walk(node):
        if (
            isinstance(item, ast.Attribute)
            and isinstance(item.ctx, ast.Store)
            and getattr(item.value, "id", "") == "self"
        ):
            yield item.attr


def model_type_of(node: ast.ClassDef) -> str | None:
    for item in node.body:
        if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "model_type":
            return ast.literal_eval(item.value)
    return None


def unknown_classes(classes: Iterable[Found]) -> list[Found]:
    """Those that no row of the table and no exception accounts for."""
    rows = {(row.model_type, row.state_size_field) for row in ARCHITECTURES.values()}

    def is_known(found: Found) -> bool:
        if found.path.name.startswith("configuration_"):
            return any((found.model_type, field) in rows for field in found.fields)
        return found.name in ARCHITECTURES

    return [found for found in classes if found.name not in OTHERS and not is_known(found)]


def test_the_table_has_every_mixer_of_transformers():
    unknown = unknown_classes(classes_with_a_state_size(MODELS))
    assert not unknown, (
        f"Transformers {transformers.__version__} has classes with a state size that the table does not know:\n  "
        + "\n  ".join(map(str, unknown))
        + "\nAdd a row for each mixer to ARCHITECTURES in hf_compressm/mixers/architectures.py, with its config's "
        "field, and a tiny model to WHOLE_MODELS in tests/conftest.py. If a class has no state that a cut could make "
        "smaller, name it in OTHERS here, with the reason."
    )


def test_every_row_has_a_whole_model_that_is_tested():
    types = {row.model_type for name, row in ARCHITECTURES.items() if "." not in name}
    assert types == {kind.config_class.model_type for kind in WHOLE_MODELS.values()}


def test_every_row_and_every_exception_is_still_there():
    """A class that Transformers renames or drops must not stay in the table unnoticed."""
    found = {item.name: item for item in classes_with_a_state_size(MODELS)}
    assert set(OTHERS) <= set(found)
    rows = {name: row for name, row in ARCHITECTURES.items() if "." not in name}
    assert rows and set(rows) <= set(found)
    for name, row in rows.items():
        config = next(item for item in found.values() if item.model_type == row.model_type)
        assert row.state_size_field in config.fields, (name, config)
        assert config.path.parent == found[name].path.parent


def test_the_table_names_the_fields_of_the_configs(architecture):
    model = architecture.build()
    for mixer in find_mixers(model).values():
        row = mixer.architecture
        assert row is ARCHITECTURES[type(mixer.module).__name__] and row.model_type == model.config.model_type
        assert mixer.config is model.config
        assert getattr(model.config, row.state_size_field) == mixer.state_size == 8
        assert mixer.groups == (1 if row.groups_field is None else getattr(model.config, row.groups_field))


NEW_MIXER = """
class {name}(nn.Module):
    def __init__(self, config):
        super().__init__()
        {statement}
"""


@pytest.mark.parametrize(
    "statement",
    [
        "self.ssm_state_size = config.state_size",
        "self.d_state = config.d_state",
        "self.width, self.mamba_d_state = 1, 2",
        "self.ssm_state_size: int = 3",
    ],
)
def test_a_new_mixer_is_found(tmp_path, statement):
    (tmp_path / "new").mkdir()
    source = NEW_MIXER.format(name="MambaMixer", statement="self.ssm_state_size = 1")
    source += NEW_MIXER.format(name="NewMixer", statement=statement)
    source += NEW_MIXER.format(name="NewAttention", statement="self.head_dim = config.head_dim")
    (tmp_path / "new" / "modeling_new.py").write_text(source)
    (tmp_path / "new" / "modular_new.py").write_text(source)
    (found,) = unknown_classes(classes_with_a_state_size(tmp_path))
    assert found.name == "NewMixer" and "NewMixer (" in str(found) and "in new/modeling_new.py" in str(found)


@pytest.mark.parametrize("field", ["state_size: int = 16", "mamba_d_state = 16", "ssm_state_size: int | None = None"])
def test_a_new_config_is_found(tmp_path, field):
    """Its mixer may come from another file, and set nothing itself."""
    (tmp_path / "new").mkdir()
    body = f'    model_type = "new"\n    hidden_size: int = 8\n    {field}\n'
    (tmp_path / "new" / "configuration_new.py").write_text(f"class NewConfig(PreTrainedConfig):\n{body}")
    (found,) = unknown_classes(classes_with_a_state_size(tmp_path))
    assert (found.name, found.model_type) == ("NewConfig", "new")


def test_a_known_model_type_with_another_field_is_found(tmp_path):
    """The table's name of the field must be the config's."""
    (tmp_path / "mamba").mkdir()
    source = 'class MambaConfig(PreTrainedConfig):\n    model_type = "mamba"\n    {field}: int = 16\n'
    path = tmp_path / "mamba" / "configuration_mamba.py"
    path.write_text(source.format(field="state_size"))
    assert not unknown_classes(classes_with_a_state_size(tmp_path))
    classes_with_a_state_size.cache_clear()
    path.write_text(source.format(field="mamba_d_state"))
    assert unknown_classes(classes_with_a_state_size(tmp_path))
