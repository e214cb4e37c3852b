"""Many runs: a queue of them, on this machine or by Slurm, and one comparison of their figures."""
