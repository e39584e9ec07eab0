#!/usr/bin/env python
"""The whole job, from a dataset to a served RCD model.

    ray job submit --working-dir . -- python pipelines/full.py --recipe demo

Stages that are done are skipped, so the same command goes on after any interruption. Other uses:

    python pipelines/full.py --recipe demo --dry-run                       # effective recipe, plan, resources
    python pipelines/full.py --recipe demo --set target.train.steps=100 --redo target
    python pipelines/full.py --recipe demo --stages prepare,base
    python pipelines/full.py --recipe demo --repair                        # compute damaged signal shards again
    python pipelines/full.py --recipe demo --teardown                      # remove the served model
"""

import sys
from pathlib import Path

# The repository's root instead of pipelines/, whose file names (train, serve, ...) are too common for the path.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.run.driver import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
