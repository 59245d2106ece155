"""The arms by name. An arm is one way to get an encoder; any arm that is not named here is imported."""

TRAINED = ("mim", "cl", "graft", "joint", "reverse")
BASELINES = ("pixels", "random")  # nobody trains them; `lgp baseline` writes them


def how_to_get(arm: str) -> str:
    """Say how an arm gets its encoder."""
    if arm in TRAINED:
        return f"run `lgp {arm}`"
    if arm in BASELINES:
        return f"run `lgp baseline {arm}`"
    return f"train {', '.join(TRAINED)}, or run `lgp import FILE --arm {arm}`"
