"""Says why a run goes wrong: signs of failure in its metrics, what helps against each, and whether to go on."""
