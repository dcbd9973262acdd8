"""The README's table of architectures is what the package's table says."""

from __future__ import annotations

import dataclasses
import re

import pytest
from readme_tables import BEGIN, END, README, architectures_table, with_table

from hf_compressm.mixers import ARCHITECTURES


def test_the_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    assert with_table(text, architectures_table()) == text, "run `make readme-tables`"


def test_there_is_a_row_for_each_mixer():
    header, line, *rows = (row.strip("| ").split(" | ") for row in architectures_table().splitlines())
    assert len(rows) == len(ARCHITECTURES) and set(line) == {"---"}
    assert {len(row) for row in rows} == {len(header)}
    mamba, falcon, *_ = rows
    assert mamba[:4] == ["`mamba`", "`MambaMixer`", "`state_size`", "1"]
    assert (mamba[6], falcon[6]) == ("outputs, training", "outputs")
    for (mixer, architecture), row in zip(ARCHITECTURES.items(), rows, strict=True):
        assert row[1] == f"`{mixer.rpartition('.')[2]}`" and row[4] == architecture.layout.NAME
        assert ("refit" in row[5]) == architecture.layout.CAN_REFIT
        assert ("projected" in row[5]) == architecture.can_be_projected


def test_a_change_of_the_packages_table_is_noticed(monkeypatch):
    before = architectures_table()
    changed = dataclasses.replace(ARCHITECTURES["BambaMixer"], note="Something new.")
    monkeypatch.setitem(ARCHITECTURES, "BambaMixer", changed)
    assert architectures_table() != before
    assert "Something new." in with_table(README.read_text(encoding="utf-8"), architectures_table())


def test_only_what_stands_between_the_comments_is_replaced():
    text = f"one\n{BEGIN}\nold\n{END}\ntwo\n"
    assert with_table(text, "new") == f"one\n{BEGIN}\nnew\n{END}\ntwo\n"
    assert with_table(with_table(text, "new"), "new") == with_table(text, "new")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_comments_that_are_missing(text):
    with pytest.raises(ValueError, match=re.escape(BEGIN)):
        with_table(text, "new")
