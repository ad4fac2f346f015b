"""A wrong call names the parameter in backticks, what came and what is allowed, and changes nothing."""

import copy

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "name", "came"),
    [
        (lambda v: kf.KFAC(damping=v), "damping", [0, -1.0, NAN, INF, "x", None, True]),
        (lambda v: kf.Damping(v), "damping", [0.0, -1e-3, NAN, -INF]),
        (lambda v: kf.Damping(1.0, kind=v), "kind", ["tikhonov", None, 3]),
        (lambda v: kf.Damping(1.0, norm=v), "norm", ["nuclear", None]),
        (lambda v: kf.KFAC(fisher=v), "fisher", ["type-2", None]),
        (lambda v: kf.KFAC(stats_every=v), "stats_every", [0, -3, 1.5, True, None]),
        (lambda v: kf.KFAC(refresh_every=v), "refresh_every", [0, -3, 1.5, True, "10"]),
        (lambda v: kf.KFAC(mc_samples=v), "mc_samples", [0, 1.0, lambda step: 3]),
        (lambda v: kf.KFAC(stats_decay=v), "stats_decay", [0.0, 1.01, -0.5, NAN, None]),
        (lambda v: kf.Diagonal(power=v), "power", [-1.0, NAN]),
        (lambda v: kf.StepSize(learning_rate=v), "learning_rate", [-0.1, NAN, INF, "fast"]),
        (lambda v: kf.StepSize(momentum=v), "momentum", [-0.1, 1.0, NAN]),
        (lambda v: kf.StepSize(weight_decay=v), "weight_decay", [-0.1, NAN]),
        (lambda v: kf.StepSize(clip=v), "clip", [0.0, -1.0, NAN]),
        (lambda v: kf.StepSize(decay=v), "decay", ["l2", None]),
        (lambda v: kf.StepSize(nesterov=True, momentum=v), "momentum", [0]),
        (lambda v: kf.Linear(v, 2), "in_features", [0, -1, 2.0, True, None]),
        (lambda v: kf.Linear(2, v), "out_features", [0, -1, 2.0]),
        (lambda v: kf.Linear(2, 2, v), "bias", ["yes", 3]),
        (lambda v: kf.Linear(2, 2, sharing=v), "sharing", ["sum", None]),
        (lambda v: kf.Linear(2, 2, layout=v), "layout", ["hwio", None]),
        (lambda v: kf.Optimizer(kf.KFAC(), {"fc": kf.Linear(2, 2)}, loss_reduction=v), "loss_reduction", ["none", None]),
        (lambda v: kf.Optimizer(v, {"fc": kf.Linear(2, 2)}), "method", ["kfac", kf.KFAC, None]),
        (lambda v: kf.Optimizer(kf.KFAC(), {"fc": kf.Linear(2, 2)}, fallback=v), "fallback", ["sgd", 3]),
        (lambda v: kf.Optimizer(kf.KFAC(), {"fc": v}), "layers", [3, kf.Linear]),
        (lambda v: kf.CrossEntropy(axis=v), "axis", [0, 2.5, "last"]),
        (lambda v: kf.register_kernel(v, "numpy", abs), "name", ["nothing"]),
    ],
)
def test_a_setting_out_of_range_is_refused(make, name, came):
    for value in came:
        with pytest.raises((ValueError, TypeError), match=f"`{name}`") as caught:
            make(value)
        assert callable(value) or repr(value) in str(caught.value), caught.value


def test_what_is_allowed_is_told():
    with pytest.raises(ValueError, match="exact, factored, plain"):
        kf.Damping(1.0, kind="none")
    with pytest.raises(ValueError, match="mean, trace, frobenius, spectral, median"):
        kf.Damping(1.0, norm="none")
    with pytest.raises(ValueError, match="empirical, mc, exact, forward"):
        kf.KFAC(fisher="none")


def snapshot(tree):
    return copy.deepcopy(tree)


