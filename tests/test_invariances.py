"""What must not change a result: the order of tensors, how they are cut and grouped, the scale of the gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import each_class, ids, randoms, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import COSINE, REORDERED, close

import torsion

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
seeds = st.integers(0, 2**31)
powers = st.integers(-20, 20)
few = settings(max_examples=20)
STEPS = 3


def run(target, cls, start, gradients, arrange=lambda params: params, **keywords):
    """The parameters, flattened and joined in the given order, after a step per entry of ``gradients``."""
    params = [target.parameter(t) for t in start]
    keywords = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 3.0, **keywords}
    optimizer = target.optimizer(cls, arrange(params), **keywords)
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.device)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params]), optimizer


def problem(seed, shapes):
    torch.manual_seed(seed)
    return randoms(shapes), [randoms(shapes) for _ in range(STEPS)]


def same_run(a, b):
    """Parameters, cosine and norm of two runs agree up to the order of their sums."""
    close(a[0], b[0], REORDERED)
    close(a[1].cosine()["global"], b[1].cosine()["global"], COSINE[torch.float64])
    close(a[1].grad_norm(), b[1].grad_norm(), REORDERED)


@each_class
@few
@given(lengths=sizes, seed=seeds, random=st.randoms(use_true_random=False))
def test_order_of_tensors(fast_target, cls, lengths, seed, random):
    start, gradients = problem(seed, [(n,) for n in lengths])
    order = list(range(len(lengths)))
    random.shuffle(order)
    same_run(
        run(fast_target, cls, start, gradients),
        run(fast_target, cls, start, gradients, lambda params: [params[i] for i in order]),
    )


@each_class
@few
@given(lengths=sizes, seed=seeds)
def test_chunking(fast_target, cls, lengths, seed):
    """One tensor, or the same elements as many."""
    whole, gradients = problem(seed, [(sum(lengths),)])
    pieces = [list(g[0].split(lengths)) for g in gradients]
    same_run(run(fast_target, cls, whole, gradients), run(fast_target, cls, whole[0].split(lengths), pieces))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_chunking_across_the_chunks_of_the_kernels(parts, fast_target):
    whole, gradients = problem(0, [(3 * 16384 + 5,)])
    pieces = [list(g[0].tensor_split(parts)) for g in gradients]
    same_run(
        run(fast_target, torsion.TAM, whole, gradients),
        run(fast_target, torsion.TAM, whole[0].tensor_split(parts), pieces),
    )


@each_class
@few
@given(lengths=sizes, seed=seeds, data=st.data())
def test_group_split_with_global_scope(fast_target, cls, lengths, seed, data):
    """The usual split into decayed and undecayed parameters changes nothing but the decay: here not one bit."""
    start, gradients = problem(seed, [(n,) for n in lengths])
    cut = data.draw(st.integers(0, len(lengths)))

    def split(params):
        return [{"params": part} for part in (params[:cut], params[cut:]) if part]

    a, b = run(fast_target, cls, start, gradients), run(fast_target, cls, start, gradients, split)
    assert same_bits([a[0]], [b[0]])


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAM], ids=ids)
def test_order_chunking_and_group_split_in_triton(cls, triton_target):
    """The three above on one example: the interpreter is too slow for twenty."""
    lengths = [3, 0, 9, 1]
    whole, gradients = problem(1, [(sum(lengths),)])
    pieces = [list(g[0].split(lengths)) for g in gradients]
    expected = run(triton_target, cls, whole, gradients)
    same_run(expected, run(triton_target, cls, whole[0].split(lengths), pieces, lambda params: params[::-1]))
    halves = lambda params: [{"params": params[:2]}, {"params": params[2:]}]  # noqa: E731
    same_run(expected, run(triton_target, cls, whole[0].split(lengths), pieces, halves))


def test_scope_group_and_tensor_do_depend_on_the_split(fast_target):
    """The other scopes are other algorithms: were they not, the tests above would show nothing."""
    start, gradients = problem(0, [(5,), (6,)])
    results = [run(fast_target, torsion.TAM, start, gradients, scope=scope)[0] for scope in ("global", "tensor")]
    assert (results[0] - results[1]).abs().max() > 1e-6
    two = lambda params: [{"params": [p]} for p in params]  # noqa: E731
    results.append(run(fast_target, torsion.TAM, start, gradients, two, scope="group")[0])
    assert same_bits([results[1]], [results[2]])


# Scale of the gradient. Powers of two are exact: where the method is scale free, so are the bits.


def _scaled(gradients, factor):
    return [[factor * g for g in grads] for grads in gradients]


@each_class
@few
@given(seed=seeds, power=powers)
def test_cosine_is_invariant_to_the_scale_of_the_gradient(fast_target, cls, seed, power):
    """Also of one step's gradient alone: only its direction counts."""
    start, gradients = problem(seed, [(5,), (3, 2)])
    keywords = {"weight_decay": 0.0, "max_grad_norm": None}
    plain = run(fast_target, cls, start, gradients, **keywords)[1]
    scaled = run(fast_target, cls, start, [*gradients[:-1], *_scaled(gradients[-1:], 2.0**power)], **keywords)[1]
    assert scaled.cosine()["global"].item() == plain.cosine()["global"].item()
    third = run(fast_target, cls, start, [*gradients[:-1], *_scaled(gradients[-1:], 1 / 3)], **keywords)[1]
    close(third.cosine()["global"], plain.cosine()["global"], COSINE[torch.float64])


