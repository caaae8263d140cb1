"""Which indices are whose: the samples of a mean, of its pilot and of each level share no noise."""

PILOT = 1 << 50
"""Samples of the pilot; the samples of plain Monte Carlo begin at 0, so that they are those of `sample`."""
CONTROL = 2 << 50
"""Runs, or draws, of a control alone."""
PILOT_SCRAMBLES = 1 << 12
"""Scrambles of the pilot; point j of scramble r has the index r 2^32 + j."""


def of_level(level: int) -> int:
    """Where the samples of a level begin."""
    return (8 + level) << 50
