"""Where Kronecker factors are exact they are exactly those of the GGN matrix or of the empirical Fisher matrix."""

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

F = torch.nn.functional


def reference(model, x, y, term_losses, terms, kind):
    """Diagonal blocks of the GGN (or empirical Fisher) matrix of the mean loss, by layer, weight and bias joint."""
    names = [n for n, _ in model.named_parameters()]
    params = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(params):
        return torch.func.functional_call(model, params, (x,))

    f = outputs(params).detach()
    if kind == "exact":
        jacobian = torch.func.jacrev(outputs)(params)
        hessian = torch.autograd.functional.hessian(lambda f: term_losses(f, y).sum(), f).reshape(f.numel(), f.numel())
    else:
        jacobian = torch.func.jacrev(lambda params: term_losses(outputs(params), y))(params)
        hessian = torch.eye(int(term_losses(f, y).numel()), dtype=f.dtype)
    blocks = {}
    for layer in sorted({n.rpartition(".")[0] for n in names}):
        parts = [jacobian[f"{layer}.weight"].flatten(0, -3)]
        if f"{layer}.bias" in names:
            parts.append(jacobian[f"{layer}.bias"].flatten(0, -2)[..., None])
        j = torch.cat(parts, dim=-1).flatten(1)
        blocks[layer] = (j.T @ hessian @ j / terms).numpy()
    return blocks


def observed(model, x, y, loss, criterion, *, fisher, reduction="mean", terms=None, generator=None, samples=1):
    method = kf.KFAC(damping=0.1, fisher=fisher, mc_samples=samples)
    optimizer = Optimizer(model, method, lr=0.0, loss=loss, loss_reduction=reduction)
    f = model(x)
    if fisher in ("mc", "exact"):
        optimizer.backward_fisher(f, y, generator=generator)
    criterion(f, y).backward()
    optimizer.step(terms=terms)
    return optimizer


def class_terms(f, y):
    return F.cross_entropy(f, y, reduction="none")


def bit_terms(f, y):
    return F.binary_cross_entropy_with_logits(f, y, reduction="none")


LOSSES = {
    "ce": (kf.CrossEntropy(), F.cross_entropy, class_terms),
    "mse": (kf.MSE(), F.mse_loss, lambda f, y: (f - y) ** 2),
    "bce": (
        kf.BCEWithLogits(),
        F.binary_cross_entropy_with_logits,
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none"),
    ),
}


def problem(lib, loss, n):
    x, y = lib.data(n)
    if loss == "ce":
        return x, y, n
    target = torch.rand(n, 3, dtype=x.dtype)
    return x, target.round() if loss == "bce" else target, 3 * n


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_exact_fisher_of_one_example_is_the_ggn(lib, loss, reduction):
    model, (x, y, terms) = lib.mlp(), problem(lib, loss, 1)
    description, criterion, term_losses = LOSSES[loss]
    found = lib.dense(
        observed(model, x, y, description, lambda f, y: criterion(f, y, reduction=reduction), fisher="exact", reduction=reduction)
    )
    for name, block in reference(model, x, y, term_losses, terms, "exact").items():
        assert lib.gap(found[name], block) < 1e-12


def test_the_exact_fisher_of_a_deep_linear_net_is_the_ggn_of_the_squared_error(lib):
    model, (x, y, terms) = lib.mlp(activation=None, bias=False), problem(lib, "mse", 7)
    found = lib.dense(observed(model, x, y, kf.MSE(), F.mse_loss, fisher="exact"))
    for name, block in reference(model, x, y, LOSSES["mse"][2], terms, "exact").items():
        assert lib.gap(found[name], block) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_empirical_fisher_of_one_example_is_that_of_its_gradient(lib, reduction):
    model, (x, y) = lib.mlp(), lib.data(1)
    criterion = torch.nn.CrossEntropyLoss(reduction=reduction)
    found = lib.dense(observed(model, x, y, None, criterion, fisher="empirical", reduction=reduction))
    for name, block in reference(model, x, y, class_terms, 1, "empirical").items():
        assert lib.gap(found[name], block) < 1e-12


def test_the_output_factor_of_the_empirical_fisher_counts_examples(lib):
    model, (x, y) = lib.mlp(), lib.data(9)
    optimizer = observed(model, x, y, None, F.cross_entropy, fisher="empirical")
    logits = model(x).detach()
    g = (logits.softmax(-1) - F.one_hot(y, 3)).numpy()
    assert lib.gap(lib.factors(optimizer, "4")[1], g.T @ g / 9) < 1e-12


