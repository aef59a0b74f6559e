"""TAM and what a user would run instead."""

METHOD = "tam"


def test_step(bench, tensors, contestant):
    bench(tensors, contestant)
