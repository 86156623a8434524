"""Reads checkpoints that others wrote: Apple's, transformers', timm's and Ovis2's layouts, from disk or the Hub."""
