"""Fixture nodes: they stand in for models of many gigabytes and for files that lose detail, in the demo host only."""
