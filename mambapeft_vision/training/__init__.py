"""Training: from a composed config to a run folder with a tested adapter."""
