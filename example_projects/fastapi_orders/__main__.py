"""`python -m example_projects.fastapi_orders`: the demo."""

from __future__ import annotations

import sys

from example_projects.fastapi_orders.demo import main

sys.exit(main())
