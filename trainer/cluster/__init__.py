"""Training on a cluster: what is submitted to SLURM, what runs in its jobs, and the same chain on a workstation."""
