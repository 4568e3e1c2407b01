"""A served model from a file computes the same bits, on a machine without its code, and says what it is."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, CheckpointError, ConfigError
from deepseek_mp.inference import Form, Served, load, optimize_for_inference
from deepseek_mp.inference import archive as module

CPU = torch.device("cpu")
LOAD = """
import sys, torch
from deepseek_mp.inference import load
x, expected = torch.load(sys.argv[2])
model = load(sys.argv[1], "cpu")
assert torch.equal(model(x), expected)
assert model.origin.model == "Own"
"""


@pytest.fixture
def wide():
    """With a convolution, a BatchNorm and a linear layer that is large enough for 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 256),
        nn.Linear(256, 5),
    ).eval()


FORMS = [
    Form(),
    Form(format="fp16"),
    Form(format="bf16", channels_last=True, folded=True),
    Form(format="bf16", linear="int8_weights"),
    Form(format="fp16", linear="int8_weights"),
    Form(format="bf16", linear="fp8_weights", channels_last=True),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_outputs_are_the_same_bits_for_every_batch_size(wide, form, tmp_path):
    served = Served(wide, form, CPU)
    served.save(tmp_path / "model.pt2", torch.randn(4, 3, 10, 10))
    loaded = load(tmp_path / "model.pt2", "cpu")
    for count in (1, 4, 7):
        x = torch.randn(count, 3, 10, 10)
        assert torch.equal(loaded(x), served(x))
        assert not loaded(x).requires_grad
    assert (loaded.form, loaded.card, loaded.left_alone) == (form, None, served.left_alone)
    assert loaded.device == CPU


@pytest.mark.stress
def test_compiled_outputs_are_the_same_bits(wide, tmp_path):
    served = Served(wide, Form(format="bf16", compiled=True), CPU)
    x = torch.randn(4, 3, 10, 10)
    served.save(tmp_path / "model.pt2", x)
    assert torch.equal(load(tmp_path / "model.pt2", "cpu")(x), served(x))


def test_a_compiled_form_is_compiled_again(wide, tmp_path, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="eager"))
    served = Served(wide, Form(format="bf16", compiled=True), CPU)
    x = torch.randn(2, 3, 10, 10)
    served.save(tmp_path / "model.pt2", x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(load(tmp_path / "model.pt2", "cpu")(x), served(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


class Own(nn.Module):
    """Code of the machine that trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return self.layer(x).relu()


def test_it_loads_where_the_code_is_not(tmp_path):
    served, x = Served(Own(), Form(format="bf16", linear="int8_weights"), CPU), torch.randn(3, 256)
    served.save(tmp_path / "model.pt2", x)
    torch.save((x, served(x)), tmp_path / "data.pt")
    code = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")]
    done = subprocess.run(code, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


class Words(nn.Module):
    """Named arguments in, containers of own kinds out."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, *, tokens, mask):
        scores = self.head(self.words(tokens)) * mask[..., None]
        return {"logits": scores, "best": (scores.argmax(-1), [mask])}


def test_named_arguments_and_structures_come_back(tmp_path):
    served = Served(Words(), Form(format="bf16"), CPU)
    example = {"tokens": torch.ones(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)}
    served.save(tmp_path / "model.pt2", example, dynamic=(0, 1))
    loaded = load(tmp_path / "model.pt2", "cpu")
    given = {"mask": torch.rand(3, 8), "tokens": torch.randint(7, (3, 8))}
    found, expected = loaded(**given), served(**given)
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["best"][1][0], expected["best"][1][0])
    assert found["best"][0].dtype is torch.int64
    with pytest.raises(BatchError, match=r"input kwargs\['tokens'\], int64 \[4, 8\]"):
        loaded(tokens=torch.ones(4, 8, dtype=torch.int64), mask=torch.ones(3, 8))


def test_card_plan_and_example_inputs_come_from_the_optimisation(classifier, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    fast, plan, card = optimize_for_inference(classifier, x, compile=False, seconds=0.02, metric="relative")
    fast.save(tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    assert loaded.card == card
    assert loaded.card.plan == plan
    assert str(loaded.card) == str(card)
    assert loaded.origin == module.Origin(
        model="Sequential", package=module.__version__, torch=torch.__version__, device="cpu"
    )


def test_a_model_that_needs_its_batch_size_says_so(tmp_path):
    class Four(nn.Module):
        def forward(self, x):
            return x.reshape(4, -1)

    Served(Four(), Form(), CPU).save(tmp_path / "model.pt2", torch.randn(4, 3))
    loaded = load(tmp_path / "model.pt2", "cpu")
    assert loaded(torch.randn(4, 3)).shape == (4, 3)
    with pytest.raises(BatchError, match=r"float32 \[2, 3\]\. Allowed: .*\[4, 3\].*make .* again.*sizes are fixed"):
        loaded(torch.randn(2, 3))


def test_the_served_model_stays_as_it_is(wide, tmp_path):
    served = Served(wide, Form(format="bf16", linear="int8_weights"), CPU)
    before = copy.deepcopy(served.state_dict())
    served.save(tmp_path / "model.pt2", torch.randn(2, 3, 10, 10))
    load(tmp_path / "model.pt2", "cpu")
    after = served.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert list(after) == list(before)


def test_a_model_is_moved_to_another_device(wide, tmp_path):
    served = Served(wide, Form(format="bf16", linear="int8_weights"), CPU)
    served.save(tmp_path / "model.pt2", torch.randn(2, 3, 10, 10))
    loaded = load(tmp_path / "model.pt2", "meta")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}
    nodes = loaded.graph.graph.find_nodes(op="call_function", target=torch.ops.deepseek_mp.weight_only_linear.default)
    assert nodes[0].args[4] == "reference"
    assert loaded.graph(((torch.randn(2, 3, 10, 10, device="meta")),), {}).shape == (2, 5)


def test_what_cannot_be_saved_is_refused(wide, tmp_path):
    served = Served(wide, Form(), CPU)
    with pytest.raises(ConfigError, match="saved without example inputs"):
        served.save(tmp_path / "model.pt2")
    with pytest.raises(ConfigError, match="a directory"):
        served.save(tmp_path, torch.randn(2, 3, 10, 10))

    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ConfigError, match=r"a Decides that torch\.export cannot export .*test_archive\.py:\d+: return x if"
    ):
        Served(Decides(), Form(), CPU).save(tmp_path / "model.pt2", torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == []


@dataclass
class Scores:
    logits: torch.Tensor


def test_outputs_in_a_dataclass_are_refused_by_its_name(tmp_path):
    class Scored(nn.Linear):
        def forward(self, x):
            return {"scores": Scores(super().forward(x))}

    served = Served(Scored(4, 2), Form(), CPU)
    with pytest.raises(ConfigError, match=r"^outputs in a Scores\. Allowed: tensors, .* Let the forward return a dict"):
        served.save(tmp_path / "model.pt2", torch.randn(3, 4))


def test_training_a_loaded_model_is_refused(wide, tmp_path):
    Served(wide, Form(), CPU).save(tmp_path / "model.pt2", torch.randn(2, 3, 10, 10))
    loaded = load(tmp_path / "model.pt2", "cpu")
    assert loaded.eval() is loaded
    with pytest.raises(ConfigError, match=r"train\(\) of a model from a file"):
        loaded.train()


def rewritten(path, change):
    """The archive with `served.json` changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("served.json"))
    about = json.loads(files[name])
    change(about)
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in {**files, name: json.dumps(about).encode()}.items():
            archive.writestr(other, data)


def test_tf32_is_fp32_where_the_device_has_none(wide, tmp_path):
    path, served, x = tmp_path / "model.pt2", Served(wide, Form(), CPU), torch.randn(2, 3, 10, 10)
    served.save(path, x)
    rewritten(path, lambda about: about["form"].update(format="tf32"))
    loaded = load(path, "cpu")
    assert loaded.form == Form(format="tf32")
    assert torch.equal(loaded(x), served(x))


BAD = {
    "another version": (
        lambda about: about.update(version=2, origin={"package": "9.9"}),
        r"saved by deepseek_mp 9\.9 in version 2 of the format\. Allowed: version 1\. Save the model again",
    ),
    "no version": (lambda about: about.clear(), "in version None of the format"),
    "form": (lambda about: about.update(form={"format": "fp3", "size": 2}), r"served\.json is damaged \(TypeError"),
    "form of no kind": (lambda about: about.update(form=[1]), r"is damaged \(TypeError: a list as a form"),
    "switch of no kind": (lambda about: about["form"].update(compiled="no"), r"is damaged \(TypeError: compiled='no'"),
    "left alone": (lambda about: about.update(left_alone=[1]), r"is damaged \(TypeError: left_alone"),
    "signature": (lambda about: about.pop("signature"), r"is damaged \(KeyError: 'signature'"),
    "ranges": (lambda about: about["signature"].update(ranges=[1]), r"is damaged \(TypeError: a list as ranges"),
    "card": (lambda about: about.update(card={}), r"is damaged \(KeyError: 'trials'"),
    "formats": (
        lambda about: about["tensors"]["model.4.q"].update(kind="fnuz"),
        r"tensor 'model\.4\.q', .*'kind': 'ocp'.*, said to be .*'kind': 'fnuz'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_says_something_else_is_refused(wide, case, tmp_path):
    path = tmp_path / "model.pt2"
    Served(wide, Form(format="bf16", linear="fp8_weights"), CPU).save(path, torch.randn(2, 3, 10, 10))
    rewritten(path, BAD[case][0])
    with pytest.raises(CheckpointError, match=BAD[case][1]):
        load(path)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    missing = next(kind for kind in ("cuda", "xpu") if not torch.get_device_module(kind).is_available())
    Served(nn.Linear(4, 2), Form(), CPU).save(tmp_path / "model.pt2", torch.randn(2, 4))
    with pytest.raises(ConfigError, match=f"no '{missing}' device can be used"):
        load(tmp_path / "model.pt2", missing)
    with pytest.raises(ConfigError, match=r"device 'foo' is not known.*Allowed: .*cpu"):
        load(tmp_path / "model.pt2", "foo")


def test_a_copy_of_a_compiled_model_runs_its_own_weights(tmp_path, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="eager"))
    x = torch.randn(2, 4)
    Served(nn.Linear(4, 2), Form(compiled=True), CPU).save(tmp_path / "model.pt2", x)
    loaded = load(tmp_path / "model.pt2", "cpu")
    expected = loaded(x)
    made = copy.deepcopy(loaded)
    assert torch.equal(made(x), expected)
    with torch.no_grad():
        for weight in made.graph.parameters():
            weight.zero_()
    assert not made(x).any()
    assert torch.equal(loaded(x), expected)


def test_threads_save_one_model_and_load_it(wide, tmp_path):
    served, x = Served(wide, Form(format="bf16", linear="int8_weights"), CPU), torch.randn(4, 3, 10, 10)

    def saved(name):
        served.save(tmp_path / name, x)
        return load(tmp_path / name, "cpu")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(saved, ["one.pt2", "one.pt2", "two.pt2", "two.pt2"]))
    expected = served(x)
    assert all(torch.equal(loaded(x), expected) for loaded in found)


def test_a_loaded_model_is_copied_but_not_pickled(tmp_path):
    x = torch.randn(2, 4)
    Served(nn.Linear(4, 2), Form(), CPU).save(tmp_path / "model.pt2", x)
    loaded = load(tmp_path / "model.pt2", "cpu")
    for made in (copy.copy(loaded), copy.deepcopy(loaded)):
        assert torch.equal(made(x), loaded(x))
        assert (made.form, made.formats, str(made.signature)) == (loaded.form, loaded.formats, str(loaded.signature))
    first, second = copy.deepcopy([loaded, loaded])
    assert first is second
    for write in (pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(ConfigError, match=r"a model from a file to be pickled .* Allowed: its file\. Pass that on"):
            write(loaded)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_state_of_a_loaded_model_has_each_tensor_once(tmp_path, compiled):
    served = Served(nn.Linear(4, 2), Form(compiled=compiled), torch.device("cpu"))
    served.save(tmp_path / "model.pt2", (torch.randn(3, 4),))
    state = load(tmp_path / "model.pt2").state_dict()
    assert len(state) == 2


class Remembers(nn.Module):
    """State that each forward writes to or replaces, and that the outputs depend on."""

    def __init__(self, replaces):
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.replaces:
            self.mean = self.mean * 0.5 + x.mean(0)
        else:
            self.mean.mul_(0.5).add_(x.mean(0))
        return x - self.mean


@pytest.mark.parametrize("kind", ["int8_weights", "int4_weights"])
def test_a_layer_under_two_names_gives_the_same_bits(kind, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(256, 256)
            self.block = nn.Sequential(nn.ReLU(), self.first)

        def forward(self, x):
            return self.block(self.first(x))

    served, x = Served(Twice(), Form(format="bf16", linear=kind), CPU), torch.randn(3, 256)
    assert served.left_alone == {}
    served.save(tmp_path / "model.pt2", x)
    assert served.model.first is served.model.block[1]
    loaded = load(tmp_path / "model.pt2", "cpu")
    assert torch.equal(loaded(x), served(x))
    held = {tensor.data_ptr() for name, tensor in loaded.state_dict().items() if name.endswith(".q")}
    assert len(held) == 1


def test_state_is_saved_as_it_is_and_goes_on_from_there(tmp_path):
    served, x = Served(Remembers(replaces=False), Form(), CPU), torch.randn(3, 4)
    served(x)
    before = served.model.mean.clone()
    served.save(tmp_path / "model.pt2", x)
    assert torch.equal(served.model.mean, before)
    loaded = load(tmp_path / "model.pt2", "cpu")
    for _ in range(3):
        assert torch.equal(loaded(x), served(x))


def test_state_that_the_graph_would_not_keep_is_refused(tmp_path):
    served, x = Served(Remembers(replaces=True), Form(), CPU), torch.randn(3, 4)
    with pytest.raises(ConfigError, match="write to state in place"):
        served.save(tmp_path / "model.pt2", x)
    assert torch.equal(served.model.mean, torch.zeros(4))


def test_inputs_that_the_forward_writes_to_stay_as_they_were(tmp_path):
    class Doubles(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    served, x = Served(Doubles(), Form(), CPU), torch.randn(3, 4)
    before = x.clone()
    served.save(tmp_path / "model.pt2", x)
    assert torch.equal(x, before)
    loaded = load(tmp_path / "model.pt2", "cpu")
    assert torch.equal(loaded(x.clone()), before * 2 + 1)
