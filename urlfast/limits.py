"""What a config's numbers may be."""

from operator import ge, gt


def check_limits(config, **limits: str) -> None:
    """Raises ValueError, naming the field, unless every named field keeps its limit: "> 0", ">= 1" or "0..1".

    Of a tuple every number is checked; None and other things that are no numbers are passed over.
    """
    for name, limit in limits.items():
        sign, _, bound = limit.rpartition(" ")
        low, _, high = bound.partition("..")
        for number in _numbers(getattr(config, name)):
            above = {">": gt, ">=": ge, "": ge}[sign](number, float(low))  # False for NaN
            if not above or (high and not number <= float(high)):
                says = f"lie in {limit}" if high else "be positive" if limit == "> 0" else f"be at least {low}"
                raise ValueError(f"{name}: must {says}, got {number}")


def _numbers(value):
    if isinstance(value, tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value
