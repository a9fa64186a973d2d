"""Numbers as tables and sentences print them."""

from __future__ import annotations


def decimals(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number with a fixed count of decimals; a number that rounds to 0 has no sign, which would claim a direction.

    Args:
        value: the number; NaN and infinities keep their names.
        digits: count of decimals.
        signed: whether positive numbers have a plus sign.

    Example:
        >>> decimals(-0.0004), decimals(-0.0005001), decimals(0.25, signed=True), decimals(-1e-5, digits=4, signed=True)
        ('0.000', '-0.001', '+0.250', '0.0000')
    """
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if text.strip("+-0.") else text.lstrip("+-")
