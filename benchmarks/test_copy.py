"""The machine's own copy speed, which the others' GB/s are a share of."""


def test_copy(bench, tensors):
    bench.copy(tensors)
