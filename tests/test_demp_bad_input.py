"""Bad input to DemP: the message names what came and what to do, and nothing changes, not even random state."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from demp_runs import INPUTS, adamw, advance, demp_of, everything, inputs, kill, mlp, same, unchanged, windows
from torch import nn

import torsion

INF, NAN = math.inf, math.nan

# Constructor arguments: name, value, error, what the message must say besides name and value
ARGUMENTS = [
    ("total_steps", 0, ValueError, "from 1"),
    ("total_steps", -1, ValueError, "from 1"),
    ("total_steps", 2**32, ValueError, "to 4294967295"),
    ("total_steps", 10.0, TypeError, "integer"),
    ("total_steps", None, TypeError, "integer"),
    ("total_steps", True, TypeError, "integer"),
    ("lasso", -1e-3, ValueError, ">= 0"),
    ("lasso", NAN, ValueError, "finite"),
    ("lasso", INF, ValueError, "finite"),
    ("lasso", "0.01", TypeError, "number"),
    ("noise_std", -5e-5, ValueError, ">= 0"),
    ("noise_std", NAN, ValueError, "finite"),
    ("noise_std", None, TypeError, "number"),
    ("schedule", "cosine", ValueError, "'one_cycle', 'constant'"),
    ("schedule", None, TypeError, "'one_cycle'"),
    ("noise_mask", "rows", ValueError, "'row', 'grad', 'none'"),
    ("noise_mask", None, TypeError, "'none'"),
    ("prune_every", 0, ValueError, ">= 1"),
    ("prune_every", 2.5, TypeError, "integer"),
    ("prune_after", -1, ValueError, ">= 0"),
    ("prune_after", None, TypeError, "integer"),
    ("window", 0, ValueError, ">= 1"),
    ("window", "4", TypeError, "batches"),
    ("criterion", "never", ValueError, "'ever_active'"),
    ("criterion", None, TypeError, "'auto'"),
    ("criterion", "saturation", ValueError, "live_units()"),
    ("tau", -0.1, ValueError, ">= 0"),
    ("tau", NAN, ValueError, "finite"),
    ("min_live", 0, ValueError, ">= 1"),
    ("min_live", False, TypeError, "integer"),
    ("align", 0, ValueError, ">= 1"),
    ("align", 8.0, TypeError, "integer"),
    ("patience", 0, ValueError, ">= 1"),
    ("patience", None, TypeError, "windows"),
    ("seed", -1, ValueError, "from 0"),
    ("seed", 2**64, ValueError, "to 18446744073709551615"),
    ("seed", 1.0, TypeError, "integer"),
]


def named(argument):
    return f"{argument[0]}={argument[1]!r}"


@pytest.mark.parametrize("argument", ARGUMENTS, ids=named)
def test_arguments(argument):
    name, value, error, says = argument
    model = mlp()
    optimizer = adamw(model)
    advance(model, optimizer, range(1))
    with pytest.raises(error, match=re.escape(f"{name}={value!r}")) as found:
        unchanged(model, optimizer, lambda: demp_of(model, optimizer, **{name: value}))
    assert says in str(found.value)


def test_model_and_optimizer_of_another_kind():
    model = mlp()
    for given in ([model], model.forward, None, mlp):
        with pytest.raises(TypeError, match=r"model is .*torch.nn.Module"):
            torsion.DemP(given, adamw(model), inputs(), total_steps=5)
    for given in (torch.optim.SGD, None, list(model.parameters())):
        with pytest.raises(TypeError, match=r"optimizer is .*no torch.optim.Optimizer"):
            torsion.DemP(model, given, inputs(), total_steps=5)


def test_an_optimizer_of_another_model():
    model = mlp()
    other = adamw(mlp(seed=1))
    with pytest.raises(ValueError, match=r"0\.weight and 9 more: not in .*\(AdamW\).*model\.parameters\(\)"):
        unchanged(model, other, lambda: demp_of(model, other))


def test_an_optimizer_of_a_part_of_the_model():
    model = mlp()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "3.bias"], lr=0.1)
    with pytest.raises(ValueError, match=r"3\.bias: not in the optimizer \(SGD\).*requires_grad_"):
        unchanged(model, optimizer, lambda: demp_of(model, optimizer))
    model[3].bias.requires_grad_(False)
    demp_of(model, optimizer)


class OtherSAM(torch.optim.SGD):
    def first_step(self): ...

    def second_step(self): ...


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda ps: torsion.Lookbehind(torch.optim.SGD(ps, lr=0.1)), "Lookbehind"),
        (lambda ps: torsion.SAM(torch.optim.SGD(ps, lr=0.1)), "SAM"),
        (lambda ps: OtherSAM(ps, lr=0.1), "OtherSAM"),
    ],
    ids=["Lookbehind", "SAM", "OtherSAM"],
)
def test_sharpness_aware_optimizers(build, name):
    model = mlp()
    optimizer = build(model.parameters())
    with pytest.raises(TypeError, match=rf"optimizer is {name}.*lasso.*SGD"):
        demp_of(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "example", [torch.ones(4, 7), torch.zeros(4, 7, 2), (), "text"], ids=["width", "dims", "()", "text"]
)
def test_example_inputs_that_do_not_run(example):
    model = mlp()
    optimizer = adamw(model)
    advance(model, optimizer, range(1))
    with pytest.raises((ValueError, RuntimeError, TypeError), match=r"example"):
        unchanged(model, optimizer, lambda: torsion.DemP(model, optimizer, example, total_steps=5))


@pytest.mark.parametrize(
    ("exclude", "error", "says"),
    [
        (("00",), ValueError, r"no module '00'.*did you mean '0'"),
        (("0.weight",), ValueError, r"no module '0\.weight'"),
        (("encoder.fc",), ValueError, r"no module 'encoder\.fc'; there are '0'"),
        (("0", "nothing"), ValueError, r"no module 'nothing'"),
        ("0", TypeError, r"exclude='0'.*sequence"),
        (3, TypeError, r"exclude=3.*sequence"),
        ((0,), TypeError, r"0 is no module name"),
    ],
)
def test_excluded_modules_that_do_not_exist(exclude, error, says):
    model = mlp()
    optimizer = adamw(model)
    with pytest.raises(error, match=says):
        unchanged(model, optimizer, lambda: demp_of(model, optimizer, exclude=exclude))


def test_modules_to_cut_alike():
    model = mlp()
    optimizer = adamw(model)
    for also, error, says in [
        ((mlp(widths=(8, 5)),), ValueError, r"also\[0\]: 3\.weight has shape \(5, 8\) there and \(6, 8\)"),
        ((copy.deepcopy(model), nn.Linear(3, 3)), ValueError, r"also\[1\]: 0\.weight has shape none there"),
        ((model,), ValueError, r"also\[0\] is the model itself"),
        ((model.state_dict(),), TypeError, r"also\[0\] is .*[dD]ict"),
        ("ema", TypeError, r"also='ema'"),
        (7, TypeError, r"also=7"),
    ]:
        with pytest.raises(error, match=says):
            unchanged(model, optimizer, lambda also=also: demp_of(model, optimizer, also=also))


def test_layers_that_cannot_be_cut_are_named_and_may_be_excluded():
    """A LayerNorm before the activation: dead rows shape its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    model = model.double()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"^0: layer_norm in '1'.*exclude=\('0',\)"):
        unchanged(model, optimizer, lambda: demp_of(model, optimizer))
    assert demp_of(model, optimizer, exclude=("0",)).live().keys() == {"3"}


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet.*call the model once"):
        torsion.DemP(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs(), total_steps=5)


