"""Numbers with readable units."""

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def flop_text(flop: float) -> str:
    """Write a number of floating-point operations with three digits and its unit: 2.3e10 is `23 GFLOP`."""
    power = 0
    while abs(flop) >= 999.5 and power < len(PREFIXES) - 1:
        flop, power = flop / 1000, power + 1
    return f"{flop:.3g} {PREFIXES[power]}FLOP"


def time_text(hours: float) -> str:
    """Write a time as seconds, minutes, hours or days: 0.09 h is `5.4 min`."""
    for unit, length in (("s", 1 / 3600), ("min", 1 / 60), ("h", 1.0)):
        if hours < {"s": 1 / 60, "min": 1.0, "h": 48.0}[unit]:
            return f"{hours / length:.3g} {unit}"
    return f"{hours / 24:.3g} days"
