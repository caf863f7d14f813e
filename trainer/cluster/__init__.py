"""A run as jobs of a cluster: what is submitted, what happens inside a job, and the same chain on a workstation."""
