"""The ``sb3-qsm`` command, also as ``python -m sb3_qsm``."""

import sys


def main() -> int:
    """
    Run the command line with the arguments of the process.

    :return: Exit status; 1, with one line on what to install, where the extra ``zoo`` is missing
    """
    try:
        from sb3_qsm.zoo.cli import main as run
    except ModuleNotFoundError as error:
        print(f'sb3-qsm: error: the command line needs pip install "sb3-qsm[zoo]" ({error})', file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
