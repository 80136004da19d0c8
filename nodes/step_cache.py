"""Step Cache: skip the steps whose result can be predicted from the steps before."""
from ..core.attach import attach_step_cache, check_profile
from ..core.presets import PRESETS, preset_settings
from ..core.run import DEVICES, STORAGE, Settings
from ..core.stepcache.calibrate import profiles_folder
from ..core.stepcache.corrections import CORRECTIONS
from ..core.stepcache.levels import LEVELS
from ..core.stepcache.policies import POLICIES
from ..core.stepcache.policies.profile import FromProfile
from ..core.stepcache.predictors import PREDICTORS
from ..core.stepcache.profiles import stamp
from ._api import io
from .choice import check_sent, choice, chosen
from .notify import notifier
from .numbers import check_numbers

CUSTOM, DEFAULT = "custom", "balanced"
MENUS = {"policy": POLICIES, "predictor": PREDICTORS, "level": LEVELS, "correction": CORRECTIONS}


class StepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_StepCache",
            display_name="Step Cache",
            category="reprise",
            description="Skips sampling steps whose result can be predicted from the steps before, and reports the error it made. "
                        "Approximate: the picture stays close to the full one, not identical. Any diffusion model.",
            search_aliases=[
                "teacache", "taylorseer", "first block cache", "easycache", "magcache", "deepcache", "delta-dit", "wavespeed", "speed up", "skip steps"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to sample with."),
                io.Boolean.Input("enabled", default=True, optional=True,
                                 tooltip="Off passes the model through: the picture is bit-identical to the one without the node."),
                io.Combo.Input(
                    "preset", options=[*PRESETS, CUSTOM], default=DEFAULT, optional=True,
                    tooltip="safe, balanced and fast allow more and more error, the same for every model, and leave everything below as it should be. "
                            "custom uses the settings below."),
                choice("policy", POLICIES, tooltip="Decides which steps to skip. Used by the preset 'custom'."),
                choice("predictor", PREDICTORS, tooltip="Stands in for what a skipped step would have computed. Used by the preset 'custom'."),
                choice("level", LEVELS, tooltip="What is skipped: everything, the model, or some of its blocks. Used by the preset 'custom'."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="Skips are allowed from this share of the noise schedule on. Used by the preset 'custom'."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="Skips are allowed up to this share of the noise schedule; the last step is always computed. "
                                       "Used by the preset 'custom'."),
                io.Int.Input("max_consecutive_skips", default=0, min=0, max=50, optional=True, advanced=True,
                             tooltip="After so many skips in a row an evaluation is computed; Heun and its kin evaluate twice per step. 0 goes by the "
                                     "run's length: a sixth of the steps, but at least 4. Used by the preset 'custom'; the others have 0."),
                choice("correction", CORRECTIONS, tooltip="Puts a prediction right by what was learnt in the run. Used by the preset 'custom'."),
                io.Int.Input("warm_up", default=1, min=1, max=50, optional=True, advanced=True,
                             tooltip="So many evaluations at the start are always computed. Used by the preset 'custom'."),
                io.Int.Input("last_steps", default=1, min=1, max=50, optional=True, advanced=True,
                             tooltip="So many steps at the end are always computed. Used by the preset 'custom'."),
                io.Boolean.Input("few_steps", default=False, optional=True, advanced=True,
                                 tooltip="Serve runs of 8 steps or fewer too, where a skipped step costs the picture more than it saves."),
                io.Int.Input("budget_mib", default=0, min=0, max=1 << 20, optional=True, advanced=True,
                             tooltip="Most memory for the cache, in MiB. When it is not enough, the cache keeps less, then goes without. 0 is no limit."),
                io.Combo.Input("storage", options=list(STORAGE), default="same", optional=True, advanced=True,
                               tooltip="How results are kept: as they came, in 16 bits, or in 8 (then the last one stands in as it is)."),
                io.Combo.Input("device", options=list(DEVICES), default="gpu", optional=True, advanced=True,
                               tooltip="Where results are kept: gpu is where they were computed, cpu is page-locked host memory."),
            ],
            outputs=[io.Model.Output(tooltip="The model with the step cache on it.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, enabled=True, preset=DEFAULT, policy=None, **others) -> str:
        """What the node takes from the disk: the host runs it again when this text is another one.

        Nothing ran yet, so what is linked to another node comes as None, and what was left out does too; either may be what the profile is used with.
        A name that comes so is taken for the default one: to sample once more is better than to show a picture of a profile that is gone.
        """
        named = policy if isinstance(policy, dict) else {}
        if enabled is False or (isinstance(preset, str) and preset != CUSTOM) or named.get("policy") != FromProfile.name:
            return ""
        name = named.get("profile")
        return stamp(profiles_folder(), FromProfile.profile if name is None else name)

    @classmethod
    def execute(cls, model, enabled: bool = True, preset: str = DEFAULT, policy: dict | None = None, predictor: dict | None = None,
                level: dict | None = None, start_percent: float = 0.0, end_percent: float = 1.0, max_consecutive_skips: int = 0,
                correction: dict | None = None, warm_up: int = 1, last_steps: int = 1, few_steps: bool = False, budget_mib: int = 0,
                storage: str = "same", device: str = "gpu") -> io.NodeOutput:
        if not enabled:
            return io.NodeOutput(model)
        check_numbers(cls, start_percent=start_percent, end_percent=end_percent, max_consecutive_skips=max_consecutive_skips, warm_up=warm_up,
                      last_steps=last_steps, budget_mib=budget_mib)
        memory = {"few_steps": few_steps, "budget_mib": budget_mib, "storage": storage, "device": device}
        if preset == CUSTOM:
            sent = sent_inputs(cls.hidden)
            for name, registry in MENUS.items():
                check_sent(name, registry, sent)
            if start_percent > end_percent:
                raise ValueError(f"start_percent is {start_percent} and end_percent {end_percent}; the start must not lie behind the end")
            settings = Settings(
                chosen("policy", POLICIES, policy), chosen("predictor", PREDICTORS, predictor), chosen("level", LEVELS, level),
                start_percent, end_percent, max_consecutive_skips, correction=chosen("correction", CORRECTIONS, correction), warm_up=warm_up,
                last_steps=last_steps, **memory)
            check_profile(model, settings)
        else:
            settings = preset_settings(preset, **memory)
        return io.NodeOutput(attach_step_cache(model, settings, notifier(getattr(cls.hidden, "unique_id", None))))


def sent_inputs(hidden) -> dict:
    """The inputs of this node as the prompt has them; empty in a script and inside an expanded subgraph."""
    prompt, node_id = getattr(hidden, "prompt", None) or {}, getattr(hidden, "unique_id", None)
    return prompt.get(node_id, {}).get("inputs", {})


NODES = [StepCache]
