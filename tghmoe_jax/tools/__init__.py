"""What is measured without a training: compiled steps, collectives, FLOPs, and fast paths against their oracles."""
