"""`python -m stationmaster.service.metrics > docs/metrics.md`: write the page of the metrics."""

import sys

from stationmaster.service.metrics.page import page

sys.stdout.write(page())
