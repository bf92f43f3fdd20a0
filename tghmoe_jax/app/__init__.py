"""The reading room: a local page where one looks at a scan, asks about it, and sees what the answer rests on."""
