"""The reading room: a local page to look at a scan, ask about it, and see what the answer depends on."""
