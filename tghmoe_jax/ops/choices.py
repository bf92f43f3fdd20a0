"""What the operators can be chosen by name, without jax: configs are checked against these lists."""

BACKENDS = ("auto", "plain", "blocked", "splash", "cudnn")  # of ops/attention.py
DISPATCHES = ("dense", "capacity", "ragged")  # of ops/experts.py
TRANSPORTS = ("all_to_all", "gather", "ragged")  # of ops/transport.py
