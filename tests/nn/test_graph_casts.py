"""What the graph's casts are, and which nodes hold the same tensor."""

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from deepseek_mp.nn.graph_casts import casts_of, is_cast, is_transparent, origin, unrounded
from deepseek_mp.ops.schema import quantise

X = torch.randn(4, 32, 128)


def cast_of(of):
    """The one cast in the graph of `of`, whose result is quantised, and the graph's input."""

    def run(x):
        return quantise(of(x).reshape(-1, 128), "fp8_e4m3", "1x128", True, True, False, "reference")[0]

    graph = make_fx(run, select_decomp_table(), tracing_mode="fake")(X).graph
    (cast,) = casts_of(graph)
    return cast, next(iter(graph.nodes))


def test_a_cast_is_found_with_its_settings_and_the_results_that_are_used():
    cast, _ = cast_of(lambda x: x)
    assert is_cast(cast.node)
    assert dict(cast.settings) == {
        "format": "fp8_e4m3", "granularity": "1x128", "power_of_two": True, "rows": True, "columns": False,
        "implementation": "reference",
    }  # fmt: skip
    assert 0 in cast.results
    assert cast.scaling is None


def test_views_of_the_whole_are_seen_through_and_views_of_a_part_are_not():
    cast, x = cast_of(lambda x: x.view(2, 64, 128)[:])
    assert origin(cast.x) is x
    cast, x = cast_of(lambda x: x[1:])
    assert origin(cast.x) is not x
    assert unrounded(cast.x) is not x


def test_roundings_are_seen_through_where_they_are_no_more_than_that():
    cast, x = cast_of(lambda x: x.bfloat16().float())
    assert unrounded(cast.x) is x
    assert origin(cast.x) is not x
    cast, x = cast_of(lambda x: x.int().float())  # cuts values
    assert unrounded(cast.x) is not x


def test_what_computes_is_not_transparent():
    cast, _ = cast_of(lambda x: x * 2)
    assert not is_transparent(origin(cast.x))
    assert not is_transparent(cast.node)
