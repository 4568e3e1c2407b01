"""A copied function computes the same from code that nobody else has."""

from deepseek_mp.nn.own_code import with_own_code


def test_copies_of_a_closure_have_codes_and_names_of_their_own():
    outer = 3

    def function(x, y=2):
        return x + y + outer

    one, two = with_own_code(function), with_own_code(function)
    assert one(1) == two(1) == function(1) == 6
    assert len({f.__code__ for f in (one, two, function)}) == 3
    assert len({f.__code__.co_name for f in (one, two, function)}) == 3
