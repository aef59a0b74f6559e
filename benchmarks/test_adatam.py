"""AdaTAMW and what a user would run instead."""

METHOD = "adatam"


def test_step(bench, tensors, contestant):
    bench(tensors, contestant)
