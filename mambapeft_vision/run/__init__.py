"""One run from its config to its result: compose, plan, assemble, fit, finish."""
