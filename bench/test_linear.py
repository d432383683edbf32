"""One linear of a decoder layer."""

SUITE = "linear"


def test_linear(case, contender, measure):
    measure(case, contender)
