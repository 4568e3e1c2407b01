"""A module under several names is one, and is replaced under all of them."""

from __future__ import annotations

from torch import nn

from deepseek_mp.nn.places import owners, places_of, replaced


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.block = nn.Sequential(nn.ReLU(), self.first)
        self.tied = nn.Linear(2, 2, bias=False)
        self.table = nn.Embedding(2, 2)
        self.tied.weight = self.table.weight
        self.empty = None


def test_it_is_replaced_in_every_place():
    model, made = Twice(), nn.Identity()
    assert places_of(model, ["block.1", "tied"]) == {
        "block.1": [(model, "first"), (model.block, "1")],
        "tied": [(model, "tied")],
    }
    assert replaced(model, {"first": made}) is model
    assert model.first is made
    assert model.block[1] is made
    assert replaced(model, {"": made}) is made


def test_a_model_is_walked_once_for_all_of_them(monkeypatch):
    model, walks = nn.Sequential(*(nn.ReLU() for _ in range(5))), []
    monkeypatch.setattr(model, "modules", lambda: walks.append(1) or nn.Module.modules(model))
    replaced(model, {str(index): nn.Identity() for index in range(5)})
    assert walks == [1]
    assert {type(child) for child in model} == {nn.Identity}


def test_owners_are_modules_and_not_names():
    model = Twice()
    found = owners(model)
    assert found[id(model.first.weight)] == 1
    assert found[id(model.tied.weight)] == 2
