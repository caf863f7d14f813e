"""A run on a cluster: what a job does before, in and after its tasks, and how jobs follow each other."""
