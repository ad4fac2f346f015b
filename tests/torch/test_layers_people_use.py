"""What every kind of layer gets: for each, a small model, what the report says of all of its parameters, and a step."""

from dataclasses import dataclass, field

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional
C = 4


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Run(nn.Module):
    """Modules by name and a way through them."""

    def __init__(self, way, **modules):
        super().__init__()
        self.way = way
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *batch):
        return self.way(self, *batch)


@dataclass
class Case:
    """How to build a model, its batch, and the reason of each of its parameters; those in ``fall`` have no layer, or do not move."""

    model: object
    batch: tuple
    reasons: dict
    fall: tuple = ()
    still: tuple = field(default=())


def only(module, shape, **reasons):
    """A module alone, whose parameters all have one reason, unless told otherwise."""
    return Case(lambda: Run(lambda net, x: net.m(x), m=module()), (randn(*shape),), {f"m.{k}": v for k, v in reasons.items()})


def both(reason):
    return {"weight": reason, "bias": reason}


def falls(module, batch, reason, names=("weight", "bias"), way=lambda net, *x: net.m(*x)):
    return Case(lambda: Run(way, m=module()), batch, {f"m.{name}": reason for name in names}, tuple(f"m.{name}" for name in names))


def twice(net, x):
    return net.m(torch.tanh(net.m(x)))


def tied():
    first, last = nn.Linear(C, C), nn.Linear(C, C)
    last.weight, last.bias = first.weight, first.bias
    return Run(lambda net, x: net.last(torch.tanh(net.m(x))), m=first, last=last)


def attention():
    return Run(lambda net, x: net.m(x, x, x)[0], m=nn.MultiheadAttention(C, 2, batch_first=True))


RNN = "is one fused operation, in which the uses of its weights over time are not seen: a loop over nn.Linear has blocks"
CELL = "is one fused operation, in which the uses of its weights are not seen: two nn.Linear in its place have blocks"
COUPLED = "of the batch, through which each example's loss depends on all the others: there are no gradients of single examples"
OVER_TIME = [f"{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")]
IN_CELL = [name.removesuffix("_l0") for name in OVER_TIME]
ROWS = {f"{p}_proj": f"Linear in rows {C * i}:{C * i + C} of m.in_proj_weight" for i, p in enumerate("qkv")}

