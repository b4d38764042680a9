"""``python -m sb3_qsm`` is the ``sb3-qsm`` command."""

from sb3_qsm.zoo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
