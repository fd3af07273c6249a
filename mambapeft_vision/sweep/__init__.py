"""Many runs: which, in what order, in which processes, and what they show while they run."""
