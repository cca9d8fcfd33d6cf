"""``python -m topotune.bench.tcep`` prints the tables."""

from topotune.bench.tcep.run import main

if __name__ == "__main__":
    main()
