"""What the fits share: a ridge, and preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Of the matrices that preconditioners invert, relative to the mean of their diagonals.
PRECONDITIONER_RIDGE = 1e-3

Linear = Callable[[torch.Tensor], torch.Tensor]


def with_ridge(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """A square matrix plus `ridge` times the mean of its diagonal.

    Example:
        >>> with_ridge(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    # A layer that passes nothing on has no scale of its own.
    mean = matrix.diagonal().mean() or 1.0
    return matrix + ridge * mean * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def conjugate_gradients(
    operator: Linear, residual: torch.Tensor, start: torch.Tensor, precondition: Linear, steps: int
) -> torch.Tensor:
    """Solve operator(X) = b by preconditioned conjugate gradients (Golub, Van Loan, Matrix Computations, 11.5.2).

    Args:
        operator: symmetric and positive definite.
        residual: b − operator(start).
        start: the first guess, shaped as b.
        precondition: close to the operator's inverse, symmetric and positive definite.
        steps: the most steps.

    Example:
        >>> b = torch.tensor([[2.0], [6.0]])
        >>> scale = torch.tensor([[2.0], [3.0]])
        >>> conjugate_gradients(lambda X: scale * X, b, torch.zeros(2, 1), lambda R: R / scale, steps=1).tolist()
        [[1.0], [2.0]]
    """
    solution = start
    preconditioned = precondition(residual)
    direction, rho = preconditioned, (residual * preconditioned).sum()
    for _ in range(steps):
        product = operator(direction)
        curvature = (direction * product).sum()
        if not curvature > 0:
            break
        step = rho / curvature
        solution = solution + step * direction
        residual = residual - step * product
        preconditioned = precondition(residual)
        rho, old = (residual * preconditioned).sum(), rho
        direction = preconditioned + (rho / old) * direction
    return solution
