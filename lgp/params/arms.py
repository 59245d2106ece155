"""The names of the arms, and the commands that make what they have.

An arm is one way to get an encoder. Every arm that is not named here is imported.
"""

TRAINED = ("mim", "cl", "graft", "joint", "reverse")
TUNING = ("finetune", "semi")  # the evaluations that train an arm's encoder further
OF_SINGLE_IMAGES = ("mim", "reverse", *TUNING)  # whose loss is a mean of losses of single images, or of mixed pairs
BASELINES = ("pixels", "random")  # not trained: `lgp baseline` writes them


def how_to_get(arm: str) -> str:
    """Return the instruction to get the encoder of an arm, as text for a message."""
    if arm in TRAINED:
        return f"run `lgp {arm}`"
    if arm in BASELINES:
        return f"run `lgp baseline {arm}`"
    return f"train {', '.join(TRAINED)}, or run `lgp import FILE --arm {arm}`"


def how_to_evaluate(arm: str, task: str) -> str:
    """Return the instruction to make the results of an arm and task, as text for a message."""
    kind, _, labels = task.partition("-")
    labels = labels.removesuffix("-propagated") if kind == "selected" else labels
    return f"run `{' '.join(filter(None, ['lgp', kind, arm, labels]))}`"