def wrong_steps():
    """Name, what is wrong with (params, grads, records, keywords), pattern of the message."""

    def put(tree, path, value):
        tree = snapshot(tree)
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return tree

    def record(change):
        return lambda p, g, r, k: (p, g, r | {"fc1": change(*r["fc1"])}, k)

    return [
        ("unknown layer", lambda p, g, r, k: (p, g, r | {"fc9": r["fc1"]}, k), "`records`.*'fc9'.*fc1, fc2"),
        ("missing layer", lambda p, g, r, k: (p, g, {"fc1": r["fc1"]}, k), "`records`.*fc2"),
        ("no records", lambda p, g, r, k: (p, g, None, k), "`statistics`|`records`"),
        ("record not a pair", record(lambda x, z: x), "`records`.*pairs.*ndarray"),
        ("record a list of two arrays", record(lambda x, z: [x, z]), "`records`"),
        ("record of four", record(lambda x, z: [(x, z, None, z)]), "`records`.*a tuple of 4"),
        ("mask of numbers", record(lambda x, z: (x, z, np.ones(8))), "'fc1'.*`mask`.*boolean.*float64"),
        ("mask of other positions", record(lambda x, z: (x, z, np.ones((8, 2), bool))), r"'fc1'.*`mask`.*\(8,\).*`inputs`.*\(8, 2\)"),
        ("mask of other examples", record(lambda x, z: [(x, z), (x, z, np.ones(7, bool))]), r"'fc1'.*`mask`.*\(8,\).*\(7,\)"),
        ("masks of different examples", record(lambda x, z: (x, z, np.arange(8) < 5)), "`terms`.*fc1.*5.*fc2.*8"),
        ("input width", record(lambda x, z: (x[:, 1:], z)), r"'fc1'.*`inputs`.*\[N, ..., 4\].*\(8, 3\)"),
        ("output width", record(lambda x, z: (x, z[:, 1:])), r"'fc1'.*`output_grads`.*\[N, ..., 5\].*\(8, 4\)"),
        ("numbers of examples", record(lambda x, z: (x, z[1:])), "'fc1'.*`inputs` and `output_grads`.*8.*7"),
        ("records of integers", record(lambda x, z: (np.ones(x.shape, int), z)), "'fc1'.*`inputs`.*int64"),
        ("records of complex numbers", record(lambda x, z: (x, z + 0j)), "'fc1'.*`output_grads`.*complex128"),
        ("no output gradients", record(lambda x, z: (x, None)), "'fc1'.*`output_grads`"),
        ("different batches", record(lambda x, z: (x[:4], z[:4])), "`terms`.*fc1.*4.*fc2.*8"),
        ("no gradients", lambda p, g, r, k: (p, {}, r, k), "`grads`"),
        ("unknown gradient", lambda p, g, r, k: (p, put(g, ["more"], np.ones(2)), r, k), "`grads`.*more"),
        ("gradient shape", lambda p, g, r, k: (p, put(g, ["fc1", "bias"], np.ones(2)), r, k), r"`grads`.*\(5,\).*fc1.bias.*\(2,\)"),
        ("gradient dtype", lambda p, g, r, k: (p, put(g, ["fc1", "bias"], np.ones(5, int)), r, k), "`grads`.*int64.*fc1.bias"),
        ("half a layer", lambda p, g, r, k: (p, put(g, ["fc1", "bias"], None), r, k), "`grads`.*fc1.bias"),
        (
            "missing parameter",
            lambda p, g, r, k: (put(p, ["fc1", "bias"], None), put(g, ["fc1", "bias"], None), r, k),
            "`params`.*fc1.bias",
        ),
        ("unknown override", lambda p, g, r, k: (p, g, r, k | {"overrides": {"learning_rte": 1.0}}), "`overrides`.*learning_rte"),
        ("damping of no block", lambda p, g, r, k: (p, g, r, k | {"overrides": {"damping": {"fc9": 1.0}}}), "`damping`.*fc9"),
        ("negative damping", lambda p, g, r, k: (p, g, r, k | {"overrides": {"damping": -1.0}}), "`damping`.*-1.0"),
        ("damping not a number", lambda p, g, r, k: (p, g, r, k | {"overrides": {"damping": NAN}}), "`damping`.*nan"),
        (
            "rates of some",
            lambda p, g, r, k: (p, g, r, k | {"overrides": {"learning_rate": {"fc1.weight": 1.0}}}),
            "`learning_rate`.*fc1.bias",
        ),
        ("negative terms", lambda p, g, r, k: (p, g, r, k | {"terms": -3}), "`terms`.*-3"),
    ]


@pytest.mark.parametrize(("name", "wrong", "pattern"), wrong_steps(), ids=[w[0] for w in wrong_steps()])
def test_a_wrong_step_is_refused_and_changes_nothing(rng, model, name, wrong, pattern):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    state = optimizer.init(params)
    grads, records = model.gradients(params, *model.batch(rng))
    before = snapshot((params, state))
    p, g, r, k = wrong(params, grads, records, {})
    with pytest.raises((ValueError, TypeError), match=f"(?s){pattern}"):
        optimizer.step(p, g, r, state, **k)
    assert model.same((params, state), before)
    after, _ = optimizer.step(params, grads, records, state)
    assert not model.same(after, params)


