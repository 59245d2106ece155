"""The names of the arms. An arm is one way to get an encoder. Every arm that is not named here is imported."""

TRAINED = ("mim", "cl", "graft", "joint", "reverse")
BASELINES = ("pixels", "random")  # not trained: `lgp baseline` writes them


def how_to_get(arm: str) -> str:
    """Return the instruction to get the encoder of an arm, as text for a message."""
    if arm in TRAINED:
        return f"run `lgp {arm}`"
    if arm in BASELINES:
        return f"run `lgp baseline {arm}`"
    return f"train {', '.join(TRAINED)}, or run `lgp import FILE --arm {arm}`"