@few
@given(seed=seeds, power=powers)
def test_tam_displacement_is_linear_in_a_common_gradient_scale(fast_target, seed, power):
    _, gradients = problem(seed, [(5,), (3, 2)])
    start = [torch.zeros(5), torch.zeros(3, 2)]
    keywords = {"weight_decay": 0.0, "max_grad_norm": None}
    plain = run(fast_target, torsion.TAM, start, gradients, **keywords)[0]
    scaled = run(fast_target, torsion.TAM, start, _scaled(gradients, 2.0**power), **keywords)[0]
    assert same_bits([scaled], [2.0**power * plain])
    scaled = run(fast_target, torsion.TAM, start, _scaled(gradients, 3.0), **keywords)[0]
    close(scaled, 3.0 * plain, REORDERED)


@few
@given(seed=seeds, power=powers)
def test_adatam_displacement_is_scale_invariant(fast_target, seed, power):
    """eps aside, which is 0 here. A power of two leaves m and the root of v exact."""
    _, gradients = problem(seed, [(5,), (3, 2)])
    start = [torch.zeros(5), torch.zeros(3, 2)]
    keywords = {"weight_decay": 0.0, "max_grad_norm": None, "eps": 0.0}
    plain = run(fast_target, torsion.AdaTAM, start, gradients, **keywords)[0]
    scaled = run(fast_target, torsion.AdaTAM, start, _scaled(gradients, 2.0**power), **keywords)[0]
    assert same_bits([scaled], [plain])
    scaled = run(fast_target, torsion.AdaTAM, start, _scaled(gradients, 3.0), **keywords)[0]
    close(scaled, plain, REORDERED)


@each_class
@few
@given(seed=seeds, power=st.integers(0, 24))
def test_loss_scale_of_a_power_of_two_is_exact(fast_target, cls, seed, power):
    """Gradients times 2^k with grad_scale 2^k, against plain ones: clip, decay, cosine and all, bit for bit."""
    start, gradients = problem(seed, [(5,), (3, 2)])
    scale = torch.tensor(2.0**power, device=fast_target.device)
    results = []
    for factor in (None, scale):
        params = [fast_target.parameter(t) for t in start]
        optimizer = fast_target.optimizer(cls, params, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
        if factor is not None:
            optimizer.grad_scale = factor
        for grads in gradients:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.device) * (1 if factor is None else factor)
            optimizer.step()
        results.append([p.detach() for p in params] + [optimizer.grad_norm()])
    assert same_bits(*results)


@each_class
@few
@given(seed=seeds, limit=st.floats(0.01, 100))
def test_clipping_in_the_step_is_a_gradient_clipped_before_it(fast_target, cls, seed, limit):
    start, gradients = problem(seed, [(5,), (3, 2)])
    clipped = []
    for grads in gradients:
        norm = torch.cat([g.reshape(-1) for g in grads]).norm()
        clipped.append([g * min(1.0, limit / (float(norm) + 1e-6)) for g in grads])
    folded = run(fast_target, cls, start, gradients, max_grad_norm=limit)[0]
    close(folded, run(fast_target, cls, start, clipped, max_grad_norm=None)[0], REORDERED)


@few
@given(seed=seeds, permutation=st.permutations(range(4)))
def test_memory_order_of_a_tensor(fast_target, seed, permutation):
    """Any order of dimensions in memory: the same elements get the same result."""
    start, gradients = problem(seed, [(2, 3, 4, 5)])
    back = [permutation.index(d) for d in range(4)]
    params = []
    for reorder in (False, True):
        values = start[0].permute(permutation).contiguous().permute(back) if reorder else start[0].clone()
        p = torch.nn.Parameter(values.to(fast_target.device))
        optimizer = fast_target.optimizer(torsion.TAM, [p], lr=0.1, weight_decay=0.1)
        for grads in gradients:
            p.grad = grads[0].to(p.device)
            optimizer.step()
        params.append(p)
    close(params[1], params[0], REORDERED)
