"""``python -m topotune`` is the ``topotune`` command."""

from topotune.cli.main import main

if __name__ == "__main__":
    main()
