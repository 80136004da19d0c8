"""Reprise's commands for developers and for the curious. Nothing but Python 3.10 and pip is needed.

    python3 dev.py demo [--out DIR]          run every workflow with and without Reprise; pictures and report.json
    python3 dev.py captions [--out FILE]     sixteen captions, drawn by each trained model, on one sheet
    python3 dev.py test [pytest arguments]   ruff, then every tier of tests
    python3 dev.py serve [--port N]          leave ComfyUI up with Reprise and the demo models
    python3 dev.py bench NAME [arguments]    one benchmark, for example: bench step-cache --first
    python3 dev.py train KIND [arguments]    train a test model: flux, zimage, taesd or easycontrol

The first call builds a private environment with ComfyUI in your cache folder; the later ones find it there.

    COMFYUI_DIR=/path   use the ComfyUI in that folder
    REPRISE_CACHE=/path keep the environment there
    REPRISE_CPU=1       leave the GPU alone
"""
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - old Pythons can read this file, so they get as far as this sentence
    sys.exit("reprise: Python 3.10 or newer is needed; this is Python {}.{}".format(*sys.version_info))

from devtools.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
