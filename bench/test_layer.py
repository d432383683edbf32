"""One decoder layer: norms, site groups and attention."""

SUITE = "layer"


def test_layer(case, contender, measure):
    measure(case, contender)
