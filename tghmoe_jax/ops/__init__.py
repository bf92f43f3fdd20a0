"""Arrays to arrays: attention, expert dispatch, transports, RoPE."""
