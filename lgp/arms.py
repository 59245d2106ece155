"""The arms that have a stage of their own (any other is imported), and what lies in an arm's folder."""

# beside the encoder folder
HEADS, METRICS, CURVES = "heads.safetensors", "metrics.json", "curves.csv"
RECONSTRUCTIONS = "reconstructions.safetensors"  # where the arm has a decoder
TRAINED = ("mim", "cl", "graft", "joint", "reverse")


def no_encoder(arm: str) -> str:
    """Say that an arm has no encoder yet, and how it gets one."""
    get_one = f"run `lgp {arm}`" if arm in TRAINED else f"train {', '.join(TRAINED)}, or `lgp import FILE --arm {arm}`"
    return f"there is no encoder of arm {arm!r} yet, {get_one}"
