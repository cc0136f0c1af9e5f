"""What would make a run fail or lie, found before it starts: each file has the checks of one subject."""
