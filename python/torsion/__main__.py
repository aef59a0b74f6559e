"""`python -m torsion`: the same command line as the installed `torsion` script."""

import sys

from torsion.cli import main

if __name__ == "__main__":
    sys.exit(main())