CASES = {
    "linear": only(lambda: nn.Linear(C, 3), (5, C), **both("Linear")),
    "linear on sequences": only(lambda: nn.Linear(C, 3), (5, 6, C), **both("Linear")),
    "linear on images": only(lambda: nn.Linear(C, 3), (5, 6, 2, C), **both("Linear")),
    "conv1d": only(lambda: nn.Conv1d(C, 3, 3, padding=1), (2, C, 6), **both("Conv")),
    "conv2d": only(lambda: nn.Conv2d(C, 3, 3, stride=2), (2, C, 6, 5), **both("Conv")),
    "conv3d": only(lambda: nn.Conv3d(C, 3, 2), (2, C, 3, 3, 2), **both("Conv")),
    "conv dilation": only(lambda: nn.Conv2d(C, 3, 2, dilation=2), (2, C, 6, 5), **both("Conv")),
    "conv groups": only(lambda: nn.Conv2d(C, C, 3, groups=2), (2, C, 6, 5), **both("Conv")),
    "conv depthwise": only(lambda: nn.Conv2d(C, C, 3, groups=C, bias=False), (2, C, 6, 5), weight="Conv"),
    "transposed conv": only(lambda: nn.ConvTranspose2d(C, 3, 3, stride=2), (2, C, 3, 3), **both("Conv")),
    "embedding": Case(
        lambda: Run(lambda net, x: net.m(x), m=nn.Embedding(7, C)), (torch.arange(6).reshape(2, 3),), {"m.weight": "Embedding"}
    ),
    "attention as framework module": Case(
        attention,
        (randn(2, 5, C),),
        {f"m.{name}.weight": reason for name, reason in ROWS.items()}
        | {f"m.{name}.bias": "Linear" for name in ROWS}
        | {"m.out_proj.weight": "Linear", "m.out_proj.bias": "Linear"},
    ),
    "layer norm": only(lambda: nn.LayerNorm(C), (5, 3, C), **both("Norm (diagonal)")),
    "rms norm": only(lambda: nn.RMSNorm(C), (5, 3, C), weight="Norm (diagonal)"),
    "group norm": only(lambda: nn.GroupNorm(2, C), (5, C, 3, 3), **both("Norm (diagonal)")),
    "instance norm": only(lambda: nn.InstanceNorm2d(C, affine=True), (5, C, 3, 3), **both("Norm (diagonal)")),
    "batch norm, fixed": only(lambda: nn.BatchNorm2d(C).eval(), (5, C, 3, 3), **both("Norm (diagonal)")),
    "batch norm, training": Case(
        lambda: Run(lambda net, x: net.m(x), m=nn.BatchNorm2d(C)),
        (randn(5, C, 3, 3),),
        {
            "m.weight": f"BatchNorm2d in training mode takes statistics {COUPLED}",
            "m.bias": f"bias of a BatchNorm2d without a layer: BatchNorm2d in training mode takes statistics {COUPLED}",
        },
        ("m.weight", "m.bias"),
    ),
    "rnn": falls(lambda: nn.RNN(C, 3), (randn(5, 2, C),), f"RNN {RNN}", OVER_TIME, lambda net, x: net.m(x)[0]),
    "lstm": falls(lambda: nn.LSTM(C, 3), (randn(5, 2, C),), f"LSTM {RNN}", OVER_TIME, lambda net, x: net.m(x)[0]),
    "gru": falls(lambda: nn.GRU(C, 3), (randn(5, 2, C),), f"GRU {RNN}", OVER_TIME, lambda net, x: net.m(x)[0]),
    "lstm cell": falls(lambda: nn.LSTMCell(C, C), (randn(5, C),), f"LSTMCell {CELL}", IN_CELL, lambda net, x: net.m(x, net.m(x))[0]),
    "layer called twice": Case(lambda: Run(twice, m=nn.Linear(C, C)), (randn(5, C),), {"m.weight": "Linear", "m.bias": "Linear"}),
    "layers tied": Case(tied, (randn(5, C),), {"m.weight": "Linear", "m.bias": "Linear"}),
    "layer never called in a step": Case(
        lambda: Run(lambda net, x: net.m(x), m=nn.Linear(C, C), rest=nn.Linear(C, C)),
        (randn(5, C),),
        {f"{layer}.{role}": "Linear" for layer in ("m", "rest") for role in ("weight", "bias")},
        still=("rest.weight", "rest.bias"),
    ),
    "bilinear": Case(
        lambda: Run(lambda net, x: net.m(x, x), m=nn.Bilinear(C, C, 3)),
        (randn(5, C),),
        {
            "m.weight": "Bilinear multiplies two inputs with each other, and its weight is no matrix",
            "m.bias": "bias of a Bilinear without a layer: Bilinear multiplies two inputs with each other, and its weight is no matrix",
        },
        ("m.weight", "m.bias"),
    ),
    "embedding bag": falls(
        lambda: nn.EmbeddingBag(7, C),
        (torch.arange(6).reshape(2, 3),),
        "EmbeddingBag adds rows of its table in one operation, in which the single ones are not seen",
        ("weight",),
    ),
    "prelu": falls(lambda: nn.PReLU(C), (randn(5, C),), "PReLU is an activation, whose slopes no layer describes", ("weight",)),
    "bare parameter": Case(
        lambda: Run(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(C))),
        (randn(5, C),),
        {"scale": "a bare parameter"},
        ("scale",),
    ),
    "module of the user": Case(
        lambda: Run(lambda net, x: x * net.m.gain, m=Run(None, gain=nn.Parameter(torch.ones(C)))),
        (randn(5, C),),
        {"m.gain": "Run m.gain is not a supported layer"},
        ("m.gain",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_layer_gets_and_a_step(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.01)
    report = optimizer.report()
    assert {row.parameter: row.reason for row in report} == case.reasons
    assert {row.parameter: row.kind for row in report} == {
        parameter: "diagonal" if parameter in case.fall else "kfac" for parameter in case.reasons
    }
    before = {parameter: p.detach().clone() for parameter, p in model.named_parameters()}
    loss = model(*case.batch).sin().square().mean()
    loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert {parameter for parameter in after if torch.equal(after[parameter], before[parameter])} == set(case.still)
    assert all(p.isfinite().all() for p in after.values())
    assert model(*case.batch).sin().square().mean() < loss
    kept = {parameter.rpartition(".")[0]: 1 for parameter in case.still}
    told = optimizer.diagnostics()
    assert told.pop("kept_refreshes") == kept
    assert told == {"steps": 1, "skipped_steps": 0, "dropped_statistics": {}, "jittered_factors": {}, "widened_factors": {}}
    assert {row.parameter: row.reason for row in optimizer.report()} == case.reasons
