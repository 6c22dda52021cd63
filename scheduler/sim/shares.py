"""What each tenant would have if the same number of requests on time were shared fairly: the yardstick of fairness."""

from collections.abc import Mapping


def fair(
    asked: Mapping[str, float], total: float, weights: Mapping[str, float]
) -> dict[str, float]:
    """Max-min shares by weight: nobody gets more than it asked for, and what one leaves the others share.

    Args:
        asked: by tenant, in any unit.
        total: what there is to share, in the same unit.
        weights: by tenant; 1 for who is not named.

    Returns:
        By tenant, in the order of `asked`; together at most `total`.

    >>> fair({"a": 10.0, "b": 10.0, "c": 2.0}, 12.0, {"a": 4.0})
    {'a': 8.0, 'b': 2.0, 'c': 2.0}
    """
    left, open_ = total, dict(asked)
    found = dict.fromkeys(asked, 0.0)
    while open_:
        sum_ = sum(weights.get(tenant, 1.0) for tenant in open_)
        share = {tenant: left * weights.get(tenant, 1.0) / sum_ for tenant in open_}
        content = [tenant for tenant in open_ if open_[tenant] <= share[tenant]]
        if not content:
            return {**found, **share}
        for tenant in content:
            found[tenant] = open_.pop(tenant)
            left -= found[tenant]
    return found
