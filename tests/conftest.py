"""What every test runs under, set before torch or datasets is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny, and tests share the machine with the processes they start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