# Windows


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["step", "finish", "observe"])
def test_an_activation_that_is_not_finite(method, value):
    """No cut, an error that names the layer, and a window due stays due."""
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    kill(model, 0, 1)
    advance(model, optimizer, range(4))
    with torch.no_grad():
        model[3].bias[2] = value
    live = demp.live()
    with pytest.raises(RuntimeError, match=r"\b3\b"):
        unchanged(model[:3], optimizer, lambda: getattr(demp, method)(windows()))
    assert same(demp.live(), live)
    assert demp.due
    assert demp.generation == 0
    with torch.no_grad():
        model[3].bias[2] = 0.0
    assert demp.step(windows()).layers["0"].cut == 1


@pytest.mark.parametrize(
    "batches",
    [5, None, "text", inputs(), {"x": inputs()}, lambda: 5, lambda: inputs()],
    ids=["number", "None", "text", "tensor", "dict", "function", "function of a tensor"],
)
def test_batches_of_another_kind(batches):
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    advance(model, optimizer, range(4))
    with pytest.raises(TypeError, match=r"batches.*iterable of model inputs"):
        unchanged(model, optimizer, lambda: demp.step(batches))
    assert demp.due


def test_batches_the_model_does_not_run_on():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    kill(model, 0, 1)
    advance(model, optimizer, range(4))
    live, narrow = demp.live(), inputs()[:, :3]
    with pytest.raises(RuntimeError, match=r"batch 1 of the window.*\(16, 3\)"):
        unchanged(model, optimizer, lambda: demp.step([inputs(), narrow]))
    assert same(demp.live(), live)
    assert demp.due


def test_an_iterable_that_raises():
    def batches():
        yield inputs()
        raise OSError("the disk is gone")

    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    advance(model, optimizer, range(4))
    with pytest.raises(OSError, match="the disk is gone"):
        unchanged(model, optimizer, lambda: demp.step(batches()))


# Wrapping


def test_rewrap_of_what_is_no_ddp():
    model = mlp()
    demp = demp_of(model, adamw(model))
    with pytest.raises(TypeError, match=r"ddp is Sequential.*DistributedDataParallel"):
        demp.rewrap(model)


def test_sharded_models_are_refused_by_name():
    class FSDPModule(nn.Sequential):
        """Stands for what fully_shard makes of a module; test_demp_distributed.py has the real one."""

    model = nn.Sequential(FSDPModule(*mlp()))
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"^0 is sharded by FSDP.*DistributedDataParallel"):
        unchanged(model, optimizer, lambda: demp_of(model, optimizer))
    everything(model)
