"""Quantized models: formats (read), transcode, loader, save, modulation cache, attention, doctor."""
