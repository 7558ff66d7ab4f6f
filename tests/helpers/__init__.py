"""What several tests need; tests/ is on the path of tests and of the processes that they start."""
