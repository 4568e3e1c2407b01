"""Which forms are tried: the baselines always, and no form that the device or the model does not have."""

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, baselines, candidates
from deepseek_mp.inference.form import narrow

GPU = {"fp32", "tf32", "bf16", "fp16", "fp8_e4m3", "int8"}


def test_a_name_says_the_whole_form():
    assert Form().name == "fp32"
    whole = Form(format="bf16", linear="int8_weights", channels_last=True, folded=True, compiled=True, graphed=True)
    assert whole.name == "bf16+int8_weights+channels_last+folded+compiled+graphed"
    assert whole.to_json() == {
        "format": "bf16", "linear": "int8_weights", "layers": (),
        "channels_last": True, "folded": True, "compiled": True, "graphed": True,
    }  # fmt: skip
    assert Form(format="fp16", linear="fp8_weights").name == "fp16+fp8_weights"


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
    plain = candidates(GPU, images=True, norms=False, compiled=True, linear=["int8_weights"])
    forms = candidates(GPU, images=True, norms=False, compiled=True, linear=["int8_weights"], graphed=True)
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
    wrongs = [{"linear": "int8_weights"}, {"format": "tf32", "linear": "int8_weights"}]
    wrongs += [{"format": "bf16", "linear": "x"}, {"format": "bf16", "layers": (("a", "x"),)}]
    wrongs += [{"layers": (("a", "int8_weights"),)}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="with 'bf16' or 'fp16'"):
            Form(**wrong)


def test_layers_by_name_are_in_place_of_one_kind_for_all():
    layers = (("a", "int8_weights"), ("b", "fp8_weights"))
    assert Form(format="bf16", layers=layers, compiled=True).name == "bf16+mixed(2)+compiled"
    with pytest.raises(ConfigError, match="Leave linear=None"):
        Form(format="bf16", linear="int8_weights", layers=layers)
    with pytest.raises(ConfigError, match="a name once"):
        Form(format="bf16", layers=(*layers, ("a", "fp8_weights")))


def test_weights_in_8_bits_are_tried_last_in_one_format_of_activations():
    few = candidates(GPU, images=False, norms=False, compiled=True)
    forms = candidates(GPU, images=False, norms=False, compiled=True, linear=("fp8_weights", "int8_weights"))
    assert forms[: len(few)] == few
    assert [form.name for form in forms[len(few) :]] == [
        "bf16+int8_weights", "bf16+int8_weights+compiled", "bf16+fp8_weights", "bf16+fp8_weights+compiled",
    ]  # fmt: skip
    assert candidates(GPU - {"bf16"}, images=True, norms=True, compiled=False, linear=["int8_weights"])[-1] == Form(
        format="fp16", linear="int8_weights", channels_last=True, folded=True
    )
    assert narrow({"fp32"}) is None
    forms = candidates({"fp32"}, images=False, norms=False, compiled=True, linear=["int8_weights"])
    assert not any(form.linear for form in forms)


def test_other_formats_are_refused():
    with pytest.raises(ConfigError, match=r"format='bf61'\. Allowed: 'fp32'.*Did you mean 'bf16'"):
        Form(format="bf61")
    assert Form(format="int8").name == "int8"


@pytest.mark.parametrize("layers", [3, ["0"], (("0",),), {"0": "int8_weights"}])
def test_layers_that_are_no_pairs_are_refused(layers):
    with pytest.raises(ConfigError, match=r"layers=.*Allowed: a tuple of pairs of a name and a kind"):
        Form(format="bf16", layers=layers)
