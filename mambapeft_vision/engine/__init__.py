"""Training and prediction: the loop, the step, CUDA graphs, schedules, checkpoints, several devices."""
