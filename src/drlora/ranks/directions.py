"""Young rows of A that point where the gradient does, or apart from the others, by choice.

A claimed row has B = 0, so its row of A decides what it can learn first. The gradient of an
expert's older rows, B^T G (G is that of the expert's whole weight), lies in the span of G's rows.
What A does not reach of it yet, the part outside of the span of A's own rows, is where new rows are
put: along its strongest directions, orthogonal to each other, as long as a random row is on
average. The function of the model does not change. The idea is that of LoRA-GA (arXiv 2407.05000)
and GoRA (arXiv 2502.12171), with what the optimizer has at hand in place of G.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drlora.distributed.held import trained_tensor, whole, write_rows

# Weaker directions than this part of the whole gradient are rounding.
_NEGLIGIBLE = 1e-4


def missing_directions(a_RI: Tensor, grad_RI: Tensor, count: int) -> Tensor:
    """(at most `count`, I) orthonormal directions of `grad_RI` that the rows of `a_RI` do not span.

    The strongest come first.

        >>> a, grad = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[5.0, 0.0, -2.0]])
        >>> missing_directions(a, grad, count=2).abs()
        tensor([[0., 0., 1.]])
    """
    basis_IR = torch.linalg.qr(a_RI.T).Q
    rest_RI = grad_RI - (grad_RI @ basis_IR) @ basis_IR.T
    _, strength_R, direction_RI = torch.linalg.svd(rest_RI, full_matrices=False)
    return direction_RI[:count][strength_R[:count] > _NEGLIGIBLE * grad_RI.norm()]


@torch.no_grad()
def point_along_gradient(
    lora_A: Tensor, gradient: Tensor | None, owner_R: Tensor, rows: Tensor, norm: float
) -> None:
    """Put just claimed rows of `lora_A` along the gradient; those that find no direction stay.

    Experts whose gradient or rows are not finite have none.

    Args:
        lora_A: (R, I), as the engine has left it.
        gradient: of the loss or an average of it, laid out as the tensor that is trained; None
            where this process has nothing of it.
        owner_R: (R,) the expert of each row; `rows` are owned already.
        rows: the claimed rows.
        norm: length of a row.
    """
    grad_RI = whole(lora_A, gradient).detach().float().cpu()
    lay_missing(lora_A, owner_R, rows, norm, lambda _, old: grad_RI[old])


@torch.no_grad()
def lay_missing(
    lora_A: Tensor,
    owner_R: Tensor,
    rows: Tensor,
    norm: float,
    gradient_of: Callable[[int, Tensor], Tensor],
) -> None:
    """Put just claimed rows of `lora_A` where their expert's gradient is and its rows are not.

    Args:
        lora_A, owner_R, rows, norm: as for `point_along_gradient`.
        gradient_of: from an expert and the numbers of its older rows to (N, I) float32 on the CPU,
            rows that span its gradient or a part of it.
    """
    # In float32 on the CPU: small, and the same on all processes.
    a_RI = whole(lora_A, trained_tensor(lora_A)).detach().float().cpu()
    young_R = torch.zeros(len(owner_R), dtype=torch.bool)
    young_R[rows.cpu()] = True
    owner_cpu_R = owner_R.cpu()
    wanted_RI = a_RI.clone()
    for expert in owner_cpu_R[young_R].unique().tolist():
        own_R = owner_cpu_R == expert
        old, new = (own_R & ~young_R).nonzero().squeeze(1), (own_R & young_R).nonzero().squeeze(1)
        grad_NI = gradient_of(expert, old)
        if not (a_RI[old].isfinite().all() and grad_NI.isfinite().all()):
            continue
        found_NI = missing_directions(a_RI[old], grad_NI, len(new))
        wanted_RI[new[: len(found_NI)]] = found_NI * norm
    write_rows(lora_A, rows, wanted_RI[rows.cpu()])


@torch.no_grad()
def turn_apart(lora_A: Tensor, owner_R: Tensor, rows: Tensor, norm: float) -> None:
    """Turn just claimed rows of `lora_A` until they are orthogonal to their expert's others.

    As EPnG grows experts (arXiv 2607.01789). An expert with more rows than in-features, or with
    rows that are not finite, keeps them as they are drawn.

    Args:
        lora_A: (R, I), as the engine has left it.
        owner_R: (R,) the expert of each row; `rows` are owned already.
        rows: the claimed rows, just drawn.
        norm: length of a row.
    """
    a_RI = whole(lora_A, trained_tensor(lora_A)).detach().float().cpu()
    young_R = torch.zeros(len(owner_R), dtype=torch.bool)
    young_R[rows.cpu()] = True
    owner_cpu_R = owner_R.cpu()
    for expert in owner_cpu_R[young_R].unique().tolist():
        own_R = owner_cpu_R == expert
        old, new = (own_R & ~young_R).nonzero().squeeze(1), (own_R & young_R).nonzero().squeeze(1)
        if len(old) + len(new) <= a_RI.shape[1] and a_RI[old].isfinite().all():
            basis_IR = torch.linalg.qr(torch.cat([a_RI[old], a_RI[new]]).T).Q
            a_RI[new] = basis_IR.T[len(old) :] * norm
    write_rows(lora_A, rows, a_RI[rows.cpu()])


def num_found(strength_XD: Tensor) -> Tensor:
    """How many directions are more than rounding; none where nothing has a gradient.

    Args:
        strength_XD: (..., D) the gradient's norm along each.
    """
    whole_X1 = strength_XD.norm(dim=-1, keepdim=True)
    return (strength_XD > _NEGLIGIBLE * whole_X1).sum(dim=-1)


@torch.no_grad()
def lay_rows(
    lora_A: Tensor, owner_R: Tensor, rows_EDI: Tensor, strength_ED: Tensor, norm: float
) -> None:
    """Write each expert's directions into the rows of `lora_A` that it owns, in their order.

    Rows that find no direction are as long, and stay random: turned only until they are orthogonal
    to their expert's others. Those are all rows of an expert that no token of the batches went to,
    and of others those beyond the tokens that did.

    Args:
        lora_A: (R, I), as the engine has left it, just drawn.
        owner_R: (R,) the expert of each row, -1 for none.
        rows_EDI: (E, D, I) orthonormal, the strongest first.
        strength_ED: (E, D) the gradient's norm along each, falling.
        norm: length of a row.
    """
    undirected = []
    counts = num_found(strength_ED).tolist()
    for expert, (rows_DI, count) in enumerate(zip(rows_EDI, counts, strict=True)):
        own = (owner_R == expert).nonzero().squeeze(1)
        directed = own[:count]
        write_rows(lora_A, directed, rows_DI[: len(directed)] * norm)
        undirected.append(own[len(directed) :])
    if any(map(len, undirected)):
        turn_apart(lora_A, owner_R, torch.cat(undirected), norm)
