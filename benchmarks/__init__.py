"""Benchmarks of the operators against the strongest peers, measured in the same run."""
