"""`python -m regionjax` is `regionjax`."""

import sys

from regionjax.cli import main

sys.exit(main())
