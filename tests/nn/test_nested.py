from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.nn.nested import check_nesting, first_tensor, map_leaves, numbers, tensors

Pair = namedtuple("Pair", ["left", "right"])


def _plus_one(leaf: object) -> object:
    return leaf + 1 if isinstance(leaf, int) else leaf


@pytest.mark.parametrize(
    "tree",
    [
        (1, 2),
        [1, 2],
        Pair(1, 2),
        {"a": 1, "b": 2},
        OrderedDict(a=1, b=2),
        defaultdict(int, a=1, b=2),
        UserDict(a=1, b=2),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_containers_keep_their_type_and_only_leaves_change(tree: object) -> None:
    changed = map_leaves(tree, _plus_one)
    assert type(changed) is type(tree)
    assert list(changed.values() if hasattr(changed, "values") else changed) == [2, 3]
    assert list(tree.values() if hasattr(tree, "values") else tree) == [1, 2]


def test_nested_containers_are_walked_to_the_leaves() -> None:
    assert map_leaves((1, [2, {"a": Pair(3, None)}], "x"), _plus_one) == (2, [3, {"a": Pair(4, None)}], "x")


def test_a_read_only_mapping_becomes_a_dict() -> None:
    assert map_leaves(MappingProxyType({"a": 1}), _plus_one) == {"a": 2}


def test_a_container_with_a_to_method_is_a_leaf() -> None:
    class Tokens(UserDict):
        def to(self, device: object) -> "Tokens":
            return self

    tokens = Tokens(a=1)
    assert map_leaves([tokens], lambda leaf: "changed" if leaf is tokens else leaf) == ["changed"]


def test_first_tensor_is_the_first_in_order() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor(({"x": [None, a]}, b)) is a
    assert first_tensor((1, "x", [])) is None


@dataclass
class Output:
    logits: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    name: str = "output"


def test_tensors_of_every_container_in_order() -> None:
    one, two, three, four = (torch.tensor(float(n)) for n in range(4))
    tree = {"a": [one, 5, None], "b": Output(two, (three,)), "c": (four,)}
    assert [float(tensor) for tensor in tensors(tree)] == [0, 1, 2, 3]
    assert not list(tensors(Output))  # the class, not an object of it


def test_numbers_are_dense_and_can_be_non_finite() -> None:
    sparse = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,))
    found = list(numbers([torch.tensor(1), sparse, torch.ones(2, dtype=torch.complex64), torch.ones(1)]))
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.complex64, torch.float32]
    assert found[0].tolist() == [3.0]  # entries of one place are added up
    assert next(numbers(torch.eye(2).to_sparse_csr())).tolist() == [1.0, 1.0]


@dataclass(frozen=True)
class Answer:
    logits: torch.Tensor
    parts: list
    name: str = "a"
    later: int = field(init=False, repr=False)


def test_dataclasses_are_the_same_kind_with_other_leaves():
    answer = Answer(torch.ones(2), [torch.zeros(1), None])
    made = map_leaves({"answer": answer}, lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf)["answer"]
    assert type(made) is Answer
    assert made.logits.tolist() == [2, 2]
    assert made.parts[0].tolist() == [1]
    assert (made.parts[1], made.name, hasattr(made, "later")) == (None, "a", False)
    assert answer.logits.tolist() == [1, 1]
    assert map_leaves(answer, lambda leaf: leaf).logits is answer.logits
    assert map_leaves(Answer, lambda leaf: leaf) is Answer


def test_a_dataclass_without_another_leaf_is_itself():
    plain = Answer(torch.ones(2), (), "b")
    assert map_leaves(plain, lambda leaf: leaf) is plain


@dataclass
class Settings:
    sizes: list
    names: dict
    read_only: object = None


def test_a_dataclass_that_holds_containers_without_another_leaf_is_itself():
    """Such as a cache, whose lists the model adds to, or settings."""
    cache = Settings([1, [torch.ones(1)]], {"a": ("x", None)}, MappingProxyType({"b": [2]}))
    outer = Settings([cache], {})
    assert map_leaves([outer], lambda leaf: leaf)[0] is outer
    made = map_leaves(cache, lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf)
    assert (made.sizes[1][0].tolist(), cache.sizes[1][0].tolist()) == ([2], [1])


def test_tensors_of_dataclasses_are_found_without_those_fields_that_have_no_value():
    answer = Answer(torch.ones(2), [torch.zeros(1)])
    assert [tensor.tolist() for tensor in tensors([3, answer])] == [[1, 1], [0]]
    assert first_tensor([3, {"a": answer}]) is answer.logits


@dataclass
class Sentences:
    ids: torch.Tensor

    def __post_init__(self):
        self.lengths = self.ids.sum(-1)

    @cached_property
    def mask(self):
        return self.ids != 0


def test_what_a_dataclass_holds_beside_its_fields_changes_too():
    """Or a batch's mask would stay where it was computed."""
    sentences = Sentences(torch.ones(2, 3))
    assert sentences.mask.all()
    made = map_leaves(sentences, lambda leaf: leaf.to("meta"))
    assert [one.device.type for one in (made.ids, made.lengths, made.mask)] == ["meta"] * 3
    assert [one.device.type for one in (sentences.ids, sentences.lengths, sentences.mask)] == ["cpu"] * 3


def holding_itself(kind):
    if kind is Answer:
        tree = Answer(torch.ones(2), [])
        tree.parts.append({"again": tree})
        return tree
    tree = [] if kind is list else {}
    inner = (tree,)
    if kind is list:
        tree.append(inner)
    else:
        tree["again"] = inner
    return [torch.ones(1), tree]


@pytest.mark.parametrize("kind", [list, dict, Answer])
def test_a_container_that_holds_itself_is_refused(kind):
    with pytest.raises(
        ConfigError, match=rf"a batch with a {kind.__name__} that holds itself\. Allowed: containers that"
    ):
        check_nesting(holding_itself(kind), "a batch")


def test_a_container_may_be_in_several_places():
    twice, empty = [torch.ones(1)], []
    check_nesting([twice, {"a": twice, "b": (empty, [empty])}, Answer(twice[0], twice), ()], "a batch")
