"""`python -m example_projects.django_orders`: the demo."""

from __future__ import annotations

import sys

from example_projects.django_orders.demo.run import main

sys.exit(main())
