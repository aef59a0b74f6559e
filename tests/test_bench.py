"""`torsion bench`: the command, its record and the gate. Nothing here is timed."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torsion
from torsion.cli import main
from torsion.cli.bench import contestants, layers, network, overhead, pruning, suite
from torsion.cli.bench.comparisons import COMPARISONS, METHODS, Comparison, Limit
from torsion.cli.bench.contestants import CONTESTANTS
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import GateError, check
from torsion.cli.bench.lists import LISTS, TensorList
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.timing import Turn

CPU = torch.device("cpu")
PLACE = Place(CPU, threads=1, rounds=1)
TOY = TensorList("toy", ((64, 9), (33,), (1,), ()))
SLOW = ("compiled TAM", "pytorch_optimizer TAM")  # a compiler and a large import


@pytest.fixture
def toy(monkeypatch):
    """A list that takes no time, and no figure that needs processes of its own."""
    monkeypatch.setitem(LISTS, "toy", TOY)
    monkeypatch.setattr(overhead, "memory_figures", lambda *_: iter(()))
    monkeypatch.setattr(network, "network_figures", lambda *_: iter(()))
    monkeypatch.setattr(
        overhead, "import_figure", lambda place: Figure.at(place, "import", "", "s", Limit(0.5, ()), value=0.1)
    )
    for name in SLOW:
        monkeypatch.setitem(CONTESTANTS[name].skipped, "toy", "it takes too long for a test")
    return TOY


def _replace(monkeypatch, name, build):
    old = CONTESTANTS[name]
    fields = {key: getattr(old, key) for key in old.__dataclass_fields__}
    monkeypatch.setitem(CONTESTANTS, name, type(old)(**{**fields, "build": build}))


def _refused(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *words])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


# The command


def test_a_run_prints_every_contestant_and_writes_a_record_and_a_plot(capsys, tmp_path, toy):
    record, plot = tmp_path / "record.json", tmp_path / "plot.png"
    words = ["bench", "tam", "adatam", "lookbehind", "--list", "toy", "--threads", "1", "--rounds", "3"]
    assert main([*words, "--device", "cpu", "--json", str(record), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert "checking" in err
    assert "timing" in err
    for comparison in COMPARISONS:
        if comparison.device in ("", "cpu"):
            assert all(name in out for name in comparison.contestants)
    assert "fewer than 20 rounds" in out
    assert "not run: it takes too long for a test" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    _check_record(json.loads(record.read_text()))


@pytest.fixture
def brief(monkeypatch):
    """Layers and networks that take seconds."""
    monkeypatch.setattr(layers, "_ROWS", 8)
    monkeypatch.setattr(layers, "_MANY_ROWS", 16)
    monkeypatch.setattr(layers, "_WIDTHS", (64, 96))
    monkeypatch.setattr(pruning, "_TOKENS", 16)
    monkeypatch.setattr(pruning, "_BATCH", 2)
    monkeypatch.setattr(pruning, "_LIST", "tiny")
    monkeypatch.setattr(pruning, "_SEEDS", 1)
    monkeypatch.setattr(pruning, "_STEPS", 4)
    monkeypatch.setattr(pruning, "_WIDTH", 16)


def test_layers_and_networks_are_timed_where_they_are_right(capsys, tmp_path, brief):
    record = tmp_path / "record.json"
    words = ["bench", "masked", "demp", "--threads", "1", "--rounds", "2", "--device", "cpu", "--json", str(record)]
    assert main(words) == 0
    capsys.readouterr()
    figures = json.loads(record.read_text())["figures"]
    found = {figure["what"] for figure in figures}
    assert found >= {"masked linear, cached order", "masked linear, any order", "mask-multiply", "masked conv"}
    assert found >= {"feed-forward, 50% dead, cut", "AdaTAMW, lasso and noise inside", "training with DemP"}
    ideal = next(f for f in figures if f["what"] == "masked linear, cached order")
    assert ideal["against"] == "0.0625 of dense"
    assert ideal["value"] == pytest.approx(ideal["seconds"] / ideal["baseline_seconds"] / 0.0625, rel=0.9)


def test_a_wrong_layer_is_not_reported(capsys, monkeypatch, brief):
    right = torsion.ops.masked_linear
    monkeypatch.setattr(
        torsion.ops, "masked_linear", lambda x, w, b, *rest, **more: right(x, w, b, *rest, **more) * 1.01
    )
    assert main(["bench", "masked", "--threads", "1", "--rounds", "2", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "nothing is reported" in err
    assert not out


SMALL = pruning._Block(32, 128, 64, torch.bfloat16, align=8)


def test_bfloat16_is_timed_where_it_is_right():
    figures = [*layers._large(PLACE, 64, 16), *pruning._ffn(PLACE, 0.9, None, SMALL)]
    assert {(f.dtype, f.limit) for f in figures} == {("bfloat16", None)}
    members = ("masked linear, cached order", "masked linear, any order", "mask-multiply")
    assert [f.what for f in figures if f.what != "dense"] == [*members * 2, "feed-forward, 90% dead, cut"]
    wheres = [f"64 x 64, {live}% live, 16 rows, bfloat16" for live in (50, 25)]
    assert list(dict.fromkeys(f.list for f in figures)) == [*wheres, "32 x 128, 64 rows, bfloat16"]


def test_the_gate_stops_what_is_2_percent_off_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torsion.prune, "compact", lambda model, *_, **__: model[2].weight.data.mul_(1.02))
    with pytest.raises(GateError, match="feed-forward"):
        list(pruning._ffn(PLACE, 0.5, None, SMALL))
    right = torsion.ops.masked_linear
    monkeypatch.setattr(torsion.ops, "masked_linear", lambda *words, **more: right(*words, **more) * 1.02)
    with pytest.raises(GateError, match="cached order"):
        list(layers._large(PLACE, 64, 16))


@pytest.mark.parametrize(("device", "figures"), [("cpu", 0), ("cuda", 2 * 3 + 3)])
def test_bfloat16_is_left_to_a_gpu(monkeypatch, device, figures):
    asked = []
    for name in ("_linear", "_small", "_conv", "_mask_multiply", "_ffn", "_detection", "_update", "_training"):
        module = layers if hasattr(layers, name) else pruning
        monkeypatch.setattr(module, name, lambda _, *words, **__: asked.extend(words) or ())
    place = Place(torch.device(device), 1, 1)
    assert [*layers.masked_figures(place), *pruning.demp_figures(place)] == []
    assert [getattr(word, "dtype", None) for word in asked].count(torch.bfloat16) == figures


def _check_record(record):
    assert record["schema"] == 1
    environment = record["environment"]
    for field in ("date", "commit", "torsion", "torch", "triton", "python", "processor", "device", "threads", "build"):
        assert field in environment
    assert environment["torch"] == torch.__version__
    assert record["settings"]["rounds"] == 3
    ratios = [figure for figure in record["figures"] if figure["unit"] == "x" and figure["value"] is not None]
    assert {figure["what"] for figure in ratios} >= {"TAM", "AdaTAMW", "TAM, max_grad_norm", "eager foreach TAM"}
    cycles = {figure["what"]: (figure["evaluations"], figure["bytes_per_element"]) for figure in ratios}
    assert cycles["Lookbehind(SGD), k=5"] == (6, 176)
    assert cycles["published Lookbehind, k=5"] == (10, 604)
    assert cycles["TAM"] == (None, 28)
    for figure in ratios:
        assert (figure["list"], figure["threads"], figure["dtype"], figure["device"]) == ("toy", 1, "float32", "cpu")
        assert figure["clock"] == "process CPU time"
        assert 0 < figure["p20"] <= figure["value"] <= figure["p80"]
        assert figure["rounds"] >= 1
        assert not figure["quotable"]
        assert CONTESTANTS[figure["against"]]
    assert record["figures"][-1]["passed"] is True


def test_a_method_restricts_what_is_run(capsys, toy):
    assert main(["bench", "adatam", "--list", "toy", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "AdaTAMW" in out
    assert "SGD" not in out


def test_more_threads_go_by_wall_time_and_are_put_back(capsys, toy):
    before = torch.get_num_threads()
    assert main(["bench", "adatam", "--list", "toy", "--rounds", "1", "--threads", "2"]) == 0
    assert "wall time" in capsys.readouterr().out
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "flag", "remedy"),
    [
        (["lookbehinds"], "lookbehinds", "tam"),
        (["--list", "resnet50"], "--list", "resnet18"),
        (["--threads", "0"], "--threads", "at least 1"),
        (["--rounds", "many"], "--rounds", "not an integer"),
        (["--device", "tpu"], "--device", "cuda"),
        (["--plot", "bench.txt"], "--plot", ".png"),
        (["--json", "no/such/folder/bench.json"], "--json", "existing directory"),
        (["--lists", "tiny"], "--lists", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_with_flag_and_remedy(capsys, words, flag, remedy):
    line = _refused(capsys, *words)
    assert flag in line
    assert remedy in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert "--device cpu" in _refused(capsys, "--device", "cuda")


def test_an_interrupted_run_reports_what_it_has(capsys, monkeypatch, toy):
    def interrupted(tensors, methods, place, progress):
        yield Figure.at(place, "TAM", "toy", "x", value=1.25, against="SGD fused", rounds=20)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_list", interrupted)
    assert main(["bench", "--list", "toy"]) == 130
    assert "1.25" in capsys.readouterr().out


@pytest.mark.cuda
def test_a_run_on_a_gpu(capsys, tmp_path, toy):
    record = tmp_path / "record.json"
    assert main(["bench", "--list", "toy", "--rounds", "2", "--device", "cuda", "--json", str(record)]) == 0
    figures = {(figure["what"], figure["unit"]): figure for figure in json.loads(record.read_text())["figures"]}
    assert figures["TAM", "x"]["clock"] == "CUDA events"
    assert figures["TAM, max_grad_norm, scaled", "x"]["value"] > 0
    assert figures["TAM: host time of step()", "s"]["value"] > 0


# The gate


def _frozen_damping(params, lr):
    """SGD at half the rate is TAM whose cosine is never looked at."""
    return torch.optim.SGD(params, lr / 2, 0.9).step


def _own_cosines(params, lr):
    return torsion.TAM(params, lr, scope="tensor").step


def _nan(params, lr):
    return lambda: [p.data.fill_(math.nan) for p in params]


@pytest.mark.parametrize("broken", [_frozen_damping, _own_cosines, _nan])
def test_a_broken_contestant_stops_the_report(capsys, monkeypatch, tmp_path, toy, broken):
    _replace(monkeypatch, "TAM", broken)
    record = tmp_path / "record.json"
    assert main(["bench", "tam", "--list", "toy", "--rounds", "1", "--json", str(record)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "TAM on toy" in err.splitlines()[-1]
    assert "float64" in err
    assert not record.exists()


def _rho_off(params, lr):
    sgd = torch.optim.SGD(params, lr, 0.9, weight_decay=5e-4)
    rho = 1.01 * contestants._rho(params)
    return contestants._phases(torsion.Lookbehind(sgd, k=5, rho=rho), 5)


def _forgetful(params, lr):
    return lambda: contestants._lookbehind(contestants._cycle_sgd, 5)(params, lr)()


def _variant(k=5, **options):
    return contestants._lookbehind(contestants._cycle_sgd, k, **options)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("Lookbehind(SGD), k=5", _variant(alpha=0.51)),
        ("Lookbehind(SGD), k=5", _variant(k=4)),
        ("Lookbehind(SGD), k=5", _variant(alpha="adaptive")),
        ("Lookbehind(SGD), k=5", _rho_off),
        ("Lookbehind(SGD), k=5", _forgetful),  # the base starts anew in each cycle
        ("Lookbehind(SGD), k=5", CONTESTANTS["one SGD step"].build),
        ("Lookbehind(SGD), k=5, adaptive", _variant(alpha="adaptive", alpha_scope="global")),
        ("Lookbehind(SGD), k=5, ASAM", _variant(asam=True, eta=0.0)),
        ("Lookbehind(SGD), k=5, ASAM", _variant()),
        ("SAM(SGD)", _variant(k=1, alpha=0.99)),
        ("published Lookbehind, k=5", CONTESTANTS["published Lookbehind, k=5, adaptive"].build),
    ],
)
def test_the_gate_stops_cycles_that_differ_a_little(monkeypatch, name, broken):
    _replace(monkeypatch, name, broken)
    with pytest.raises(GateError, match="toy: tensor"):
        check([CONTESTANTS[name]], TOY, Gradients(TOY, CPU), CPU)


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in SLOW])
def test_every_contestant_passes_the_gate(name):
    check([CONTESTANTS[name]], TOY, Gradients(TOY, CPU), CPU)


def test_clipping_really_clips_at_the_gate(monkeypatch):
    _replace(monkeypatch, "TAM, max_grad_norm", CONTESTANTS["TAM"].build)
    with pytest.raises(GateError, match="max_grad_norm on toy: tensor 0"):
        check([CONTESTANTS["TAM, max_grad_norm"]], TOY, Gradients(TOY, CPU), CPU)


def test_gradients_are_refreshed_in_place_and_leave_the_cosine_away_from_zero():
    gradients = Gradients(TOY, CPU)
    first, places = [g.clone() for g in gradients.live], [g.data_ptr() for g in gradients.live]
    gradients.refresh(1)
    assert [g.data_ptr() for g in gradients.live] == places
    assert torch.cosine_similarity(first[0].flatten(), gradients.live[0].flatten(), dim=0) > 0.3
    assert not torch.equal(first[0], gradients.live[0])
    gradients.refresh(2)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients.live, strict=True))


def test_gradients_change_with_the_place_they_are_evaluated_at():
    gradients, params = Gradients(TOY, CPU), initial(TOY, CPU)
    evaluate = gradients.backward(params, gradients.spare, gradients.live)
    evaluate()
    here = [p.grad for p in params]
    with torch.no_grad():
        torch._foreach_add_(params, 1.0)
    evaluate()
    assert all(p.grad is not g for p, g in zip(params, here, strict=True))
    torch.testing.assert_close([p.grad for p in params], [g + 1.0 for g in here])


# Cycles


def _cycle(name, tensors):
    gradients, params = Gradients(tensors, CPU), initial(tensors, CPU)
    attach(params, gradients.live)
    return CONTESTANTS[name].build(params, suite.LR), gradients.backward(params, gradients.live)


def test_gradients_are_made_off_the_clock_and_counted():
    now = 0.0

    def spend(seconds):
        nonlocal now
        now += seconds

    def cycle():
        for _ in range(3):
            yield
            spend(1.0)

    turn = Turn(cycle, lambda: spend(100.0), lambda: now)
    for _ in range(2):
        begin = turn.clock()
        turn()
        assert (turn.clock() - begin, turn.evaluations) == (3.0, 3)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("SGD fused", 0),
        ("one SGD step", 1),
        ("SAM(SGD)", 2),
        ("eager SAM", 2),
        ("Lookbehind(SGD), k=2", 3),
        ("Lookbehind(AdamW), k=5", 6),
        ("lean eager Lookbehind, k=5", 10),
    ],
)
def test_a_cycle_evaluates_as_often_as_its_method_says(name, evaluations):
    turn = Turn(*_cycle(name, TOY))
    turn()
    assert turn.evaluations == evaluations


class _Traffic(TorchDispatchMode):
    """Sums the bytes that torch's operations read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema, name = func._schema, func._schema.name.split("::")[1]
        if func.is_view or name.startswith("empty"):
            return out
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | (kwargs or {})
        unread = name in ("copy_", "_foreach_copy_", "zeros_like")
        for argument in schema.arguments:
            # The fused step writes gradients only where it unscales them.
            written = argument.is_write and argument.name != "grads"
            reads = 0 if name == "zeros_like" or (unread and written) else 1
            self.bytes += (reads + written) * _bytes(given.get(argument.name))
        if not any(argument.is_write for argument in schema.arguments):
            self.bytes += _bytes(out)
        return out


