"""The parts of benchmarks/paper_tables.py: what was published, what is trained, what came out, and its report."""
