"""Writes figures as reports print them: estimates, intervals, p, and what they rest on."""

from train.comparison.result import Figures
from train.comparison.significance import Difference, Interval
from train.comparison.units import Units


def number(value: float | None, unit: str, signed: bool = False) -> str:
    """Returns a number as text with as many digits as are meaningful: one decimal for percentages and points, two for
    nats and scores; "–" for None. signed: with a plus sign if it is positive."""
    if value is None:
        return "–"
    digits = 1 if unit in ("%", "points") else 2
    value = round(value, digits) + 0.0  # never −0.0
    return f"{value:+.{digits}f}".replace("-", "−") if signed and value else f"{value:.{digits}f}".replace("-", "−")


def span(own: Interval | None, unit: str, signed: bool = False) -> str:
    """Returns an interval as the text "[low, high]", with numbers as `number` writes them; "" for None."""
    return "" if own is None else f"[{number(own.low, unit, signed)}, {number(own.high, unit, signed)}]"


def counted(number: int, what: str) -> str:
    """Returns a count with its noun, such as "1 seed" or "3 seeds". what: the noun in the plural."""
    return f"{number:,} {what if number != 1 else what.removesuffix('s')}"


def rests_on(units: Units) -> str:
    """Returns the independent units of a figure as text, such as "24 claims, 3 seeds"."""
    return f"{counted(units.number, units.of)}, {counted(units.seeds, 'seeds')}"


def by_t(units: Units, placebo: Units | None = None) -> str:
    """Returns a text that says how intervals are made and over how many units."""
    return f"95 % t intervals over {rests_on(units)}" + (f" (placebo: {rests_on(placebo)})" if placebo else "")


def in_context(documents: int) -> str:
    """Returns how reports name the base model with documents in context."""
    return f"base model with {documents} document{'s' * (documents != 1)} in context"


def estimated(own: Figures | Difference | Interval | None, unit: str, signed: bool = False) -> str:
    """Returns an estimate with its interval, marked ‡ if that is the exact binomial one; "–" for None."""
    if own is None:
        return "–"
    interval = own if isinstance(own, Interval) else own.interval
    if interval.method == "none":
        return number(interval.estimate, unit, signed)
    mark = "‡" if interval.method == "exact binomial" else ""
    return f"{number(interval.estimate, unit, signed)} {span(interval, unit, signed)}{mark}"


def p_value(value: float | None) -> str:
    """Returns a p as reports print it, such as "< .001" or ".012"; "–" for None."""
    if value is None:
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0") if value < 1 else "1"


def tested(gap: Difference) -> list[str]:
    """Returns the cells for p, adjusted for all variants, and for the units that it rests on."""
    return [p_value(gap.p_holm), rests_on(gap.units)]
