"""Tensor-to-tensor operators of every mixer family. Imports torch and triton only; knows no process
group."""
