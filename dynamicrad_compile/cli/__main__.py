"""`python -m dynamicrad_compile.cli`."""

import sys

from . import main

sys.exit(main())
