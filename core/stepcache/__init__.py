"""Step cache = policy (when to skip) x predictor (what to put there) x level (what is skipped), over a family's facts."""
