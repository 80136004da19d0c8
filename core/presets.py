"""Settings by name, the same for every model. What each costs and saves is measured in benchmarks/results."""
from .knob import shown
from .run import Settings
from .stepcache.levels.automatic import Automatic as AutomaticLevel
from .stepcache.policies.error_control import ErrorControl
from .stepcache.predictors.automatic import Automatic as AutomaticPredictor

TOLERANCE = {"safe": 0.01, "balanced": 0.02, "fast": 0.05}
PRESETS = tuple(TOLERANCE)


def preset_settings(name: str, **memory) -> Settings:
    """`memory`: what every preset lets the user choose: few_steps, budget_mib, storage, device."""
    if name not in TOLERANCE:
        raise ValueError(f"unknown preset '{shown(name)}'; known: {', '.join(PRESETS)}, custom")
    return Settings(ErrorControl(TOLERANCE[name]), AutomaticPredictor(), AutomaticLevel(), max_consecutive_skips=0, preset=name, **memory)
