"""Policies of allocation: who gives ranks up at an event, and who gets them.

    grow     from r_init up to r_target, by saliency; ranks may also move (DR-LoRA)
    prune    from r_init down to r_target, by importance (AdaLoRA)

A policy of your own is a subclass of `Policy` in a file of yours:

    class Swap(Policy):
        def change(self, config, scored, event):
            return Change(freed, granted)

    ALLOCATIONS.add("swap", Swap())                     # drlora.config.registry
    check_allocation("swap", r_init=4, r_target=4)      # drlora.ranks.contract
    DrLoraConfig(allocation="swap", r_init=4, r_target=4)
"""

from drlora.ranks.policies.grow import Grow
from drlora.ranks.policies.policy import ROW_OPTIONS, Change, Policy
from drlora.ranks.policies.prune import Prune

__all__ = ["ROW_OPTIONS", "Change", "Grow", "Policy", "Prune"]