@pytest.mark.parametrize("given", [None, 27.0], ids=["counted", "given"])
def test_the_output_factor_of_a_squared_error_counts_numbers(lib, given):
    model, (x, y, terms) = lib.mlp(), problem(lib, "mse", 9)
    optimizer = observed(model, x, y, kf.MSE() if given is None else None, F.mse_loss, fisher="empirical", terms=given)
    g = 2 * (model(x) - y).detach().numpy()
    assert lib.gap(lib.factors(optimizer, "4")[1], g.T @ g / terms) < 1e-12


def test_the_forward_fisher_has_the_input_factor_alone(lib):
    model, (x, y) = lib.mlp(), lib.data(9)
    optimizer = observed(model, x, y, None, F.cross_entropy, fisher="forward")
    a = np.c_[x.numpy(), np.ones(9)]
    found, none = lib.factors(optimizer, "0")
    assert none is None
    assert lib.gap(found, a.T @ a / 9) < 1e-13
    assert all(not t._backward_hooks for t in [model[0](x)]), "the forward Fisher needs no backward hook"


def test_label_smoothing_leaves_the_exact_fisher_as_it_is(lib):
    model, (x, y) = lib.mlp(), lib.data(6)
    smooth = observed(model, x, y, kf.CrossEntropy(label_smoothing=0.2), torch.nn.CrossEntropyLoss(label_smoothing=0.2), fisher="exact")
    plain = observed(model, x, y, kf.CrossEntropy(), F.cross_entropy, fisher="exact")
    for name, block in lib.dense(plain).items():
        assert lib.gap(lib.dense(smooth)[name], block) < 1e-14


def test_label_smoothing_enters_the_empirical_fisher(lib):
    model, (x, y) = lib.mlp(), lib.data(1)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    found = lib.dense(observed(model, x, y, None, criterion, fisher="empirical"))
    terms = torch.nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
    for name, block in reference(model, x, y, terms, 1, "empirical").items():
        assert lib.gap(found[name], block) < 1e-12


class Tokens(torch.nn.Module):
    """A deep linear net over positions with logits as ``[N, C, T]``."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).mT


@pytest.mark.parametrize("ignore", [None, -100], ids=["all counted", "some ignored"])
def test_token_axes_with_ignored_positions_give_the_ggn_of_one_layer(lib, ignore):
    model = Tokens(lib.mlp((4, 3), activation=None, bias=False))
    x, y = torch.randn(1, 1, 4, dtype=torch.float64).expand(2, 5, 4).contiguous(), torch.randint(3, (2, 5))
    if ignore is not None:
        y[0, :3] = ignore
    terms = int((y != -100).sum())
    optimizer = observed(model, x, y, kf.CrossEntropy(axis=1, ignore_index=ignore), F.cross_entropy, fisher="exact")
    block = reference(model, x, y, lambda f, y: F.cross_entropy(f, y, reduction="none"), terms, "exact")["net.0"]
    assert lib.gap(lib.dense(optimizer)["net.0"], block) < 1e-12


def test_many_draws_come_close_to_the_exact_fisher(lib):
    for loss, (description, criterion, _) in LOSSES.items():
        model, (x, y, _) = lib.mlp(), problem(lib, loss, 5)
        generator = torch.Generator().manual_seed(0)
        drawn = observed(model, x, y, description, criterion, fisher="mc", generator=generator, samples=2000)
        exact = observed(model, x, y, description, criterion, fisher="exact")
        for name in ("0", "2", "4"):
            assert lib.gap(lib.factors(drawn, name)[1], lib.factors(exact, name)[1]) < 0.12, (loss, name)
            assert lib.gap(lib.factors(drawn, name)[0], lib.factors(exact, name)[0]) < 1e-12


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
def test_a_batch_given_twice_has_the_same_factors(lib, fisher):
    (x, y), model = lib.data(5), lib.mlp()
    once = lib.dense(observed(model, x, y, kf.CrossEntropy(), F.cross_entropy, fisher=fisher))
    twice = lib.dense(observed(model, x.repeat(2, 1), y.repeat(2), kf.CrossEntropy(), F.cross_entropy, fisher=fisher))
    for name, block in once.items():
        assert lib.gap(twice[name], block) < 1e-13
