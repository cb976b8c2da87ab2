"""Benchmarks: every op and the whole model, against XLA and the strongest peers.

python -m bench list
python -m bench run --op decode_attention --impl mosaic,cudnn
python -m bench tables
"""
