"""A plugin of pytest for .ci/gpu: each of xdist's workers sees one of the GPUs of this machine."""

import os

worker, gpus = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("GPUS", 1))
if worker and gpus > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(worker.removeprefix("gw")) % gpus)