def test_parameters_must_fit_the_layers(rng, model):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    with pytest.raises(ValueError, match=r"`params`.*fc1.weight.*\(5, 4\).*\(4, 5\)"):
        optimizer.init(params | {"fc1": {"weight": params["fc1"]["weight"].T, "bias": params["fc1"]["bias"]}})
    with pytest.raises(ValueError, match=r"`params`.*fc2.weight.*nothing"):
        optimizer.init({"fc1": params["fc1"]})
    with pytest.raises(TypeError, match=r"`params`.*int64.*scale"):
        optimizer.init(params | {"scale": np.ones(5, int)})


def test_the_verbs_name_what_is_wrong(rng, captures):
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    x, g = captures(rng)
    state = method.init(layer, x)
    with pytest.raises(ValueError, match=r"`inputs`.*\[..., N, S, features\].*\(6, 3\)"):
        method.reduce(layer, state, x[:, 0], g)
    with pytest.raises(TypeError, match=r"`output_grads`.*int64"):
        method.reduce(layer, state, x, np.ones((6, 1, 2), int))
    with pytest.raises(ValueError, match=r"`grad`.*2, 4.*\(2, 3\)"):
        method.precondition(layer, state, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`damping`.*changes with the steps"):
        kf.KFAC(damping=lambda step: 0.1).refresh(layer, state)
    with pytest.raises(ValueError, match=r"`decay`.*`stats_decay`"):
        kf.KFAC(stats_decay=lambda step: 0.1).observe(state, method.reduce(layer, state, x, g))


def test_refreshing_before_any_statistics_is_refused_or_counted(rng, model):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    bound = optimizer.bind(params)
    with pytest.raises(ValueError, match=r"`state`.*`reduce` and `observe`"):
        bound.preconditioner.refresh(optimizer.init(params).curvature)
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    assert int(method.refresh(layer, method.init(layer, np.zeros(()))).kept) == 1


def test_statistics_of_an_unknown_block_are_refused(rng, model):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    with pytest.raises((KeyError, ValueError), match=r"`statistics`.*'fc9'"):
        optimizer.bind(params).preconditioner.observe(optimizer.init(params).curvature, {"fc9": None})


@pytest.mark.filterwarnings("ignore:You are comparing a array_api_strict dtype")
def test_mixed_libraries_are_refused(rng, model):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    state = optimizer.init(params)
    grads, records = model.gradients(params, *model.batch(rng))
    foreign = {"fc1": tuple(strict.asarray(z) for z in records["fc1"]), "fc2": records["fc2"]}
    half = {"fc1": (records["fc1"][0], strict.asarray(records["fc1"][1])), "fc2": records["fc2"]}
    for wrong in (foreign, half):
        with pytest.raises(TypeError, match="`"):
            optimizer.step(params, grads, wrong, state)


def test_a_recorder_forgets_a_step_that_was_refused(rng, model):
    params = model.params(rng)
    grads, records = model.gradients(params, *model.batch(rng))
    recorder, clean = (kf.Recorder(kf.Optimizer(kf.KFAC(), model.layers()), params) for _ in range(2))
    for name, record in records.items():
        recorder.record(name, *record)
        clean.record(name, *record)
    with pytest.raises(ValueError, match="`grads`"):
        recorder.step(params, {})
    for name, record in records.items():  # the backward pass runs again
        recorder.record(name, *record)
    assert model.same(recorder.step(params, grads), clean.step(params, grads), 1e-12)


def test_a_recorder_names_what_was_not_recorded(rng, model):
    params = model.params(rng)
    grads, records = model.gradients(params, *model.batch(rng))
    recorder = kf.Recorder(kf.Optimizer(kf.KFAC(), model.layers()), params)
    recorder.record("fc1", *records["fc1"])
    with pytest.raises(ValueError, match=r"fc2.*`record`"):
        recorder.step(params, grads)
    with pytest.raises(ValueError, match=r"'fc9'.*fc1, fc2"):
        recorder.record("fc9", *records["fc1"])


def test_an_optimizer_of_two_models_takes_each_state_for_what_it_is(rng, model):
    """What is due follows from the state that is given, not from the model that was seen last."""
    optimizer = kf.Optimizer(kf.KFAC(stats_every=10, refresh_every=10), model.layers(), fallback=kf.Diagonal(stats_every=1))
    params = model.params(rng)
    plain = {name: params[name] for name in ("fc1", "fc2")}
    full, bare = optimizer.init(params), optimizer.init(plain)
    later = [s._replace(curvature=s.curvature._replace(steps=np.asarray(1, np.int32))) for s in (full, bare)]
    assert optimizer.stats_due(later[0])
    assert not optimizer.stats_due(later[1])
