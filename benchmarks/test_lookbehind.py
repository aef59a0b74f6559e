"""Whole cycles of Lookbehind and SAM, and what a user would run instead."""

METHOD = "lookbehind"


def test_cycle(bench, tensors, contestant):
    bench(tensors, contestant)
