"""``python -m seal_extract.cli``."""

import sys

from seal_extract.cli import main

sys.exit(main())
