"""The rules, by plan. A plan runs its passes in order; every rule can be switched off, or bounded in tokens, by name."""
from . import all_reduce_norm, async_tp, sequence_parallel

PLANS = {
    "replicated": (all_reduce_norm.rules, async_tp.rules),
    "sharded": (sequence_parallel.rules, async_tp.rules),
}
RULES = {r.name: r for passes in PLANS.values() for rules in passes for r in rules}
