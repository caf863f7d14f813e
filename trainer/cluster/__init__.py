"""A run as jobs of a cluster: what is submitted, what happens inside a job, and many runs at once."""
