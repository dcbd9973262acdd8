"""Write the tables of architectures and of results into README.md, each between two comments."""

from __future__ import annotations

import re
from pathlib import Path

from hf_compressm.mixers import ARCHITECTURES, Architecture

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- architectures: written by `make readme-tables` -->", "<!-- end of architectures -->"
RESULTS = "<!-- results: written by `make readme-tables` -->", "<!-- end of results -->"
HEADER = ("architecture", "mixer", "N in the config", "groups", "layout", "realizations", "exact in", "notes")


def architectures_table() -> str:
    """A row for each mixer that the package knows, in Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(row_of(name, row) for name, row in ARCHITECTURES.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def row_of(mixer: str, architecture: Architecture) -> list[str]:
    layout = architecture.layout
    if architecture.model_type is None:
        package, *_, name = mixer.split(".")
        kind, size = f"{package}'s own", architecture.names.get("ssm_state_size", "ssm_state_size")
        groups = architecture.names.get("n_groups")
    else:
        kind, name, size = f"`{architecture.model_type}`", mixer, architecture.state_size_field
        groups = architecture.groups_field
    realizations = "stock (selection and refit)" if layout.CAN_REFIT else "stock (selection)"
    if architecture.can_be_projected:
        realizations += ", projected"
    return [
        kind,
        f"`{name}`",
        f"`{size}`",
        "1" if groups is None else f"`{groups}`",
        layout.NAME,
        realizations,
        # A layout with scales multiplies some parameters by constants, and Adam's steps do not follow a scale.
        "outputs" if hasattr(layout, "scales") else "outputs, training",
        architecture.note or "–",
    ]


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """A text with the table between two comments, in the place of what stood there.

    Raises:
        ValueError: the text has not exactly one pair of them.
    """
    parts = re.split(f"({re.escape(begin)}|{re.escape(end)})", text)
    if parts[1::2] != [begin, end]:
        raise ValueError(f"expected one {begin!r} and then one {end!r}, found {parts[1::2]}")
    return f"{parts[0]}{begin}\n{table}\n{end}{parts[4]}"


def with_results(text: str, results: str) -> str:
    """A text with the benchmarks' results between their two comments."""
    return with_table(text, f"\n{results}\n", *RESULTS)


if __name__ == "__main__":
    from readme_results import results_text

    text = with_table(README.read_text(encoding="utf-8"), architectures_table())
    README.write_text(with_results(text, results_text()), encoding="utf-8")
