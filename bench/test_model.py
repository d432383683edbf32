"""A whole text model in a real configuration, with random weights."""

SUITE = "model"


def test_model(case, contender, measure):
    measure(case, contender)
