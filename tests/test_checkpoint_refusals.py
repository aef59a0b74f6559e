"""Checkpoints that cannot be continued are refused by name, and everything stays bit for bit as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import (
    ADAM,
    ADAMW,
    ADATAM,
    ADATAMW,
    SGD,
    TAM,
    gradients,
    parameters,
    refused,
    running,
    through_a_file,
)
from helpers import ids, take_steps


@pytest.mark.parametrize(
    ("source", "target", "setting"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), TAM, "nesterov=True"),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1), TAM, "dampening=0.1"),
        (lambda p: ADAM(p, amsgrad=True), ADATAM, "amsgrad=True"),
        (lambda p: ADAMW(p, amsgrad=True), ADATAMW, "amsgrad=True"),
    ],
    ids=["nesterov", "dampening", "amsgrad-adam", "amsgrad-adamw"],
)
def test_methods_that_cannot_go_on_are_refused_by_name(source, target, setting):
    there = source(parameters())
    take_steps(there, gradients(2))
    refused(running(target), through_a_file(there.state_dict()), ValueError, target.__name__, setting, "group 0")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("source", "target"), [(ADAM, TAM), (ADATAM, TAM), (SGD, ADATAM), (TAM, ADATAMW)], ids=ids)
def test_another_family_is_refused(source, target, steps):
    there = source(parameters(), lr=0.1)
    take_steps(there, gradients(steps))
    refused(running(target), there.state_dict(), ValueError, target.__name__, "same family")


def _without(*path):
    def damage(c):
        for key in path[:-1]:
            c = c[key]
        del c[path[-1]]

    return damage


def _with(value, *path):
    def damage(c):
        for key in path[:-1]:
            c = c[key]
        c[path[-1]] = value

    return damage


def _extra_group(c):
    c["param_groups"].append(copy.deepcopy(c["param_groups"][0]))


DAMAGES = {
    "no-state": (_without("state"), ["'state' and 'param_groups'", "'param_groups'"]),
    "no-groups": (_without("param_groups"), ["'state' and 'param_groups'"]),
    "groups-no-list": (_with({}, "param_groups"), ["param_groups is no list"]),
    "group-no-dict": (_with([3], "param_groups"), ["param_groups is no list"]),
    "group-without-params": (_without("param_groups", 0, "params"), ["param_groups is no list"]),
    "params-no-list": (_with(3, "param_groups", 0, "params"), ["param_groups is no list"]),
    "group-count": (_extra_group, ["2 parameter groups", "this optimizer 1"]),
    "parameter-count": (
        _with([0, 1], "param_groups", 0, "params"),
        ["group 0", "2 parameters in the checkpoint, 3 here"],
    ),
    "twice-the-same": (_with([0, 1, 1], "param_groups", 0, "params"), ["twice", "[0, 1, 1]"]),
    "names": (_with(["a"], "param_groups", 0, "param_names"), ["group 0", "1 param_names for 3 parameters"]),
    "bad-option": (_with(-1.0, "param_groups", 0, "lr"), ["lr=-1.0", ">= 0"]),
    "bad-scope": (_with("planet", "param_groups", 0, "scope"), ["scope='planet'"]),
    "state-no-dict": (_with([1.0], "state", 1), ["layer.1", "list"]),
    "all-state-no-dict": (_with([], "state"), ["'state' is no dictionary but list"]),
    "missing-key": (_without("state", 1, "exp_avg"), ["layer.1", "exp_avg", "same family"]),
    "both-keys-missing": (_with({"step": torch.tensor(1.0)}, "state", 1), ["layer.1", "exp_avg"]),
    "half-none": (_with(None, "state", 1, "exp_avg_sq"), ["layer.1", "exp_avg_sq"]),
    "no-tensor": (_with(3.0, "state", 1, "exp_avg"), ["layer.1", "exp_avg"]),
    "wrong-shape": (_with(torch.zeros(4), "state", 1, "exp_avg"), ["layer.1", "exp_avg has shape (4,)", "(5,)"]),
    "same-size-other-shape": (_with(torch.zeros(3, 4), "state", 0, "exp_avg_sq"), ["layer.0", "(3, 4)", "(4, 3)"]),
    "last-one-wrong": (_with(torch.zeros(1), "state", 2, "exp_avg"), ["layer.2", "(1,)", "()"]),
    "integers": (_with(torch.zeros(5, dtype=torch.int64), "state", 1, "exp_avg"), ["layer.1", "int64"]),
    "complex": (_with(torch.zeros(5, dtype=torch.complex64), "state", 1, "exp_avg"), ["layer.1", "complex"]),
    "step-of-two": (_with(torch.zeros(2), "state", 1, "step"), ["layer.1", "step is not one number"]),
    "step-word": (_with("three", "state", 1, "step"), ["layer.1", "step is not one number"]),
    "correlation-of-two": (
        _with(torch.zeros(2), "state", 0, "correlation"),
        ["layer.0", "correlation is not one number"],
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("cls", [ADATAM, ADATAMW], ids=ids)
def test_a_damaged_checkpoint_is_refused(cls, damage, words):
    source = running(cls)
    take_steps(source, gradients(3, seed=7))  # a state that differs from the target's
    checkpoint = copy.deepcopy(source.state_dict())
    damage(checkpoint)
    refused(running(cls), checkpoint, ValueError, *words)


@pytest.mark.parametrize("checkpoint", [None, 3, [], {}, "path/to/file"], ids=repr)
def test_what_is_no_checkpoint(checkpoint):
    refused(running(TAM), checkpoint, (ValueError, TypeError), "TAM", "state_dict()")


def test_groups_that_would_disagree():
    first, second = parameters()[:2], parameters()[2:]
    optimizer = TAM([{"params": first}, {"params": second}])
    take_steps(optimizer, gradients(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][1]["max_grad_norm"] = 1.0
    refused(optimizer, checkpoint, ValueError, "group 1", "max_grad_norm=1.0")
