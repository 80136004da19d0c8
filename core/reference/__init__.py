"""References and conditions that no step changes: encoded once, injected on every step."""
