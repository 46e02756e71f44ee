"""Measurements: speed and memory of the library against others, by hand and not in CI."""
