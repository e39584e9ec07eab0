#!/usr/bin/env python
"""The whole job, from a data set to a served RCD model.

    ray job submit --working-dir . -- python pipelines/full.py --recipe demo

Finished stages are skipped, so the same command resumes after any interruption. Other uses:

    python pipelines/full.py --recipe demo --dry-run                       # effective recipe, plan, resources
    python pipelines/full.py --recipe demo --set target.train.steps=100 --redo target
    python pipelines/full.py --recipe demo --stages prepare,base
    python pipelines/full.py --recipe demo --repair                        # recompute damaged signal shards
    python pipelines/full.py --recipe demo --teardown                      # remove the served model
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import from the repository's root, not from pipelines/, whose file names are too common
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.run.driver import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
