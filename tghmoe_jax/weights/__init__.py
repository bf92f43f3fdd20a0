"""Porting tables, safetensors files, inflation and upcycling."""
