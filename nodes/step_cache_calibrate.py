"""Step Cache Calibrate: measure a model once, so that Step Cache knows beforehand which steps to skip."""
from ..core.attach import attach_step_cache, runs_on
from ..core.run import Settings
from ..core.stepcache.calibrate import Calibration, calibrate, evaluations
from ..core.stepcache.levels.automatic import Automatic as AutomaticLevel
from ..core.stepcache.policies.schedule import Schedule
from ..core.stepcache.predictors.automatic import Automatic as AutomaticPredictor
from ..core.stepcache.profiles.words import described
from ._api import ProgressBar, io
from .numbers import check_numbers


class StepCacheCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_StepCacheCalibrate",
            display_name="Step Cache Calibrate",
            category="reprise",
            description="Runs a schedule in full for a few prompts, measures what skipping each step would cost, and writes a profile. Step Cache, policy "
                        "'profile', then takes a speed-up or a tolerance and computes the best steps for it. Once per model, sampler, schedule and CFG.",
            search_aliases=["calibrate", "profile", "teacache coefficients", "magcache calibration", "step cache profile"],
            inputs=[
                io.Model.Input("model", tooltip="The model as it goes into Step Cache, LoRAs and model sampling shift included."),
                io.Conditioning.Input("positive", tooltip="A prompt like those you will use."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it does nothing at cfg 1."),
                io.Sampler.Input("sampler", tooltip="The sampler the profile is for. It must evaluate each step once: euler, ddim, dpmpp_2m, res_multistep."),
                io.Sigmas.Input("sigmas", tooltip="The schedule the profile is for, 9 to 200 steps."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size the profile is for; others of about the same area will do later."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True,
                               tooltip="The CFG the profile is for; 1 for models with a guidance of their own, such as FLUX.1 dev."),
                io.Int.Input("seeds", default=1, min=1, max=16, optional=True,
                             tooltip="So many noises per prompt. Every one costs a full run and two cached ones; 4 pictures in all do for most models."),
                io.String.Input("name", default="calibrated", optional=True,
                                tooltip="The profile's name, for Step Cache's policy 'profile'. An older one of that name is replaced."),
                io.Float.Input("speed_up", default=2.0, min=1.1, max=10.0, step=0.1, optional=True,
                               tooltip="The speed-up that you mean to use. It and half as much again are tried out, which tells what errors come to."),
                io.Int.Input("refine", default=0, min=0, max=100, optional=True,
                             tooltip="So many trials seek a better schedule for each of the two; 10 to 30 find one. Each is a cached run per picture."),
                *(io.Conditioning.Input(f"positive_{n}", optional=True, tooltip="A further prompt.") for n in (2, 3, 4)),
            ],
            outputs=[
                io.String.Output("profile", tooltip="The profile's name."),
                io.String.Output("text", tooltip="What was measured: the error to expect of some speed-ups, TeaCache's coefficients and MagCache's curve."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, sampler, sigmas, latent_image, cfg: float = 1.0, seeds: int = 1, name: str = "calibrated",
                speed_up: float = 2.0, refine: int = 0, positive_2=None, positive_3=None, positive_4=None) -> io.NodeOutput:
        check_numbers(cls, cfg=cfg, seeds=seeds, speed_up=speed_up, refine=refine)
        if runs_on(model) is not None:
            raise ValueError("the model has a Step Cache on it and would be measured with its errors; connect the model from before Step Cache")
        prompts = [prompt for prompt in (positive, positive_2, positive_3, positive_4) if prompt is not None]
        calibration = Calibration(model, negative, sampler, sigmas, cfg, latent_image)
        bar = ProgressBar(evaluations(calibration, prompts, seeds, refine))
        profile, remarks = calibrate(calibration, prompts, seeds, name, speed_up, refine, with_schedule, lambda: bar.update(1))
        return io.NodeOutput(name, described(name, profile, profile.plans(*calibration.limits, profile.looks_back), remarks))


def with_schedule(model, computed, steps: int, notify):
    """The model with these steps computed and all others skipped."""
    settings = Settings(Schedule.of(computed, steps), AutomaticPredictor(), AutomaticLevel(), max_consecutive_skips=steps)
    return attach_step_cache(model, settings, notify)


NODES = [StepCacheCalibrate]
