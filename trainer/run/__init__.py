"""What a run is, for whoever writes or reads one: its directory, its checkpoints, its processes."""
