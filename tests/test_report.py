"""What a cut reports."""

from __future__ import annotations

import json

from hf_compressm.report import CompressionReport, LayerReport


def layer(name: str, after: int, error: float) -> LayerReport:
    return LayerReport(
        name=name,
        mixer_class="MambaMixer",
        status="cut" if after < 8 else "unchanged",
        state_size_before=8,
        state_size_after=after,
        criterion="refit",
        refit="mean field",
        relative_error=error,
        kept=[list(range(after))],
        error_curve=[1.0] + [error] * 8,
    )


def report(**options) -> CompressionReport:
    layers = [layer("layers.0.mixer", 3, 0.125), layer("layers.1.mixer", 3, 0.25)]
    return CompressionReport(layers, 4096, 12345, 2345, 800, 300, **options)


def test_totals():
    whole = report()
    assert (whole.state_size_before, whole.state_size_after) == (8, 3)
    assert whole.relative_error == 0.25
    assert whole.changed


def test_a_report_without_a_cut():
    unchanged = CompressionReport([layer("layers.0.mixer", 8, 0.0)], 64, 100, 100)
    assert not unchanged.changed
    assert unchanged.state_size_after == unchanged.state_size_before == 8
    assert "layers.0.mixer" in str(unchanged) and "unchanged" in str(unchanged)


def test_the_dictionary_is_json_and_complete():
    whole = report(step=7, seconds={"measure": 1.5}, loss_before=1.0, loss_after=1.25, kl_divergence=0.5)
    values = json.loads(json.dumps(whole.to_dict()))
    layers = [LayerReport(**values) for values in values.pop("layers")]
    assert CompressionReport(layers, **values) == whole


def test_metrics_are_flat_numbers():
    whole = report(step=7, seconds={"measure": 1.5, "plan": 0.5}, loss_before=1.0, loss_after=1.25, kl_divergence=0.5)
    assert whole.metrics() == {
        "compressm/state_size": 3,
        "compressm/relative_error": 0.25,
        "compressm/cut_seconds": 2.0,
        "compressm/loss_before_cut": 1.0,
        "compressm/loss_after_cut": 1.25,
        "compressm/kl_divergence": 0.5,
    }


def test_metrics_leave_out_what_was_not_measured():
    assert set(report().metrics()) == {
        "compressm/state_size",
        "compressm/relative_error",
        "compressm/cut_seconds",
    }


def test_the_table_has_a_line_for_each_layer():
    lines = str(report()).splitlines()
    assert len(lines) == 4
    for line, name, error in ((lines[1], "layers.0.mixer", "0.1250"), (lines[2], "layers.1.mixer", "0.2500")):
        assert name in line and "8 → 3" in line and error in line and "refit, mean field" in line
    assert "12,345 → 2,345 parameters" in lines[3] and "4,096 tokens" in lines[3]
    assert " s" not in lines[3] and "loss" not in lines[3] and "KL" not in lines[3]


def test_the_table_ends_with_what_was_measured():
    text = str(report(seconds={"plan": 0.25, "apply": 1}, loss_before=1.0, loss_after=1.25, kl_divergence=0.0125))
    assert text.endswith("1.25 s; loss 1.0000 → 1.2500, KL 1.25e-02")


def test_the_table_says_what_either_realization_would_cost():
    whole = report()
    for number, item in enumerate(whole.layers):
        item.expected_errors = {"stock": 0.25 + number / 8, "projected": 0.0625 - number / 32}
    both = "largest expected relative error at this size: 0.3750 by selection (realization stock), 0.0625 projected"
    assert str(whole).splitlines()[-2] == f"{both} (in the mean field)"
    for item in whole.layers:
        item.realization, item.kept = "projected", None
    assert str(whole).splitlines()[-2] == both
    # Where there is no choice, there is nothing to say.
    for item in whole.layers:
        item.expected_errors = {"stock": 0.25}
    assert "expected" not in str(whole)
