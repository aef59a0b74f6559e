"""`python -m torsion.cli`."""

import sys

from torsion.cli import main

if __name__ == "__main__":
    sys.exit(main())
