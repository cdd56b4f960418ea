"""The command `maml-rl`, also `python -m maml_rl`: keeps failures of the installation readable."""

from __future__ import annotations

import os
import sys

import maml_rl
from maml_rl.opengl import VARIABLE, choose_platform
from maml_rl.signals import exit_code, raise_on_terminate

DRAWING = ("render", "report")
"""Commands that need OpenGL; others with --render."""


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.argv[1:] == ["--version"]:
        print(f"maml-rl {maml_rl.__version__}")
        return
    raise_on_terminate()
    try:
        if sys.argv[1:2] and (sys.argv[1] in DRAWING or "--render" in sys.argv[2:]):
            choose_platform()
        maml_rl.check_envs()
        from maml_rl.cli import run
    except ImportError as error:
        print(f"maml-rl: {error}", file=sys.stderr)
        sys.exit(2)
    except (AttributeError, RuntimeError, OSError) as error:
        # What mujoco raises where MUJOCO_GL names a library that is broken or not there.
        if VARIABLE not in os.environ:
            raise
        platform = os.environ[VARIABLE]
        print(f"maml-rl: no mujoco with {VARIABLE}={platform}, unset it: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print("maml-rl: interrupted", file=sys.stderr)
        sys.exit(exit_code(interrupt))
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