def _bytes(values):
    return sum(t.nbytes for t in tree_leaves(values) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    "name", [n for n in CONTESTANTS if n.startswith(("published", "lean", "eager SAM", "one SGD"))]
)
def test_eager_cycles_move_the_bytes_they_are_credited_with(name):
    large = TensorList("large", ((300, 1000),))
    cycle, evaluate = _cycle(name, large)
    for _ in cycle():  # momentum begins
        evaluate()
    traffic, phases = _Traffic(), cycle()
    while True:
        with traffic:
            if next(phases, "end") == "end":
                break
        evaluate()
    assert round(traffic.bytes / large.numel) == CONTESTANTS[name].bytes_per_element


def test_whole_cycles_of_a_network_count_their_gradients():
    published, ours, gradients = network.network_figures(PLACE)
    assert (published.evaluations, ours.evaluations) == (10, 6)
    assert (published.value, ours.against, ours.limit) == (1.0, published.what, 0.65)
    assert 0 < ours.value < 10  # a ratio, not a claim
    assert (gradients.value, gradients.limit, gradients.passed) == (6, 6, True)


def test_a_network_trained_otherwise_stops_the_report(monkeypatch):
    def build(params, backward):
        optimizer = torsion.Lookbehind(network._sgd(params), k=5, alpha=0.505)
        return lambda: optimizer.step(backward)

    monkeypatch.setattr(network, "_ours", build)
    with pytest.raises(GateError, match="whole cycle, k=5 on the digits network"):
        list(network.network_figures(PLACE))


