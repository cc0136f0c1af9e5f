"""One HTML page about runs: curves, outcomes, what the diagnosis said, and saved rollouts token by token."""
