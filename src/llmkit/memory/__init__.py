"""What a model takes in memory, before it is made or fetched: the engine is asked, in a child process."""
