"""When a rollout ends: the `stop` slot."""