# What is asked


def test_lists_are_the_models_they_are_named_after():
    found = {name: (len(made.shapes), made.numel) for name, made in LISTS.items()}
    assert found["resnet18"] == (62, 11_181_642)
    assert found["gpt2"] == (148, 124_439_808)
    assert found["tiny"] == (1000, 1_024_000)
    assert found["one"] == (1, 50_000_000)


def test_comparisons_name_contestants_and_lists_that_exist():
    for comparison in COMPARISONS:
        assert comparison.method in METHODS
        assert {*comparison.baselines, *comparison.contestants} <= CONTESTANTS.keys()
        assert comparison.limits.keys() <= set(comparison.contestants)
        assert {
            name for limits in comparison.limits.values() for limit in limits for name in limit.lists
        } <= LISTS.keys()


def test_limits_hold_where_they_were_set():
    tam = next(c for c in COMPARISONS if "TAM, scope tensor" in c.contestants)
    assert tam.limit("TAM", "tiny", 1, "cpu").value == 0.65
    assert tam.limit("TAM", "tiny", 2, "cpu").value == 0.45
    assert tam.limit("TAM", "tiny", 4, "cpu") is None
    assert tam.limit("TAM", "gpt2", 4, "cpu").value == 1.5
    assert tam.limit("TAM", "gpt2", 1, "cuda") is None
    sam = next(c for c in COMPARISONS if "SAM(SGD)" in c.contestants)
    assert [sam.limit("SAM(SGD)", name, 2, "cpu").value for name in ("resnet18", "gpt2")] == [2.5, 2.7]
    gpu = Comparison("tam", (), (), {"TAM": (Limit(0.85, ("gpt2",)),)}, device="cuda")
    assert gpu.limit("TAM", "gpt2", 1, "cuda").value == 0.85


@pytest.mark.parametrize(
    ("value", "limit", "passed"),
    [(1.2, Limit(1.5, ()), True), (1.6, Limit(1.5, ()), False), (1.6, Limit(1.5, (), at_least=True), True)],
)
def test_a_verdict_goes_by_value_and_direction(value, limit, passed):
    assert Figure.at(PLACE, "TAM", "toy", "x", limit, value=value).passed is passed
    assert Figure.at(PLACE, "TAM", "toy", "x", limit).passed is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tam", "lookbehind"])
def test_memory_is_measured_in_processes_of_their_own(method):
    peak, held = overhead.memory_figures(TensorList("toy", ((1000, 300), (1000,))), [method], PLACE)
    assert peak.limit == 2**20 + 64 * (19 + 1)
    assert abs(held.value) <= 2**21  # a size, not a claim: twice the resolution of resident memory in a small process
    assert peak.value >= held.value - 2**16


def test_import_time_is_measured_in_processes_of_their_own():
    figure = overhead.import_figure(PLACE)
    assert (figure.unit, figure.limit, figure.rounds) == ("s", 0.5, 1)
    assert -5 < figure.value < 60
