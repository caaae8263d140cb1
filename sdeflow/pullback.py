"""Pulling cotangents back through records: which parameters a problem has, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.sde import SDE, Problem


def leaves(outputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """The tensors at the ends of the outputs' record, by id."""
    found: dict[int, Tensor] = {}
    ahead = [v.grad_fn for v in outputs if v.grad_fn is not None]
    found.update((id(v), v) for v in outputs if v.requires_grad and v.grad_fn is None)
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)
    return found


def parameters_of(problem: Problem, x: Tensor, t: Tensor) -> list[Tensor]:
    """The parameters of `problem`: what its drift and diffusion use at (x, t), and what its attributes hold."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        outputs = [problem.drift(leaf, t)]
        if problem.stochastic and isinstance(problem, SDE):
            outputs.append(torch.as_tensor(problem.diffusion(leaf, t)))
    found = leaves(outputs)
    for value in (*vars(problem).values(), *(model.net for model in problem.models())):
        if isinstance(value, torch.nn.Module):
            found.update((id(p), p) for p in value.parameters() if p.requires_grad)
        elif isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
            found[id(value)] = value
    found.pop(id(leaf), None)
    return list(found.values())


class Pullback:
    """Cotangents pulled back through a record; those of the parameters are added up."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        self._known = {id(p) for p in parameters}
        self._sums: list[Tensor | None] = [None] * len(parameters)

    @property
    def sums(self) -> list[Tensor | None]:
        """The cotangents of the parameters so far, None for those that were not used."""
        return [None if v is None else v.to(p.dtype) for v, p in zip(self._sums, self._parameters, strict=True)]

    def __call__(self, outputs: Sequence[Tensor], leaf: Tensor, cotangents: Sequence[Tensor | None]) -> Tensor:
        (found,) = self.pull(outputs, [leaf], cotangents)
        return torch.zeros_like(leaf) if found is None else found

    def pull(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The cotangents of `inputs`, None for those that were not used."""
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        recorded = [y for y, _ in pairs]
        check_known(recorded, self._known, inputs)
        # the record of what lies before the solve, such as a parameter's own formula, is used again by the next step
        grads = torch.autograd.grad(
            recorded, [*inputs, *self._parameters], [c for _, c in pairs], allow_unused=True, retain_graph=True
        )
        for i, g in enumerate(grads[len(inputs) :]):
            if g is not None:
                own = self._sums[i]
                # of 16 bits the sum over many steps would keep too few
                work = g.dtype if g.dtype in (torch.float32, torch.float64) else torch.float32
                self._sums[i] = g.to(work, copy=True) if own is None else own.add_(g)
        return list(grads[: len(inputs)])


def check_known(outputs: Sequence[Tensor], known: set[int], inputs: Sequence[Tensor]) -> None:
    """Refuse a record that ends in a tensor which would get no gradient."""
    own = {id(v) for v in inputs}
    for key, value in leaves(outputs).items():
        if key not in known and key not in own:
            raise RuntimeError(
                f"a tensor of shape {tuple(value.shape)} that requires gradients is used in the solve, but not by the "
                "drift and the diffusion at its start, and is no attribute of the problem: its gradient would be lost; "
                'make it (or its module) an attribute, or use gradient="direct"'
            )
