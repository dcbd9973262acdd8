"""The config: its defaults, its limits, its errors, and JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from hf_compressm import CompreSSMConfig
from hf_compressm.config import SCHEDULES
from hf_compressm.criteria import CRITERIA


def test_every_option_has_a_help_text():
    for option in dataclasses.fields(CompreSSMConfig):
        assert option.metadata["help"].endswith("."), option.name


@pytest.mark.parametrize(
    "values", [{}, {"state_size": 4, "tolerance": 0.1}, {"tolerance": 0.1, "hankel_tolerance": 0}]
)
def test_exactly_one_rule_is_needed(values):
    with pytest.raises(ValueError, match=r"set exactly one of state_size, .*, state_bytes; got"):
        CompreSSMConfig(**values)


def test_options_go_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        CompreSSMConfig(12)


@pytest.mark.parametrize("size", [1, 12, 0.5, 0.001])
def test_good_state_sizes(size):
    assert CompreSSMConfig(state_size=size).state_size == size


@pytest.mark.parametrize("size", [0, -3, 0.0, 1.0, 12.0, -0.5, float("nan"), float("inf")])
def test_state_sizes_out_of_range(size):
    with pytest.raises(ValueError, match=f"state_size must be an int of at least 1 or a float .* got {size!r}"):
        CompreSSMConfig(state_size=size)


@pytest.mark.parametrize("size", ["12", True, {12: 1}])
def test_state_sizes_of_the_wrong_type(size):
    with pytest.raises(TypeError, match=r"state_size must be an int or a float, got .* \((str|bool|dict)\)"):
        CompreSSMConfig(state_size=size)


@pytest.mark.parametrize("sizes", [[4, 8], (4, 8), [1]])
def test_good_lists_of_state_sizes(sizes):
    for realization in ("projected", "auto"):
        assert CompreSSMConfig(state_size=sizes, realization=realization).state_size == list(sizes)


@pytest.mark.parametrize("sizes", [[], [4, 0], [4, 0.5], [4, True], [4, None], [[4]], ["4"]])
def test_bad_lists_of_state_sizes(sizes):
    with pytest.raises(
        ValueError, match=rf"state_size must list an int of at least 1 for each mixer, got {re.escape(repr(sizes))}"
    ):
        CompreSSMConfig(state_size=sizes, realization="projected")


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"state_size": [4, 8]}, "a list of state sizes"), ({"state_bytes": 4096}, "state_bytes")],
)
def test_sizes_of_their_own_are_no_stock_models(options, rule):
    assert CompreSSMConfig(**options).realization == "auto"
    with pytest.raises(
        ValueError, match=rf"^{rule} gives each layer a state size of its own, .*set realization='projected'"
    ):
        CompreSSMConfig(realization="stock", **options)


@pytest.mark.parametrize("multiple", [2, 16, "kernel"])
def test_a_list_of_state_sizes_is_not_rounded(multiple):
    with pytest.raises(ValueError, match=rf"multiple_of is {multiple!r}, but a list of state sizes is taken as it is"):
        CompreSSMConfig(state_size=[4, 8], realization="projected", multiple_of=multiple)


def test_realizations():
    assert CompreSSMConfig(state_size=4).realization == "auto"
    for name in ("stock", "projected", "auto"):
        assert CompreSSMConfig(state_size=4, realization=name).realization == name
    for name in ("project", None, True):
        with pytest.raises(ValueError, match=f"realization must be one of stock, projected, auto, got {name!r}"):
            CompreSSMConfig(state_size=4, realization=name)


@pytest.mark.parametrize("multiple", [1, 4, "kernel"])
def test_good_multiples(multiple):
    assert CompreSSMConfig(state_size=4, multiple_of=multiple).multiple_of == multiple


@pytest.mark.parametrize("multiple", ["kernels", "16", ""])
def test_multiples_with_an_unknown_name(multiple):
    with pytest.raises(ValueError, match=f"multiple_of must be a whole number or 'kernel', got {multiple!r}"):
        CompreSSMConfig(state_size=4, multiple_of=multiple)


OUT_OF_RANGE = [
    ("refit_penalty", -0.1, "at least 0"),
    ("refit_penalty", float("nan"), "at least 0"),
    ("pragmatic_tolerance", -1, "at least 0"),
    ("max_kept_fraction", 0, "above 0 and at most 1"),
    ("max_kept_fraction", 1.01, "above 0 and at most 1"),
    ("refit_steps", -1, "at least 0"),
    ("multiple_of", 0, "at least 1"),
    ("pragmatic_steps", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("calibration_tokens", 0, "at least 1"),
    ("projection_rounds", -1, "at least 0"),
    ("refit_rounds", -1, "at least 0"),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUT_OF_RANGE)
def test_numbers_out_of_range_are_quoted(name, value, limit):
    with pytest.raises(ValueError, match=f"{name} must be {limit}, got {value!r}"):
        CompreSSMConfig(state_size=4, **{name: value})


@pytest.mark.parametrize("rule", ["tolerance", "hankel_tolerance"])
@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, float("nan")])
def test_tolerances_lie_between_0_and_1(rule, value):
    with pytest.raises(ValueError, match=f"{rule} must be above 0 and below 1, got {value!r}"):
        CompreSSMConfig(**{rule: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("refit_penalty", "0.1", "a number"),
        ("max_kept_fraction", None, "a number"),
        ("pragmatic_tolerance", True, "a number"),
        ("refit_steps", 2.0, "a whole number"),
        ("projection_rounds", 1.5, "a whole number"),
        ("refit_rounds", 1.5, "a whole number"),
        ("multiple_of", 4.0, "a whole number"),
        ("multiple_of", True, "a whole number"),
        ("calibration_tokens", 4096.0, "a whole number"),
        ("seed", None, "a whole number"),
        ("refit", 1, "True or False"),
        ("pragmatic", "yes", "True or False"),
    ],
)
def test_wrong_types_are_quoted(name, value, kind):
    with pytest.raises(TypeError, match=f"{name} must be {kind}, got {value!r}"):
        CompreSSMConfig(state_size=4, **{name: value})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "state_bytes must be at least 1, got 0"),
        (-5, ValueError, "state_bytes must be at least 1"),
        (4096.0, TypeError, r"state_bytes must be a whole number, got 4096\.0 \(float\)"),
        ("4096", TypeError, r"state_bytes must be a whole number, got '4096' \(str\)"),
    ],
)
def test_budgets(value, error, message):
    with pytest.raises(error, match=message):
        CompreSSMConfig(state_bytes=value, realization="projected")


def test_tolerances_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"tolerance must be a number, got '0\.1'"):
        CompreSSMConfig(tolerance="0.1")


@pytest.mark.parametrize("name", ["auto", *CRITERIA])
def test_criteria_are_known_by_name(name):
    assert CompreSSMConfig(state_size=4, criterion=name).criterion == name


def test_unknown_criteria_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown criterion 'hankle'; choose auto or one of .*refit.*ghost.*hankel"):
        CompreSSMConfig(state_size=4, criterion="hankle")


def test_on_non_finite():
    assert CompreSSMConfig(state_size=4, on_non_finite="raise").on_non_finite == "raise"
    with pytest.raises(ValueError, match="on_non_finite must be 'skip' or 'raise', got 'ignore'"):
        CompreSSMConfig(state_size=4, on_non_finite="ignore")


@pytest.mark.parametrize("schedule", [*SCHEDULES, [100], [0.1, 0.5], [10, 0.5]])
def test_good_schedules(schedule):
    assert CompreSSMConfig(state_size=4, schedule=schedule).schedule == schedule


@pytest.mark.parametrize("moment", [0, -5, 0.0, 1.0, 2.5, True, "half", None, float("nan")])
def test_bad_moments_are_quoted(moment):
    with pytest.raises(ValueError, match=f"schedule: {moment!r} is neither a step"):
        CompreSSMConfig(state_size=4, schedule=[10, moment])


@pytest.mark.parametrize("schedule", [[], 100, 0.2, None, {"step": 3}])
def test_schedules_of_the_wrong_type(schedule):
    with pytest.raises(TypeError, match="schedule must be a name or a non-empty list"):
        CompreSSMConfig(state_size=4, schedule=schedule)


def test_unknown_schedules_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown schedule 'twice'; choose one of one_cut, compressm, or a list"):
        CompreSSMConfig(state_size=4, schedule="twice")


def test_changing_an_option_checks_it_again():
    with pytest.raises(ValueError, match="multiple_of must be at least 1"):
        dataclasses.replace(CompreSSMConfig(state_size=4), multiple_of=0)


EXAMPLES = [
    CompreSSMConfig(state_size=12),
    CompreSSMConfig(tolerance=0.02, multiple_of=4, schedule=(10, 0.5), calibration_tokens=99),
    CompreSSMConfig(hankel_tolerance=0.1, criterion="hankel", refit=False, schedule="compressm", pragmatic=True),
    CompreSSMConfig(state_size=(4, 8), realization="projected", projection_rounds=0),
    CompreSSMConfig(state_size=4, realization="stock", refit_rounds=0),
    CompreSSMConfig(state_bytes=4096, realization="auto", multiple_of="kernel"),
]


@pytest.mark.parametrize("config", EXAMPLES)
def test_round_trip_through_a_dictionary_and_a_file(config, tmp_path):
    assert CompreSSMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "config.json")
    assert CompreSSMConfig.load(tmp_path / "config.json") == config


def test_a_dictionary_may_leave_options_out():
    assert CompreSSMConfig.from_dict({"state_size": 3}) == CompreSSMConfig(state_size=3)


def test_unknown_keys_are_dropped_with_a_warning(caplog):
    config = CompreSSMConfig.from_dict({"state_size": 3, "rank_per_layer": True, "b": 1})
    assert config == CompreSSMConfig(state_size=3)
    assert "ignoring unknown keys ['b', 'rank_per_layer']" in caplog.text


def test_values_in_files_are_checked(tmp_path):
    (tmp_path / "config.json").write_text('{"state_size": 0}')
    with pytest.raises(ValueError, match="state_size must be an int of at least 1"):
        CompreSSMConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("content", ["", '{"state_size": 1', "state_size: 12"])
def test_files_that_are_not_json(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file"):
        CompreSSMConfig.load(tmp_path / "config.json")


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "config.json").write_text("[12]")
    with pytest.raises(ValueError, match=r"config\.json does not hold a config: expected an object, got list"):
        CompreSSMConfig.load(tmp_path / "config.json")
