"""What a run did, as data: the node's text, the log and the benchmark read the same record."""
import math
from dataclasses import asdict, dataclass, field
from statistics import median

OFF_AT_ZERO = ("tolerance", "threshold")     # settings of policies


@dataclass
class Evaluation:
    sigma: float
    computed: bool
    share: float                          # blocks computed / blocks of a full evaluation; those of a UNet count by multiply-adds
    predicted_error: float | None = None  # what a skip here, taken or not, is expected to add to the relative L2 error of the final latent
    hindcast_error: float | None = None   # measured at a computed evaluation: what the skip would have added; same unit
    ms: float = 0.0
    why: str = ""

    def __post_init__(self):
        """JSON has no infinity: an error that cannot be told is none."""
        for name in ("predicted_error", "hindcast_error"):
            if not math.isfinite(getattr(self, name) or 0.0):
                setattr(self, name, None)


@dataclass
class Report:
    state: str = "ran"   # ran | off
    reason: str = ""     # why it is off, or why it fell back
    node_id: str | None = None
    model: str = ""
    sampler: str = ""
    steps: int = 0
    policy: str = ""
    predictor: str = ""
    level: str = ""
    settings: dict = field(default_factory=dict)
    seconds: float = 0.0
    cache_bytes: int = 0
    estimated_error: float | None = None    # relative L2 error of the final latent against the full run; None without a skip, or where it cannot be told
    each: list[Evaluation] = field(default_factory=list)

    @property
    def evaluations(self) -> float:
        """Blocks computed divided by the blocks of a full evaluation, summed over the run."""
        return sum(e.share for e in self.each)

    @property
    def computed(self) -> int:
        return sum(e.computed for e in self.each)

    @property
    def time_share(self) -> float | None:
        """Of the time that computing every evaluation would have taken, going by those that were computed; None without a skip."""
        times = [e.ms for e in self.each if e.computed and e.ms > 0]
        return 1000 * self.seconds / (median(times) * len(self.each)) if times and self.computed < len(self.each) else None

    def add_reason(self, why: str) -> None:
        if why not in self.reason:
            self.reason = f"{self.reason}; {why}" if self.reason else why

    def as_dict(self) -> dict:
        record = asdict(self)
        ran = self.state == "ran"       # a run that was left alone was not counted
        return record | {
            "evaluations": round(self.evaluations, 4) if ran else None, "baseline_evaluations": len(self.each) if ran else None,
            "computed_steps": self.computed, "skipped_steps": len(self.each) - self.computed,
        }

    def line(self) -> str:
        """One line for the log and the node."""
        if self.state == "off":
            return f"Step Cache is off: {self.reason}"
        total, skipped = len(self.each), len(self.each) - self.computed
        share = f" ({total / self.evaluations:.2f}x fewer)" if skipped and self.evaluations else ""
        text = f"Step Cache: {self.evaluations:.4g} of {total} evaluations{share}, {self.computed} computed, {skipped} skipped"
        if self.estimated_error is not None:
            text += f", estimated error {self.estimated_error:.1%} of the latent"
        checked = [e for e in self.each if e.hindcast_error is not None and e.predicted_error is not None]
        if self.estimated_error is not None and checked:
            told, found = median(e.predicted_error for e in checked), median(e.hindcast_error for e in checked)
            worst = max(e.hindcast_error for e in checked)
            where = "1 computed step" if len(checked) == 1 else f"{len(checked)} computed steps"
            text += f" (at {where} a skip was expected to add {told:.1%} and would have added {found:.1%}, at worst {worst:.1%})"
        text += f", {self.seconds:.2f} s"
        if self.time_share is not None:
            text += f", {self.time_share:.0%} of the time of computing all"
        why = self.reason or self.why_none
        return text + (f" ({why})" if why else "")

    @property
    def why_none(self) -> str:
        """Why nothing was skipped, where no more is known of it than who decided; empty if something was."""
        if not self.each or self.computed < len(self.each):
            return ""
        left, sigmas = sum(not e.why for e in self.each), [e.sigma for e in self.each]
        if len(sigmas) > 1 and min(sigmas) == max(sigmas):
            return f"sigma stays at {sigmas[0]:.4g}, so no step does anything that could be skipped"
        if len(sigmas) > 1 and sigmas == sorted(sigmas):
            return "sigma rises all the way, and steps are skipped only where it falls"
        if off := [name for name in OFF_AT_ZERO if self.settings.get("policy", {}).get(name) == 0]:
            return f"{off[0]} 0 switches policy '{self.policy}' off"
        if not left:
            return "warm_up, last_steps, start_percent and end_percent leave none that may be skipped"
        return f"policy '{self.policy}' skipped none of the {left} that were left to it"
