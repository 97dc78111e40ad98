"""What a user runs: the command line, the engines, the studies and the report."""
