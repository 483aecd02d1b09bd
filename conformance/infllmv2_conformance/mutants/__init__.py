"""Deliberately wrong implementations, which measure what the suite can catch."""
