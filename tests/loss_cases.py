"""Data and processes of the tests of losses, expectations by quadrature, and how far a model is from a minimum."""

import numpy as np
import torch

import sdeflow as sf
from tests.exact import F64

MIXTURE = sf.problems.GaussianMixture([[-0.7], [0.9]], [[0.2], [0.35]], [0.4, 0.6])
TABLE = [0.05, 0.2, 0.1, 0.4, 0.6]


def hermite(points):
    """Nodes and weights of an expectation over N(0, 1)."""
    nodes, w = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(w / w.sum())


def normals(points, dims):
    """Nodes (m, dims) and weights (m,) of an expectation over N(0, I)."""
    z, w = hermite(points)
    nodes = torch.cartesian_prod(*[z] * dims).reshape(-1, dims)
    return nodes, torch.cartesian_prod(*[w] * dims).reshape(-1, dims).prod(1)


def mixture_pairs(points=60):
    """(x0 (m, 1), eps (m, 1), probability (m,)) of data of MIXTURE and noise."""
    z, w = normals(points, 2)
    parts = [
        (m + torch.sqrt(v) * z[:, :1], z[:, 1:], share * w)
        for m, v, share in zip(MIXTURE.means, MIXTURE.variances, MIXTURE.weights, strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def bent(x):
    """Directions in which a model of states (m, d) can be wrong, (m, d, 4): no score is left out by symmetry."""
    return torch.stack([torch.ones_like(x), x, torch.tanh(x - 0.3), torch.sin(x) * x.sum(1, keepdim=True)], dim=-1)


def around(exact, process, prediction):
    """(theta, a model that is exact at theta = 0)."""
    theta = torch.zeros(4, dtype=F64, requires_grad=True)
    net = lambda x, t: exact(x, t) + bent(x) @ theta  # noqa: E731
    return theta, sf.Model(net, process, prediction, expand=False)


def curvature(loss, probability, theta):
    """(largest slope, least curvature) of the expected loss at theta = 0, in units of the loss's own size."""
    (slope,) = torch.autograd.grad((probability * loss).sum(), theta, create_graph=True)
    rows = [torch.autograd.grad(part, theta, retain_graph=True)[0] for part in slope]
    hessian = torch.stack(rows)
    return float(slope.detach().abs().max() / hessian.abs().max()), float(
        torch.linalg.eigvalsh(hessian)[0] / hessian.abs().max()
    )


def assert_minimal(loss, probability, theta, tolerance=1e-9):
    slope, least = curvature(loss, probability, theta)
    assert slope < tolerance
    assert least > 1e-5
