"""Contracts: what a rule, an engine or a storage of your own must do, as functions to call.

    from drlora.testing import check_saliency

    @SALIENCIES.register("count-only")
    def count_only(signals): ...

    def test_my_rule():
        check_saliency("count-only")

Each raises AssertionError with the law that is broken. None needs pytest, a model or a GPU.
docs/extending.md shows one example of each.
"""

from drlora.ops.contract import check_engine
from drlora.ranks.contract import check_allocation
from drlora.testing.rules import check_method, check_saliency, check_start

__all__ = ["check_allocation", "check_engine", "check_method", "check_saliency", "check_start"]
