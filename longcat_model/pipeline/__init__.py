"""V-Half pipeline parallelism as a small compiler: a schedule is data, checked and simulated before anything runs."""
