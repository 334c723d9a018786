"""The rules, by plan. A plan runs its passes in order; every rule can be switched off, or bounded in tokens, by name."""
from ...config import Config
from ...errors import InputError
from . import all_reduce_norm, async_tp, boundary, moe, sequence_parallel

PLANS = {
    "replicated": (all_reduce_norm.rules, moe.rules, async_tp.rules),
    "sharded": (sequence_parallel.rules, moe.rules, async_tp.rules, boundary.rules),
}
RULES = {r.name: r for passes in PLANS.values() for rules in passes for r in rules}


def check_rules(config: Config) -> Config:
    """`config` itself; InputError for a rule that does not exist."""
    for name in config.rules:
        if name not in RULES:
            raise InputError(f"unknown rule {name!r}; known: {', '.join(RULES)}")
    return config
