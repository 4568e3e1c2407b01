"""Which forms are tried: the baselines always, and no form that the device or the model does not have."""

from deepseek_mp.inference import Form, baselines, candidates

GPU = {"fp32", "tf32", "bf16", "fp16", "fp8_e4m3", "int8"}


def test_a_name_says_the_whole_form():
    assert Form().name == "fp32"
    whole = Form(format="bf16", channels_last=True, folded=True, compiled=True)
    assert whole.name == "bf16+channels_last+folded+compiled"
    assert whole.to_json() == {"format": "bf16", "channels_last": True, "folded": True, "compiled": True}


def test_no_result_stands_beside_a_weak_baseline_alone():
    assert [form.name for form in baselines(GPU, compiled=True)] == [
        "fp32", "tf32", "bf16", "fp32+compiled", "bf16+compiled",
    ]  # fmt: skip
    assert [form.name for form in baselines({"fp32"}, compiled=True)] == ["fp32", "fp32+compiled"]


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
