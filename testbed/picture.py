"""The pack's own measures and sheets, for the commands of the test bed, which run without a host."""
from .inprocess import ROOT, package

package("pack", ROOT)
from pack.compare.metrics import psnr, ssim  # noqa: E402, I001 - the pack must have its name first
from pack.compare.pictures import difference, image_of, tensor_of  # noqa: E402
from pack.compare.sheet import SHOWN, captioned, column, enlarged, framed, row, side_by_side  # noqa: E402

__all__ = ["SHOWN", "captioned", "column", "difference", "enlarged", "framed", "image_of", "psnr", "row", "side_by_side", "ssim", "tensor_of"]
