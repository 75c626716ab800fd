"""DeepSpeed's ZeRO watched at the one moment at which its gradients can be read.

    engine.step()                       reduces, unscales and clips; then, on flat float32 parts,
        hook: before the inner step     row sums of |weight * gradient| of the parts that are here
        inner optimizer.step()          torch's AdamW
        hook: after the inner step      young rows are corrected, held routers put back
                                        ... and only now ZeRO copies and gathers the result
    dynamics.before_optimizer_step()    the sums of all processes, in one all-reduce
    dynamics.after_optimizer_step(...)  growth

Both hooks are public ones of torch's optimizers. Nothing is gathered that ZeRO would not gather
itself. A step that ZeRO skips (an overflow in float16) never comes to the inner optimizer.
ZeRO-3 makes one inner step for each of its groups of parameters, so a hook looks at those only
whose flat tensor is being stepped on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora.adapter.pool import RankPool
from drlora.adapter.router import TrainedRouters
from drlora.distributed import add_up
from drlora.distributed.held import blocks_of, row_width, trained_tensor
from drlora.distributed.zero import adopt, ask_inputs_for_gradients, leaves_of, shape_of
from drlora.ranks.optimizer_rows import WEIGHTS, is_adam, parameter_groups
from drlora.ranks.saliency import RowSums, row_sums
from drlora.ranks.young_rows import Clock, Cohort, OwnClocks, correct_young_rows, young_spans


class WatchedZero:
    """ZeRO's optimizer, with hooks on the inner one.

    Args:
        zero: ZeRO's own optimizer.
        pools: whose rows are measured, and corrected while they are young.
        routers: that are held during the warm-up.
        has_own_clocks: whether young rows step as an Adam of their own would (`young_rows`).
        count: the number of the step that is being taken, as the optimizer counts.
        end_of_warmup: the count after which routers train.
        is_signed: whether importance is made of signed sums.

    Attributes:
        was_skipped: whether the last step that sums were taken of never came to the optimizer.

    Raises:
        ConfigError: if rows cannot be followed in this kind of ZeRO.
    """

    was_skipped = False

    def __init__(
        self,
        zero: Any,
        pools: Sequence[RankPool],
        routers: TrainedRouters,
        has_own_clocks: bool,
        count: Callable[[], int],
        end_of_warmup: Callable[[], int],
        is_signed: bool = False,
    ) -> None:
        self.zero = zero
        self._pools = pools
        self._routers = routers
        self._has_own_clocks = has_own_clocks
        self._is_signed = is_signed
        self._count = count
        self._end_of_warmup = end_of_warmup
        self._clocks = OwnClocks()
        self._has_stepped = False
        self._sums: list[tuple[nn.Parameter, Tensor]] = []
        self._held: list[tuple[nn.Parameter, list[Tensor]]] = []
        adopt(zero, [*self._factors(), *routers.parameters])
        inner: Optimizer = zero.optimizer
        self._hooks = [
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(self._after),
            *map(ask_inputs_for_gradients, leaves_of(zero)),
        ]

    def let_go(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def take_sums(self, device: torch.device) -> list[RowSums]:
        """Those of the step that was just taken, over all processes; none if it was skipped.

        All processes skip a step or none does: ZeRO asks all of them for an overflow.
        """
        self.was_skipped, self._has_stepped = not self._has_stepped, False
        if self.was_skipped:
            return []
        factors = self._factors()
        lengths = [shape_of(parameter)[0] for parameter in factors]
        sums = torch.zeros(sum(lengths), device=device)
        of_factor = dict(zip(map(id, factors), sums.split(lengths), strict=True))
        for parameter, sums_R in self._sums:
            of_factor[id(parameter)].copy_(sums_R)
        self._sums = []
        add_up(sums)
        split = list(of_factor.values())
        return [
            RowSums(a_R, b_R, pool.in_features, pool.out_features)
            for pool, a_R, b_R in zip(self._pools, split[::2], split[1::2], strict=True)
        ]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._has_stepped:  # of this step; those of one that nobody asked for are old
            self._sums = []
        self._has_stepped = True
        stepping = parameter_groups(optimizer)
        for parameter in self._factors():
            flat = trained_tensor(parameter)
            if flat is not None and flat in stepping and flat.grad is not None:
                sums_R = torch.zeros(shape_of(parameter)[0], device=flat.device)
                for block in blocks_of(parameter):
                    of_block = row_sums(block.of(flat), block.of(flat.grad), self._is_signed)
                    sums_R[block.first : block.end] += of_block
                self._sums.append((parameter, sums_R))
        self._held = []
        for parameter in self._routers.parameters if self._routers.are_held else ():
            flat = trained_tensor(parameter)
            if flat is not None and flat in stepping:
                kept = [block.of(flat).clone() for block in blocks_of(parameter)]
                self._held.append((parameter, kept))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, kept in self._held:
            _put_back(optimizer, parameter, kept)
        if is_adam(optimizer):
            if self._has_own_clocks:
                self._clocks.correct(optimizer, self._pools, self._count())
            if not self._routers.are_held:
                self._start_routers_late(optimizer)

    def _start_routers_late(self, optimizer: Optimizer) -> None:
        """Routers step as an Adam that begins when the warm-up is over, whatever is shared here."""
        groups = parameter_groups(optimizer)
        birth = self._end_of_warmup()
        for parameter in self._routers.parameters:
            flat = trained_tensor(parameter)
            if flat is None or flat not in groups:
                continue
            group, state = groups[flat], optimizer.state[flat]
            clock = Clock.of(group, state, self._count())
            rows = (shape_of(parameter) or (1,))[0]
            for span in young_spans([Cohort(0, rows, birth)], clock):
                own = clock.own_fractions(torch.full((rows,), birth))
                buffer = self._clocks.buffer(flat, row_width(parameter))
                correct_young_rows(parameter, state, group, span, clock, own, buffer)

    def _factors(self) -> list[nn.Parameter]:
        return [p for pool in self._pools for p in (pool.lora_A, pool.lora_B)]


def _put_back(optimizer: Optimizer, parameter: nn.Parameter, kept: list[Tensor]) -> None:
    """Weights as they were before the step, and no moments."""
    flat = trained_tensor(parameter)
    assert flat is not None
    state = {
        name: value
        for name, value in optimizer.state[flat].items()
        if isinstance(value, Tensor) and value.shape == flat.shape
    }
    for block, before in zip(blocks_of(parameter), kept, strict=True):
        block.of(flat).copy_(before)
        for name, value in state.items():
            block.of(value).copy_(before if name in WEIGHTS else torch.zeros_like(before))
