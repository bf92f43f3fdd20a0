"""The names of the operators that a config can choose, without jax: configs are checked against these lists."""

BACKENDS = ("auto", "plain", "blocked", "splash", "cudnn")  # of ops/attention.py
DISPATCHES = ("dense", "capacity", "ragged")  # of ops/experts.py
TRANSPORTS = ("all_to_all", "gather", "ragged")  # of ops/transport.py
_SPLASH_BLOCKS = (768, 640, 512)  # multiples of the 128 lanes whose float32 scores fit the vector memory several times


def splash_blocks(length: int, block: int = 0) -> tuple[int, int]:
    """(block, padded length): of the blocks the kernel likes, the one that pads `length` least; or the one given."""
    if block:
        return block, -(-length // block) * block
    if length <= _SPLASH_BLOCKS[0]:
        whole = -(-length // 128) * 128
        return whole, whole
    return min(((b, -(-length // b) * b) for b in _SPLASH_BLOCKS), key=lambda pair: pair[1])
