"""Timing that can be repeated: interleaved rounds, medians with spread. Nothing here decides what is fast."""
