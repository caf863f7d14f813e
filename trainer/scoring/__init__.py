"""From a checkpoint and a data set to a score file."""
