"""``python -m pylo_integrations``, where the program is not on the path."""

import sys

from pylo_integrations.cli import main

if __name__ == "__main__":
    sys.exit(main())
