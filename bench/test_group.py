"""One site group: qkv, o, gate_up or down, with its norm, SwiGLU or residual."""

SUITE = "group"


def test_group(case, contender, measure):
    measure(case, contender)
