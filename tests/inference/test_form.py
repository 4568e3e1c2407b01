"""Which forms are tried: the baselines always, and no form that the device or the model does not have."""

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, baselines, candidates
from deepseek_mp.inference.form import narrow

GPU = {"fp32", "tf32", "bf16", "fp16", "fp8_e4m3", "int8"}


def test_a_name_says_the_whole_form():
    assert Form().name == "fp32"
    whole = Form(format="bf16", weights="int8", channels_last=True, folded=True, compiled=True, graphed=True)
    assert whole.name == "bf16+int8_weights+channels_last+folded+compiled+graphed"
    assert whole.to_json() == {
        "format": "bf16", "weights": "int8", "channels_last": True, "folded": True, "compiled": True,
        "graphed": True,
    }  # fmt: skip
    assert Form(format="fp16", weights="fp8").name == "fp16+fp8_weights"


def test_no_result_stands_beside_a_weak_baseline_alone():
    assert [form.name for form in baselines(GPU, compiled=True)] == [
        "fp32", "tf32", "bf16", "fp32+compiled", "bf16+compiled",
    ]  # fmt: skip
    assert [form.name for form in baselines({"fp32"}, compiled=True)] == ["fp32", "fp32+compiled"]


def test_a_graph_is_a_baseline_too_where_there_are_graphs():
    found = [form.name for form in baselines(GPU, compiled=True, graphed=True)]
    assert found[-2:] == ["bf16+compiled", "bf16+compiled+graphed"]
    assert not any(form.graphed for form in baselines(GPU, compiled=False, graphed=True))


def test_calls_are_recorded_in_16_bits_eager_and_compiled():
    plain = candidates(GPU, images=True, norms=False, compiled=True, weights=["int8"])
    forms = candidates(GPU, images=True, norms=False, compiled=True, weights=["int8"], graphed=True)
    assert not any(form.graphed for form in plain)
    assert [form for form in forms if not form.graphed] == plain
    assert {form.name for form in forms if form.graphed and form.channels_last} == {
        f"{kind}+channels_last+{way}"
        for kind in ("bf16", "fp16", "bf16+int8_weights") for way in ("graphed", "compiled+graphed")
    }  # fmt: skip


def test_fp32_is_first_and_baselines_are_among_the_candidates_once():
    for images in (False, True):
        forms = candidates(GPU, images=images, norms=images, compiled=True)
        assert forms[0] == Form()
        assert len(set(forms)) == len(forms)
        assert set(baselines(GPU, compiled=True)) <= set(forms)
        assert {form.format for form in forms} == {"fp32", "tf32", "bf16", "fp16"}


def test_layouts_and_folding_are_tried_where_there_is_something_to_gain():
    plain = candidates(GPU, images=False, norms=False, compiled=False)
    assert not any(form.channels_last or form.folded or form.compiled for form in plain)
    forms = candidates(GPU, images=True, norms=True, compiled=False)
    assert Form(format="fp16", channels_last=True, folded=True) in forms


def test_weights_in_8_bits_are_beside_16():
    for wrong in ({"weights": "int8"}, {"format": "tf32", "weights": "int8"}, {"format": "bf16", "weights": "int4"}):
        with pytest.raises(ConfigError, match="with 'bf16' or 'fp16'"):
            Form(**wrong)


def test_weights_in_8_bits_are_tried_last_in_one_format_of_activations():
    few = candidates(GPU, images=False, norms=False, compiled=True)
    forms = candidates(GPU, images=False, norms=False, compiled=True, weights=("fp8", "int8"))
    assert forms[: len(few)] == few
    assert [form.name for form in forms[len(few) :]] == [
        "bf16+int8_weights", "bf16+int8_weights+compiled", "bf16+fp8_weights", "bf16+fp8_weights+compiled",
    ]  # fmt: skip
    assert candidates(GPU - {"bf16"}, images=True, norms=True, compiled=False, weights=["int8"])[-1] == Form(
        format="fp16", weights="int8", channels_last=True, folded=True
    )
    assert narrow({"fp32"}) is None
    forms = candidates({"fp32"}, images=False, norms=False, compiled=True, weights=["int8"])
    assert not any(form.weights for form in forms)
