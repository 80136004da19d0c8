"""Compare Runs: how far one picture is from another, in numbers and drawn."""
import math

from ..compare.comparison import compare
from ..compare.pictures import batch_of
from ..compare.plot import plot
from ._api import ProgressBar, io
from .notify import show
from .numbers import check_numbers
from .run_report import REPORT


class CompareRuns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Reprise_CompareRuns",
            display_name="Compare Runs",
            category="reprise",
            description="Measures how far image B is from image A, shows both beside their difference, and draws the reports of the runs that made them.",
            search_aliases=["psnr", "ssim", "haarpsi", "mdsi", "difference", "diff", "side by side", "quality", "plot"],
            inputs=[
                io.Image.Input("image_a", tooltip="The reference, for example the picture without Step Cache."),
                io.Image.Input("image_b", tooltip="The picture to measure. It has the size of image A, and a batch as many pictures."),
                REPORT.Input("report_a", optional=True, tooltip="The Run Report of image A; it is drawn and told."),
                REPORT.Input("report_b", optional=True, tooltip="The Run Report of image B; it is drawn and told."),
                io.Int.Input("gain", default=32, min=1, max=255, optional=True,
                             tooltip="The difference is multiplied by this before it is shown. The numbers do not depend on it."),
            ],
            outputs=[
                io.Image.Output("comparison", tooltip="A, B and their difference side by side, for each picture of the batch."),
                io.Image.Output("plot", tooltip="What each run computed and skipped, its expected and measured errors, and sigma."),
                io.String.Output("text", tooltip="All the numbers, and one line for each report."),
                io.Float.Output("psnr", tooltip="PSNR in dB, peak 1, the mean over the batch; 120 for pictures that are equal."),
                io.Float.Output("ssim", tooltip="SSIM, the mean over colours and batch; 1 for equal pictures, NaN where it could not be measured."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image_a, image_b, report_a=None, report_b=None, gain: int = 32) -> io.NodeOutput:
        check_numbers(cls, gain=gain)
        bar = ProgressBar(len(image_a))
        found = compare(image_a, image_b, (report_a, report_b), gain, bar.update_absolute)
        told = [(name, report) for name, report in (("A", report_a), ("B", report_b)) if report is not None]
        text = "\n".join([found.text, *(f"{name}: {report.line()}" for name, report in told)])
        show(text, getattr(cls.hidden, "unique_id", None))
        ssim = math.nan if found.mean.ssim is None else found.mean.ssim
        return io.NodeOutput(batch_of(found.sheets), batch_of([plot(told)]), text, found.mean.psnr, ssim)


NODES = [CompareRuns]
